"""Is a film review favourable? A BiLSTM, a convolution over words, and attention pooling read 2000 reviews.

Pang, Lee, 2004 (data); Kim, 2014; Lin et al., 2017.
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

HELD_OUT = 400
BATCH = 32
LONGEST = 700  # words that are read of a review
EPOCHS = {"lstm": 10, "cnn": 8, "attention": 12}
HIDDEN_WORDS = 0.5  # share of the words that a training step does not see: 1600 reviews are soon known by heart
QUICK_REVIEWS = 200


class Data(NamedTuple):
    texts: list[Tensor]
    labels: Tensor
    train: list[int]  # numbers of texts
    test: list[int]


def run(settings: Settings) -> list[Score]:
    from pyseqnet.recipes import draw

    corpus = movies.reviews()
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(corpus), generator=generator).tolist()
    test, train = order[:HELD_OUT], order[HELD_OUT:]
    longest = LONGEST
    if settings.quick:
        test, train, longest = test[:QUICK_REVIEWS], train[:QUICK_REVIEWS], 100
    vocabulary = Vocabulary((corpus[i][0] for i in train), least=3)
    texts = [vocabulary.encode(review[:longest]) for review, _ in corpus]
    labels = torch.tensor([label for _, label in corpus])

    data = Data(texts, labels, train, test)
    scores, histories = [], {}
    for reader in READERS:
        torch.manual_seed(settings.seed)
        history = _train(TextClassifier(len(vocabulary), 2, reader=reader), data, settings)
        histories[reader] = history
        scores.append(Score(f"accuracy, {reader}, %", 100 * history.scores["accuracy"][-1], 80.0))
        scores.append(Score.fall(reader, history))
    draw.curves(histories, settings.out / "learning_curves.png")
    return scores


def _train(model: TextClassifier, data: Data, settings: Settings) -> History:
    draw_batch = batches(len(data.train), BATCH, settings.seed)

    def score(chosen: list[int], hidden: float = 0.0) -> Tensor:
        text, lengths = padded([data.texts[i] for i in chosen])
        found: Tensor = model(text.masked_fill((torch.rand(text.shape) < hidden) & (text != PADDING), OTHER), lengths)
        return found

    def loss() -> Tensor:
        chosen = [data.train[i] for i in draw_batch().tolist()]
        return torch.nn.functional.cross_entropy(score(chosen, HIDDEN_WORDS), data.labels[chosen])

    def evaluate() -> dict[str, float]:
        parts = [data.test[i : i + BATCH] for i in range(0, len(data.test), BATCH)]
        right = sum(int((score(part).argmax(1) == data.labels[part]).sum()) for part in parts)
        return {"accuracy": right / len(data.test)}

    return fit(
        model,
        loss,
        settings.steps(EPOCHS[model.reader], 8) * -(-len(data.train) // BATCH),
        learning_rate=5e-3,
        evaluate=evaluate,
        looks=8,
        name=model.reader,
        progress=settings.progress,
    )
