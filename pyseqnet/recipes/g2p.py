"""From spelling to sound (CMUdict): LSTMs with three kinds of attention and a Transformer; greedy and beam search.

Yao, Zweig: Sequence-to-sequence neural net models for grapheme-to-phoneme conversion, 2015; Bahdanau, Cho, Bengio,
2015; Chorowski et al., 2015; Vaswani et al., 2017. The subset: words of 3 to 10 letters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyseqnet.data import corpora
from pyseqnet.data.text import PADDING, Vocabulary, padded
from pyseqnet.models import RecurrentTranslator, SequenceTranslator
from pyseqnet.recipes import Score, Settings
from pyseqnet.recipes.edit_distance import error_rate
from pyseqnet.training import History, batches, fit

SHORTEST, LONGEST = 3, 10  # letters of a word
HELD_OUT, QUICK_HELD_OUT, QUICK_WORDS = 2000, 100, 2000
GLANCE = 200  # held-out words that are looked at during the training
BATCH, EPOCHS, QUICK_STEPS = 64, 6, 60
BEAMS = 5
MOST_PHONES = 20  # written for a word
SPECIAL = ("<begin>", "<end>")
SHOWN = 6  # letters at least of the word whose attention is drawn
MODELS = ("LSTM", "LSTM, additive", "LSTM, location-aware", "Transformer")
LEARNING_RATES = {"Transformer": 2e-3}
OTHER_LEARNING_RATE = 4e-3

Entry = tuple[str, list[str]]


def build(name: str, letters: Vocabulary, phones: Vocabulary) -> Any:
    symbols: dict[str, int] = {"padding": PADDING, "begin": phones["<begin>"], "end": phones["<end>"]}
    if name == "Transformer":
        sizes = {"d_model": 128, "num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 256}
        return SequenceTranslator(len(letters), len(phones), dropout=0.1, **sizes, **symbols)
    attention = {"LSTM": "none", "LSTM, additive": "additive", "LSTM, location-aware": "location"}[name]
    return RecurrentTranslator(len(letters), len(phones), attention=attention, dropout=0.1, **symbols)


def write(model: Any, words: Sequence[Tensor], phones: Vocabulary, beams: int) -> list[list[str]]:
    """The phones of each word."""
    model.eval()
    found: list[list[str]] = []
    for first in range(0, len(words), BATCH):
        source = padded(words[first : first + BATCH])[0]
        result = model.search(source, MOST_PHONES, beams=beams)
        rows = [best for (best,) in result.sequences(end=phones["<end>"])]
        found += [[str(phone) for phone in phones.decode(row)] for row in rows]
    return found


def train(
    name: str, entries: Sequence[Entry], held_out: Sequence[Entry], letters: Vocabulary, phones: Vocabulary,
    settings: Settings,
) -> tuple[Any, History]:  # fmt: skip
    torch.manual_seed(settings.seed)
    model = build(name, letters, phones)
    sources = [letters.encode(word) for word, _ in entries]
    targets = [phones.encode(["<begin>", *sounds, "<end>"]) for _, sounds in entries]
    glance = held_out[:GLANCE]
    draw = batches(len(entries), BATCH, settings.seed, lengths=[len(source) for source in sources])

    def loss() -> Tensor:
        chosen = draw().tolist()
        source, target = padded([sources[i] for i in chosen])[0], padded([targets[i] for i in chosen])[0]
        scores = model(source, target[:, :-1])
        return torch.nn.functional.cross_entropy(
            scores.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PADDING, label_smoothing=0.05
        )

    def evaluate() -> dict[str, float]:
        found = write(model, [letters.encode(word) for word, _ in glance], phones, 1)
        return {"error": error_rate(found, [sounds for _, sounds in glance])}

    history = fit(
        model,
        loss,
        settings.steps(EPOCHS * len(draw), QUICK_STEPS),
        learning_rate=LEARNING_RATES.get(name, OTHER_LEARNING_RATE),
        evaluate=evaluate,
        looks=5,
        stateful=[draw],
        folder=settings.checkpoints(name),
        name=name,
        progress=settings.progress,
    )
    return model, history


def run(settings: Settings) -> list[Score]:
    from pyseqnet.recipes import draw

    entries = [entry for entry in corpora.cmudict() if SHORTEST <= len(entry[0]) <= LONGEST]
    order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    count = settings.steps(HELD_OUT, QUICK_HELD_OUT)
    held_out = [entries[i] for i in order[:count]]
    training = [entries[i] for i in order[count : count + QUICK_WORDS if settings.quick else None]]
    letters = Vocabulary(word for word, _ in training)
    phones = Vocabulary((sounds for _, sounds in training), special=SPECIAL)
    words, truth = [letters.encode(word) for word, _ in held_out], [sounds for _, sounds in held_out]

    scores, histories = [], {}
    for name in ("LSTM, additive",) if settings.quick else MODELS:
        model, histories[name] = train(name, training, held_out, letters, phones, settings)
        greedy, beam = (100 * error_rate(write(model, words, phones, beams), truth) for beams in (1, BEAMS))
        goal = 10.0 if name in ("LSTM, additive", "Transformer") else None
        scores.append(Score(f"phone errors, {name}, greedy, %", greedy))
        scores.append(Score(f"phone errors, {name}, {BEAMS} beams, %", beam, goal, at_least=False))
        scores.append(Score.fall(name, histories[name]))
        if name == "LSTM, additive":
            shown = next((word for word, _ in held_out if len(word) >= SHOWN), held_out[0][0])
            found = model.search(letters.encode(shown).unsqueeze(0), MOST_PHONES, return_alignments=True)
            written = [str(phone) for phone in phones.decode(found.tokens[0, 0].tolist())]
            draw.matrix(found.alignments[0, 0], written, list(shown), settings.out / "attention.png", name)
    draw.curves(histories, settings.out / "learning_curves.png")
    return scores
