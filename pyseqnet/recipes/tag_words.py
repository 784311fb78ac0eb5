"""What the recipes that tag words share: words, letters and tags as numbers, training, decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyseqnet.data.corpora import Tagged
from pyseqnet.data.text import Vocabulary, padded, trigrams
from pyseqnet.models.word_tagger import WordTagger
from pyseqnet.recipes import Settings
from pyseqnet.training import History, batches, fit

BATCH = 32
LEARNING_RATE = 5e-3
LONGEST_WORD = 20  # trigrams that are read of a word
GLANCE = 500  # test sentences that are looked at during the training
MISTAKES = 40  # listed

Measure = Callable[[list[list[str]], list[list[str]]], float]  # of the tags: truth, predicted


@dataclass(frozen=True)
class Numbers:
    """Vocabularies of a training corpus."""

    words: Vocabulary
    letters: Vocabulary
    tags: Vocabulary

    @classmethod
    def of(cls, train: Sequence[Tagged]) -> Numbers:
        lower = [[word.lower() for word in sentence.words] for sentence in train]
        return cls(
            Vocabulary(lower, least=2),
            Vocabulary((trigrams(word) for sentence in train for word in sentence.words), least=3),
            Vocabulary(sentence.tags for sentence in train),
        )

    def inputs(self, sentences: Sequence[Tagged]) -> tuple[Tensor, Tensor, Tensor]:
        """Words (B, T), lengths (B,), trigrams (B, T, LONGEST_WORD)."""
        numbers, lengths = padded([self.words.encode(word.lower() for word in s.words) for s in sentences])
        letters = torch.zeros(*numbers.shape, LONGEST_WORD, dtype=torch.int64)
        for row, sentence in zip(letters, sentences, strict=True):
            for place, word in zip(row, sentence.words, strict=False):
                found = self.letters.encode(trigrams(word)[:LONGEST_WORD])
                place[: len(found)] = found
        return numbers, lengths, letters


@dataclass(frozen=True)
class Trained:
    history: History
    score: float
    predicted: list[list[str]]  # of the test sentences


def train(
    corpus: Sequence[Tagged],
    test: Sequence[Tagged],
    measure: Measure,
    settings: Settings,
    *,
    name: str,
    epochs: int,
    reader: str = "lstm",
    crf: bool = True,
    **sizes: Any,
) -> Trained:
    """Trains a `WordTagger` (of these `sizes`) on the corpus and tags the test sentences."""
    torch.manual_seed(settings.seed)
    numbers = Numbers.of(corpus)
    model = WordTagger(
        len(numbers.words), len(numbers.tags), trigrams=len(numbers.letters), reader=reader, crf=crf, **sizes
    )  # fmt: skip
    draw = batches(len(corpus), BATCH, settings.seed, lengths=[len(sentence.words) for sentence in corpus])
    inputs = [tuple(part[0] for part in numbers.inputs([sentence])) for sentence in corpus]
    tags = [numbers.tags.encode(sentence.tags) for sentence in corpus]

    def loss() -> Tensor:
        chosen = draw().tolist()
        words, lengths = padded([inputs[i][0] for i in chosen])
        letters, _ = padded([inputs[i][2] for i in chosen])
        return model.loss(words, lengths, padded([tags[i] for i in chosen])[0], letters)

    def predict(sentences: Sequence[Tagged]) -> list[list[str]]:
        found: list[list[str]] = []
        for first in range(0, len(sentences), BATCH):
            words, lengths, letters = numbers.inputs(sentences[first : first + BATCH])
            found += [[str(tag) for tag in numbers.tags.decode(row)] for row in model.decode(words, lengths, letters)]
        return found

    def evaluate() -> dict[str, float]:
        glance = test[:GLANCE]
        return {"score": measure([sentence.tags for sentence in glance], predict(glance))}

    history = fit(
        model,
        loss,
        settings.steps(epochs * len(draw), 60),
        learning_rate=LEARNING_RATE,
        evaluate=evaluate,
        stateful=[draw],
        folder=settings.checkpoints(name),
        name=name,
        progress=settings.progress,
    )
    predicted = predict(test)
    return Trained(history, measure([sentence.tags for sentence in test], predicted), predicted)


def list_errors(test: Sequence[Tagged], predicted: Sequence[Sequence[str]], path: Path) -> None:
    """The first sentences with mistakes: each word that was mistaken as ``word [truth, not prediction]``."""
    lines = []
    for sentence, found in zip(test, predicted, strict=True):
        if sentence.tags != found:
            lines.append(
                " ".join(
                    word if tag == wrong else f"{word} [{tag}, not {wrong}]"
                    for word, tag, wrong in zip(sentence.words, sentence.tags, found, strict=True)
                )
            )
    path.write_text("\n".join(lines[:MISTAKES]) + "\n", encoding="utf-8")
