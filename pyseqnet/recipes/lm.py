"""Characters of Shakespeare, one after the other: a language model of an LSTM and one of a Transformer.

Karpathy, The unreasonable effectiveness of recurrent neural networks, 2015 (data); Xiong et al., On layer
normalization in the Transformer architecture, 2020 (normalised before each block, no warm-up needed).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet.data import corpora
from pyseqnet.data.text import Vocabulary
from pyseqnet.decoding import forbid, generate
from pyseqnet.models.language_model import LanguageModel
from pyseqnet.recipes import Score, Settings
from pyseqnet.training import History, fit

KINDS = ("lstm", "transformer")
WINDOW, BATCH = 128, 32  # characters of an example, examples of a step
STEPS, QUICK_STEPS = 3000, 25
LEARNING_RATES = {"lstm": 4e-3, "transformer": 1e-3}
VALIDATION_SHARE = 0.1  # the text's end
GLANCE = 100  # windows that are looked at during the training
QUICK_TEXT = 30_000
PROMPT, WRITTEN, TEMPERATURE = "ROMEO:\n", 400, 0.8


def nats(model: LanguageModel, windows: Tensor) -> float:
    """Mean loss a character over windows (N, WINDOW + 1)."""
    model.eval()
    with torch.no_grad():
        losses = [len(part) * model.loss(part).item() for part in windows.split(BATCH)]
    return sum(losses) / len(windows)


def train(kind: str, text: Tensor, symbols: int, settings: Settings) -> tuple[LanguageModel, History, float]:
    torch.manual_seed(settings.seed)
    model = LanguageModel(symbols, kind=kind)
    held_out = int(len(text) * VALIDATION_SHARE)
    training = text[:-held_out].unfold(0, WINDOW + 1, 1)
    validation = text[-held_out:].unfold(0, WINDOW + 1, WINDOW)
    generator = torch.Generator().manual_seed(settings.seed)

    def loss() -> Tensor:
        return model.loss(training[torch.randint(0, len(training), (BATCH,), generator=generator)])

    history = fit(
        model,
        loss,
        settings.steps(STEPS, QUICK_STEPS),
        learning_rate=LEARNING_RATES[kind],
        evaluate=lambda: {"nats": nats(model, validation[:GLANCE])},
        stateful=[generator],
        folder=settings.checkpoints(kind),
        name=kind,
        progress=settings.progress,
    )
    return model, history, nats(model, validation)


def write(model: LanguageModel, vocabulary: Vocabulary, count: int, seed: int) -> str:
    """A passage that goes on from PROMPT, drawn from the model."""
    stepper = model.stepper()
    found = generate(
        stepper,
        stepper.start(),
        begin=vocabulary.encode(PROMPT).unsqueeze(0),
        end=None,
        max_length=count,
        sample=True,
        temperature=TEMPERATURE,
        generator=torch.Generator().manual_seed(seed),
        logits_hooks=[forbid(0, 1)],  # padding and "other" are no characters
    )
    return PROMPT + "".join(str(character) for character in vocabulary.decode(found.tokens[0, 0].tolist()))


def run(settings: Settings) -> list[Score]:
    from pyseqnet.recipes import draw

    text = corpora.shakespeare()
    if settings.quick:
        text = text[:QUICK_TEXT]
    vocabulary = Vocabulary([text])
    numbers = vocabulary.encode(text)
    scores, histories, passages = [], {}, []
    for kind in KINDS:
        model, history, loss = train(kind, numbers, len(vocabulary), settings)
        histories[kind] = history
        scores.append(Score(f"validation loss, {kind}, nats a character", loss, 1.6, at_least=False))
        scores.append(Score.fall(kind, history))
        passages.append(f"--- {kind}\n{write(model, vocabulary, settings.steps(WRITTEN, 50), settings.seed)}\n")
    (settings.out / "passages.txt").write_text("\n".join(passages), encoding="utf-8")
    draw.curves(histories, settings.out / "learning_curves.png")
    return scores
