"""The order in which examples come: shuffled anew each epoch, repeatable, and able to go on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

POOL = 50  # batches that are sorted by length together: enough to waste little padding, few enough to stay shuffled


class batches:
    """Draws the indices of batches, epoch after epoch: each call gives the next, (n,) int64.

    Every example comes once an epoch; an epoch's last batch may be smaller.

    Args:
        count: of examples.
        size: of a batch; with `tokens`, the most examples it has.
        seed: of the order.
        lengths: of the examples. Batches are then made of examples of similar length, which saves padding: the shuffled
            examples are sorted by length in pools of some dozens of batches, and the batches shuffled.
        tokens: with `lengths`: a batch holds at most so many positions, padding included. An example longer than that
            is a batch of its own.

    ``state_dict`` and ``load_state_dict`` say and set where it is; `fit` puts them into its checkpoints.

    >>> draw = batches(5, 2, seed=0)
    >>> sorted(torch.cat([draw(), draw(), draw()]).tolist())
    [0, 1, 2, 3, 4]
    """

    def __init__(
        self, count: int, size: int, seed: int, lengths: Sequence[int] | None = None, tokens: int | None = None
    ) -> None:
        if count < 1 or size < 1:
            raise ValueError(f"count and size must be at least 1; got {count} and {size}")
        if lengths is not None and len(lengths) != count:
            raise ValueError(f"lengths must be {count} numbers; got {len(lengths)}")
        if tokens is not None and (lengths is None or tokens < 1):
            raise ValueError("tokens must be at least 1, and needs lengths")
        self.count, self.size, self.seed, self.tokens = count, size, seed, tokens
        self.lengths = None if lengths is None else torch.as_tensor(lengths)
        self._generator = torch.Generator().manual_seed(seed)
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._before = self._generator.get_state()
        self._plan, self._position = self._planned(), 0

    def _planned(self) -> list[Tensor]:
        order = torch.randperm(self.count, generator=self._generator)
        if self.lengths is None:
            return list(order.split(self.size))
        plan: list[Tensor] = []
        for pool in order.split(self.size * POOL):
            ranked = pool[self.lengths[pool].argsort(descending=True, stable=True)]
            plan += ranked.split(self.size) if self.tokens is None else self._filled(ranked, self.tokens)
        return [plan[i] for i in torch.randperm(len(plan), generator=self._generator).tolist()]

    def _filled(self, ranked: Tensor, tokens: int) -> list[Tensor]:
        """Cuts, longest first, so that each batch has as many examples as fit."""
        assert self.lengths is not None
        cut, start = [], 0
        while start < len(ranked):
            longest = max(1, int(self.lengths[ranked[start]]))
            end = start + min(self.size, max(1, tokens // longest))
            cut.append(ranked[start:end])
            start = end
        return cut

    def __len__(self) -> int:
        """Batches of the running epoch."""
        return len(self._plan)

    def __call__(self) -> Tensor:
        if self._position == len(self._plan):
            self._begin_epoch()
        self._position += 1
        return self._plan[self._position - 1]

    def _identity(self) -> dict[str, int | None]:
        return {"count": self.count, "size": self.size, "seed": self.seed, "tokens": self.tokens}

    def state_dict(self) -> dict[str, Any]:
        return {"of": self._identity(), "epoch": self._before, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError if the state is of batches of another size, number or seed."""
        if state["of"] != self._identity():
            raise ValueError(f"the checkpoint's batches are {state['of']}, these are {self._identity()}")
        self._generator.set_state(state["epoch"])
        self._begin_epoch()
        self._position = state["position"]
