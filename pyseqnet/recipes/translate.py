"""From German to English (Multi30k): what attention is worth, copying, three ways to train on, a Transformer.

Sutskever et al., 2014; Bahdanau et al., 2015; See et al., 2017; Vaswani et al., 2017; Bengio et al., 2015 (scheduled
sampling); Rennie et al., 2017 (self-critical). Texts are in lower case; BLEU is sacrebleu's on the 1000 sentences of
test_2016_flickr. All LSTMs are equally large and see the same number of sentences; so do the three that train on.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyseqnet.data import corpora
from pyseqnet.data.text import OTHER, Vocabulary, padded, words
from pyseqnet.models import CopyingTranslator, RecurrentTranslator, SequenceTranslator
from pyseqnet.recipes import Score, Settings
from pyseqnet.recipes.sequence_pairs import BEGIN, END, SPECIAL, Pairs, cross_entropy, rows, symbols, train
from pyseqnet.training import (
    History,
    ScheduledSampling,
    corpus_bleu,
    self_critical_loss,
    sentence_bleu,
    sequence_log_probs,
    teacher_forcing,
)  # fmt: skip

MOST_WORDS = 5000  # of each language; the others are "other", or copied
LONGEST = 40  # words that are written
BATCH, EPOCHS, TRANSFORMER_EPOCHS = 64, 4, 5
TRAIN_ON, TRAIN_ON_RATE, SELF_CRITICAL_RATE = 150, 2e-4, 5e-5  # steps behind the training with attention
RATES = {"Transformer": 1e-3}
OTHER_RATE = 2e-3
SMOOTHING = 0.1
BEAMS, PENALTY = 5, 1.0
GLANCE = 200  # sentences of the validation set that are looked at during the training
QUICK_PAIRS, QUICK_STEPS, QUICK_TEST = 1500, 25, 20
MODELS = ("LSTM", "LSTM, attention", "LSTM, copying", "Transformer")
QUICK_MODELS = MODELS[:2]


class Corpus(Pairs):
    """Sentence pairs as numbers; those of copied words are counted for each source on its own."""

    def __init__(self, pairs: Sequence[tuple[str, str]], german: Vocabulary, english: Vocabulary) -> None:
        split = [(words(source), words(target)) for source, target in pairs]
        super().__init__(split, german, english)
        self.references = [reference.lower() for _, reference in pairs]
        self.places: list[Tensor] = []
        self.copied: list[Tensor] = []
        self.own: list[list[str]] = []  # words of the source that the English vocabulary does not have
        for source, target in split:
            own = list(dict.fromkeys(word for word in source if english[word] == OTHER))
            extended = {word: len(english) + number for number, word in enumerate(own)}
            self.own.append(own)
            self.places.append(torch.tensor([extended.get(word, english[word]) for word in source]))
            self.copied.append(torch.tensor([extended.get(word, english[word]) for word in (BEGIN, *target, END)]))

    def text(self, row: Sequence[int], number: int) -> str:
        """What was written for the source `number`, as a text: hyphens close up."""
        size = len(self.written)
        found = [str(self.written.entries[n]) if n < size else self.own[number][n - size] for n in row]
        return re.sub(r"(?<=\w) - (?=\w)", "-", " ".join(found))


def build(name: str, german: Vocabulary, english: Vocabulary) -> Any:
    source, target = len(german), len(english)
    options = symbols(english)
    if name == "Transformer":
        options |= {"d_model": 256, "num_encoder_layers": 3, "num_decoder_layers": 3, "dim_feedforward": 512}
        return SequenceTranslator(source, target, dropout=0.1, **options)
    options |= {"embedding_size": 192, "hidden_size": 256, "dropout": 0.2}
    if name == "LSTM, copying":
        return CopyingTranslator(source, target, other=OTHER, **options)
    return RecurrentTranslator(source, target, attention="none" if name == "LSTM" else "additive", **options)


def search(model: Any, corpus: Corpus, chosen: Sequence[int], **options: Any) -> Any:
    source = padded([corpus.sources[i] for i in chosen])[0]
    if not isinstance(model, CopyingTranslator):
        return model.search(source, LONGEST, **options)
    extra = max(len(corpus.own[i]) for i in chosen)
    return model.search_with_copies(
        source, padded([corpus.places[i] for i in chosen])[0], LONGEST, extra=extra, **options
    )


def write(model: Any, corpus: Corpus, count: int, **options: Any) -> list[str]:
    """The translations of the first `count` sources."""
    model.eval()
    found = rows(corpus, lambda chosen: search(model, corpus, chosen, **options), batch=BATCH, count=count)
    return [corpus.text(row, i) for i, row in enumerate(found)]


def bleu(model: Any, corpus: Corpus, count: int, **options: Any) -> float:
    return corpus_bleu(write(model, corpus, count, **options), corpus.references[:count])


def forced(model: Any, corpus: Corpus) -> Callable[[list[int]], Tensor]:
    """Teacher forcing."""

    def loss(chosen: list[int]) -> Tensor:
        source, target = corpus.batch(chosen)
        if isinstance(model, CopyingTranslator):
            places, copied = (padded([part[i] for i in chosen])[0] for part in (corpus.places, corpus.copied))
            return model.loss(source, places, copied)
        return cross_entropy(model(source, target[:, :-1]), target, SMOOTHING)

    return loss


class Sampled:
    """Scheduled sampling: ever more of what the decoder reads is its own. Counts its steps for the schedule."""

    def __init__(self, model: Any, corpus: Corpus, steps: int) -> None:
        self.model, self.corpus, self.step = model, corpus, 0
        self.schedule = ScheduledSampling("linear", 2.0 * steps)

    def __call__(self, chosen: list[int]) -> Tensor:
        source, target = self.corpus.batch(chosen)
        scores = self.schedule.rollout(self.model, self.model.start(source), target[:, :-1], self.step)
        self.step += 1
        return cross_entropy(scores, target, SMOOTHING)

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def self_critical(model: Any, corpus: Corpus) -> Callable[[list[int]], Tensor]:
    """Policy gradients on each sentence's BLEU, against what the greedy translation gets."""

    def loss(chosen: list[int]) -> Tensor:
        source, _ = corpus.batch(chosen)
        model.eval()  # dropout off: the sample is drawn from the model whose gradient is taken

        def log_probs(tokens: Tensor, lengths: Tensor) -> Tensor:
            return sequence_log_probs(model(source, teacher_forcing(tokens, model.begin)), tokens, lengths)

        def reward(result: Any) -> Tensor:
            best = (row for (row,) in result.sequences(end=model.end))
            texts = [corpus.text(row, i) for row, i in zip(best, chosen, strict=True)]
            return sentence_bleu(texts, [corpus.references[i] for i in chosen])

        drawn, greedy = model.search(source, LONGEST, sample=True), model.search(source, LONGEST)
        return self_critical_loss(log_probs, drawn, greedy, reward)[0]

    return loss


def train_translator(
    name: str, model: Any, loss: Callable[[list[int]], Tensor], steps: int, rate: float, training: Corpus,
    glance: Corpus, settings: Settings, cycle: bool = True,
) -> History:  # fmt: skip
    return train(
        name,
        model,
        training,
        settings,
        loss=loss,
        steps=steps,
        quick_steps=min(steps, QUICK_STEPS),
        rate=rate,
        batch=BATCH,
        cycle=cycle,
        stateful=[loss] if isinstance(loss, Sampled) else [],
        evaluate=lambda: {"bleu": bleu(model, glance, min(GLANCE, len(glance)))},
        looks=4,
    )


def run(settings: Settings) -> list[Score]:
    from pyseqnet.recipes import draw

    pairs = corpora.multi30k("train")[: QUICK_PAIRS if settings.quick else None]
    german, english = (
        Vocabulary((words(pair[side]) for pair in pairs), least=2, most=MOST_WORDS, special=special)
        for side, special in ((0, ()), (1, SPECIAL))
    )
    training, glance, test = (
        Corpus(some, german, english) for some in (pairs, corpora.multi30k("val"), corpora.multi30k("test_2016_flickr"))
    )
    count = settings.steps(len(test), QUICK_TEST)
    if settings.quick:
        glance = Corpus(corpora.multi30k("val")[:QUICK_TEST], german, english)
    scores, histories, found, models = [], {}, {}, {}

    def measure(name: str, model: Any) -> None:
        found[name] = bleu(model, test, count, beams=BEAMS, length_penalty=PENALTY)
        scores.append(Score(f"BLEU, {name}, {BEAMS} beams", found[name]))

    for name in QUICK_MODELS if settings.quick else MODELS:
        torch.manual_seed(settings.seed)
        models[name] = model = build(name, german, english)
        epochs = TRANSFORMER_EPOCHS if name == "Transformer" else EPOCHS
        steps, rate = epochs * -(-len(pairs) // BATCH), RATES.get(name, OTHER_RATE)
        histories[name] = train_translator(
            name, model, forced(model, training), steps, rate, training, glance, settings
        )
        measure(name, model)
        scores.append(Score.fall(name, histories[name]))
    scores.append(Score("BLEU that attention is worth", found["LSTM, attention"] - found["LSTM"], 5.0))
    if not settings.quick:
        scores += train_on(models["LSTM, attention"], training, glance, test, settings)
    shown = search(models["LSTM, attention"], test, [0], return_alignments=True)
    written = test.text(shown.tokens[0, 0].tolist(), 0).split()
    source = [str(word) for word in german.decode(test.sources[0].tolist())]
    draw.matrix(shown.alignments[0, 0], written, source, settings.out / "attention.png", "LSTM, attention")
    draw.curves(histories, settings.out / "learning_curves.png")
    return scores


def train_on(model: Any, training: Corpus, glance: Corpus, test: Corpus, settings: Settings) -> list[Score]:
    """The trained model goes on in three ways, each for the same number of sentences."""
    ways: dict[str, Callable[[Any], Callable[[list[int]], Tensor]]] = {
        "teacher forcing": lambda one: forced(one, training),
        "scheduled sampling": lambda one: Sampled(one, training, TRAIN_ON),
        "self-critical": lambda one: self_critical(one, training),
    }
    scores = []
    for way, loss in ways.items():
        torch.manual_seed(settings.seed)
        further = copy.deepcopy(model)
        rate = SELF_CRITICAL_RATE if way == "self-critical" else TRAIN_ON_RATE
        train_translator(way, further, loss(further), TRAIN_ON, rate, training, glance, settings, cycle=False)
        for method, options in (("greedy", {}), (f"{BEAMS} beams", {"beams": BEAMS, "length_penalty": PENALTY})):
            value = bleu(further, test, len(test), **options)
            scores.append(Score(f"BLEU, LSTM, attention, then {way}, {method}", value))
    value = bleu(model, test, len(test))
    return [Score("BLEU, LSTM, attention, greedy", value), *scores]
