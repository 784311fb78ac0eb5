"""Training and decoding that the sequence-to-sequence recipes share: pairs of symbol sequences, one model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyseqnet.data.text import PADDING, Vocabulary, padded
from pyseqnet.recipes import Settings
from pyseqnet.training import History, batches, fit

BEGIN, END = "<begin>", "<end>"
SPECIAL = (BEGIN, END)


def symbols(vocabulary: Vocabulary) -> dict[str, Any]:
    """The arguments `padding`, `begin` and `end` of a model that writes this vocabulary."""
    return {"padding": PADDING, "begin": vocabulary[BEGIN], "end": vocabulary[END]}


class Pairs:
    """Sources and targets as numbers; targets between BEGIN and END."""

    def __init__(
        self, pairs: Iterable[tuple[Iterable[Hashable], Iterable[Hashable]]], read: Vocabulary, written: Vocabulary
    ) -> None:
        self.written = written
        self.sources: list[Tensor] = []
        self.targets: list[Tensor] = []
        for source, target in pairs:
            self.sources.append(read.encode(source))
            self.targets.append(written.encode([BEGIN, *target, END]))

    def __len__(self) -> int:
        return len(self.sources)

    def batch(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        return padded([self.sources[i] for i in chosen])[0], padded([self.targets[i] for i in chosen])[0]


def cross_entropy(scores: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Of scores (B, T - 1, V) behind each symbol of ``target[:, :-1]``, (B, T)."""
    return torch.nn.functional.cross_entropy(
        scores.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PADDING, label_smoothing=smoothing
    )


def write(model: Any, pairs: Pairs, most: int, *, batch: int = 64, count: int | None = None,
          **options: Any) -> list[list[Hashable]]:  # fmt: skip
    """What the model writes for the first ``count`` sources, in batches of similar length, without END."""
    model.eval()
    count = len(pairs) if count is None else min(count, len(pairs))
    order = sorted(range(count), key=lambda i: len(pairs.sources[i]))
    found: list[list[Hashable]] = [[] for _ in range(count)]
    for first in range(0, count, batch):
        chosen = order[first : first + batch]
        result = model.search(padded([pairs.sources[i] for i in chosen])[0], most, **options)
        for i, (best, *_) in zip(chosen, result.sequences(end=pairs.written[END]), strict=True):
            found[i] = pairs.written.decode(best)
    return found


def train(
    name: str,
    model: Any,
    pairs: Pairs,
    settings: Settings,
    *,
    epochs: int,
    quick_steps: int,
    rate: float,
    batch: int = 64,
    smoothing: float = 0.0,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    looks: int = 5,
) -> History:
    """Teacher forcing for so many epochs, with what a recipe's settings ask for."""
    draw = batches(len(pairs), batch, settings.seed, lengths=[len(source) for source in pairs.sources])

    def loss() -> Tensor:
        source, target = pairs.batch(draw().tolist())
        return cross_entropy(model(source, target[:, :-1]), target, smoothing)

    return fit(
        model,
        loss,
        settings.steps(epochs * len(draw), quick_steps),
        learning_rate=rate,
        evaluate=evaluate,
        looks=looks,
        stateful=[draw],
        folder=settings.checkpoints(name),
        name=name,
        progress=settings.progress,
    )
