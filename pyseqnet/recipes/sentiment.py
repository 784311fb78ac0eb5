"""Is a film review favourable? A BiLSTM, a convolution over words, and attention pooling read 2000 reviews.

Pang, Lee, 2004 (data); Kim, 2014; Lin et al., 2017. Of the publishers' ten folds the first seven are for training, the
eighth chooses (epochs, and which look at it gives the weights), the last two are the test.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyseqnet.data import movies
from pyseqnet.data.text import OTHER, PADDING, Vocabulary, padded
from pyseqnet.models.text_classifier import READERS, TextClassifier
from pyseqnet.recipes import Score, Settings
from pyseqnet.training import History, batches, fit

DEV_FOLD = 7  # those above are the test
BATCH = 32
LONGEST = 700  # words that are read of a review
EPOCHS = {"lstm": 10, "cnn": 8, "attention": 12}
HIDDEN_WORDS = 0.5  # share of the words that a training step does not see: 1400 reviews are soon known by heart
QUICK_REVIEWS = 200


class Data(NamedTuple):
    texts: list[Tensor]
    labels: Tensor
    train: list[int]  # numbers of texts
    dev: list[int]
    test: list[int]


def run(settings: Settings) -> list[Score]:
    from pyseqnet.recipes import draw

    corpus = movies.reviews()
    train = [i for i, review in enumerate(corpus) if review.fold < DEV_FOLD]
    dev = [i for i, review in enumerate(corpus) if review.fold == DEV_FOLD]
    test = [i for i, review in enumerate(corpus) if review.fold > DEV_FOLD]
    longest = LONGEST
    if settings.quick:
        train, dev, test = (part[:: max(1, len(part) // QUICK_REVIEWS)] for part in (train, dev, test))
        longest = 100
    vocabulary = Vocabulary((corpus[i].words for i in train), least=3)
    texts = [vocabulary.encode(review.words[:longest]) for review in corpus]
    labels = torch.tensor([review.label for review in corpus])

    data = Data(texts, labels, train, dev, test)
    scores, histories = [], {}
    for reader in READERS:
        torch.manual_seed(settings.seed)
        model = TextClassifier(len(vocabulary), 2, reader=reader)
        histories[reader] = history = _train(model, data, settings)
        with torch.no_grad():
            right = 100 * _accuracy(model, data, data.test)
        scores.append(Score(f"accuracy, {reader}, %", right, 80.0))
        scores.append(Score(f"accuracy on the reviews that chose, {reader}, %", 100 * max(history.scores["accuracy"])))
        scores.append(Score.fall(reader, history))
    draw.curves(histories, settings.out / "learning_curves.png")
    return scores


def _score(model: TextClassifier, data: Data, chosen: list[int], hidden: float = 0.0) -> Tensor:
    text, lengths = padded([data.texts[i] for i in chosen])
    found: Tensor = model(text.masked_fill((torch.rand(text.shape) < hidden) & (text != PADDING), OTHER), lengths)
    return found


def _accuracy(model: TextClassifier, data: Data, chosen: list[int]) -> float:
    parts = [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]
    right = sum(int((_score(model, data, part).argmax(1) == data.labels[part]).sum()) for part in parts)
    return right / len(chosen)


def _train(model: TextClassifier, data: Data, settings: Settings) -> History:
    draw_batch = batches(len(data.train), BATCH, settings.seed)

    def loss() -> Tensor:
        chosen = [data.train[i] for i in draw_batch().tolist()]
        return torch.nn.functional.cross_entropy(_score(model, data, chosen, HIDDEN_WORDS), data.labels[chosen])

    return fit(
        model,
        loss,
        settings.steps(EPOCHS[model.reader], 8) * -(-len(data.train) // BATCH),
        learning_rate=5e-3,
        evaluate=lambda: {"accuracy": _accuracy(model, data, data.dev)},
        looks=8,
        best_by="accuracy",
        name=model.reader,
        progress=settings.progress,
    )
