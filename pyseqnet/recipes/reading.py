"""Which sentence answers the question (XQuAD, English)? A reader that attends, beside counting shared words.

Hermann et al., Teaching machines to read and comprehend, 2015; Artetxe, Ruder, Yogatama: On the cross-lingual
transferability of monolingual representations, 2020 (data). There are no vectors from elsewhere and 900 questions to
learn from, too few to find the answer's words; so the sentence is asked for. The baselines count the words that
question and sentence share, all alike or by their rarity.
"""

from __future__ import annotations

import collections
import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyseqnet.data import xquad
from pyseqnet.data.text import Vocabulary, padded, trigrams
from pyseqnet.models import SentenceReader
from pyseqnet.recipes import Score, Settings
from pyseqnet.training import batches, fit

HELD_OUT, QUICK_PARAGRAPHS = 60, 20
BATCH = 16
EPOCHS = 12
LEARNING_RATE = 2e-3
LONGEST_WORD = 16  # trigrams that are read of a word
SHOWN, LONGEST_TITLE = 8, 60


class Asked(NamedTuple):
    sentences: list[list[str]]
    question: xquad.Question


class Rarity:
    """How rare a word is: the logarithm of all training sentences over those with it."""

    def __init__(self, paragraphs: list[xquad.Paragraph]) -> None:
        sentences = [set(sentence) for paragraph in paragraphs for sentence in paragraph.sentences]
        self.counts = collections.Counter(word for sentence in sentences for word in sentence)
        self.total = len(sentences)

    def __call__(self, word: str) -> float:
        return math.log(self.total / max(1, self.counts[word]))


def flatten(paragraphs: list[xquad.Paragraph]) -> list[Asked]:
    return [Asked(one.sentences, question) for one in paragraphs for question in one.questions]


def counting(asked: list[Asked], weight: Rarity | None) -> float:
    """The accuracy of the sentence that shares the most words with the question, of equals the first."""
    right = 0
    for sentences, question in asked:
        shared = [set(question.words) & set(sentence) for sentence in sentences]
        scores = [sum(1.0 if weight is None else weight(word) for word in one) for one in shared]
        right += scores.index(max(scores)) == question.sentence
    return right / len(asked)


class Reading:
    """A model with what it needs to read words."""

    def __init__(self, train: list[xquad.Paragraph], rarity: Rarity) -> None:
        sentences = [sentence for one in train for sentence in one.sentences]
        self.letters = Vocabulary(trigrams(word) for sentence in sentences for word in sentence)
        self.rarity = rarity
        self.model = SentenceReader(len(self.letters))

    def _spelled(self, words: list[str]) -> Tensor:
        spelled = torch.zeros(len(words), LONGEST_WORD, dtype=torch.int64)
        for row, word in zip(spelled, words, strict=True):
            letters = self.letters.encode(trigrams(word)[:LONGEST_WORD])
            row[: len(letters)] = letters
        return spelled

    def scores(self, asked: list[Asked]) -> Tensor:
        """(questions, sentences), minus infinity behind the last sentence of a text."""
        pairs = [(i, sentence) for i, one in enumerate(asked) for sentence in one.sentences]
        owner = torch.tensor([i for i, _ in pairs])
        question, lengths = padded([self._spelled(one.question.words) for one in asked])
        rarity, _ = padded([torch.tensor([self.rarity(word) for word in one.question.words]) for one in asked])
        told, sizes = padded([self._spelled(sentence) for _, sentence in pairs])
        found = self.model(question[owner], rarity[owner], lengths[owner], told, sizes)
        rows, _ = padded([part + 1 for part in torch.arange(len(pairs)).split([len(one.sentences) for one in asked])])
        return torch.cat([found.new_full((1,), float("-inf")), found])[rows]  # row 0 of it is padding

    def accuracy(self, asked: list[Asked]) -> float:
        answers = torch.tensor([one.question.sentence for one in asked])
        found = [self.scores(asked[i : i + BATCH]).argmax(1) for i in range(0, len(asked), BATCH)]
        return (torch.cat(found) == answers).double().mean().item()


def run(settings: Settings) -> list[Score]:
    from pyseqnet.recipes import draw

    everything = xquad.paragraphs()
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    held_out = [everything[i] for i in order[: settings.steps(HELD_OUT, QUICK_PARAGRAPHS)]]
    training = [everything[i] for i in order[HELD_OUT : HELD_OUT + QUICK_PARAGRAPHS if settings.quick else None]]
    rarity = Rarity(training)
    train, test = flatten(training), flatten(held_out)
    torch.manual_seed(settings.seed)
    reading = Reading(training, rarity)
    draw_batch = batches(len(train), BATCH, settings.seed)

    def loss() -> Tensor:
        chosen = [train[i] for i in draw_batch().tolist()]
        answers = torch.tensor([one.question.sentence for one in chosen])
        return torch.nn.functional.cross_entropy(reading.scores(chosen), answers)

    with torch.no_grad():
        untrained = 100 * reading.accuracy(test)
    history = fit(
        reading.model,
        loss,
        settings.steps(EPOCHS * len(draw_batch), 20),
        learning_rate=LEARNING_RATE,
        evaluate=lambda: {"accuracy": reading.accuracy(test)},
        name="reading",
        progress=settings.progress,
    )
    right = 100 * history.scores["accuracy"][-1]
    with torch.no_grad():
        chances = reading.scores(test[:SHOWN]).softmax(1)
    asked = [f"{' '.join(one.question.words)[:LONGEST_TITLE]} ({1 + one.question.sentence})" for one in test[:SHOWN]]
    sentences = [str(1 + i) for i in range(chances.shape[1])]
    draw.matrix(chances, asked, sentences, settings.out / "sentences.png", "the sentence with the answer")
    shared, rare = 100 * counting(test, None), 100 * counting(test, rarity)
    first = 100 * sum(one.question.sentence == 0 for one in test) / len(test)
    return [
        Score("sentences found, reader, %", right, 70.0),
        Score("sentences found, reader before the training, %", untrained),
        Score("sentences found, counting shared words, %", shared),
        Score("sentences found, counting by rarity, %", rare),
        Score("sentences found, always the first, %", first),
        Score("points gained over counting shared words", right - shared, 0.0),
        Score.fall("reading", history),
    ]
