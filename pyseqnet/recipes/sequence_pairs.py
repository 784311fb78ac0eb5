"""Training and decoding that the sequence-to-sequence recipes share: pairs of symbol sequences, one model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyseqnet.data.text import PADDING, Vocabulary, padded
from pyseqnet.decoding import Generated
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


def rows(
    pairs: Pairs, search: Callable[[list[int]], Generated], *, batch: int = 64, count: int | None = None
) -> list[list[int]]:
    """What ``search`` finds best for the first ``count`` sources, without END; it is given the numbers of a batch of
    similar length."""
    count = len(pairs) if count is None else min(count, len(pairs))
    order = sorted(range(count), key=lambda i: len(pairs.sources[i]))
    found: list[list[int]] = [[] for _ in range(count)]
    for first in range(0, count, batch):
        chosen = order[first : first + batch]
        for i, (best, *_) in zip(chosen, search(chosen).sequences(end=pairs.written[END]), strict=True):
            found[i] = best
    return found


def write(model: Any, pairs: Pairs, most: int, *, batch: int = 64, count: int | None = None,
          **options: Any) -> list[list[Hashable]]:  # fmt: skip
    """What the model writes for the first ``count`` sources, at most ``most`` symbols each."""
    model.eval()

    def search(chosen: list[int]) -> Generated:
        found: Generated = model.search(padded([pairs.sources[i] for i in chosen])[0], most, **options)
        return found

    return [pairs.written.decode(row) for row in rows(pairs, search, batch=batch, count=count)]


def train(
    name: str,
    model: Any,
    pairs: Pairs,
    settings: Settings,
    *,
    epochs: int = 1,
    quick_steps: int,
    rate: float,
    batch: int = 64,
    smoothing: float = 0.0,
    loss: Callable[[list[int]], Tensor] | None = None,
    steps: int | None = None,
    cycle: bool = True,
    stateful: Sequence[Any] = (),
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    looks: int = 5,
) -> History:
    """So many epochs, or ``steps``, with what a recipe's settings ask for.

    ``loss``: of the pairs with these numbers; by default teacher forcing. ``steps``: in place of epochs. The rest as of
    `pyseqnet.training.fit`.
    """
    draw = batches(len(pairs), batch, settings.seed, lengths=[len(source) for source in pairs.sources])

    def forced(chosen: list[int]) -> Tensor:
        source, target = pairs.batch(chosen)
        return cross_entropy(model(source, target[:, :-1]), target, smoothing)

    of_batch = forced if loss is None else loss
    return fit(
        model,
        lambda: of_batch(draw().tolist()),
        settings.steps(epochs * len(draw) if steps is None else steps, quick_steps),
        learning_rate=rate,
        cycle=cycle,
        evaluate=evaluate,
        looks=looks,
        stateful=[draw, *stateful],
        folder=settings.checkpoints(name),
        name=name,
        progress=settings.progress,
    )
