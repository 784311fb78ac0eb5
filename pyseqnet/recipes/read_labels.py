"""What the recipes share that find a set of labels by attention: marks of sets, training, scores of many texts."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from pyseqnet.data.text import OTHER, Vocabulary, padded
from pyseqnet.models import LabelAttention
from pyseqnet.recipes import Settings
from pyseqnet.training import History, batches, fit

BATCH = 64
LEARNING_RATE = 5e-3
QUICK_STEPS = 20


def marks(sets: Sequence[Iterable[Hashable]], labels: Vocabulary) -> Tensor:
    """(sets, labels): 1 for what a set has; what is no label counts nowhere."""
    found = torch.zeros(len(sets), len(labels))
    for row, one in zip(found, sets, strict=True):
        row[labels.encode(one)] = 1
    found[:, : OTHER + 1] = 0
    return found


def train(
    name: str, model: LabelAttention, texts: list[Tensor], wanted: Tensor, settings: Settings, epochs: int
) -> History:
    """Each label for itself: binary cross-entropy, summed over the labels of a text."""
    draw = batches(len(texts), BATCH, settings.seed, lengths=[len(text) for text in texts])

    def loss() -> Tensor:
        chosen = draw().tolist()
        scores = model(*padded([texts[i] for i in chosen]))
        value: Tensor = torch.nn.functional.binary_cross_entropy_with_logits(scores, wanted[chosen], reduction="sum")
        return value / len(chosen)

    return fit(
        model,
        loss,
        settings.steps(epochs * len(draw), QUICK_STEPS),
        learning_rate=LEARNING_RATE,
        name=name,
        progress=settings.progress,
    )


@torch.no_grad()
def scores(model: LabelAttention, texts: list[Tensor]) -> Tensor:
    """(texts, labels), before the sigmoid."""
    return torch.cat([model(*padded(texts[first : first + BATCH])) for first in range(0, len(texts), BATCH)])
