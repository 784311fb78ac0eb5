"""What a decoder reads while it is trained: the truth, or now and then what it would have written itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyseqnet.decoding import Stepper


def teacher_forcing(target: Tensor, begin: int) -> Tensor:
    """What is read so that `target` (B, T) is written: BEGIN, then the truth one position late.

    >>> teacher_forcing(torch.tensor([[5, 6, 2]]), begin=1)
    tensor([[1, 5, 6]])

    A model trained like this never sees its own mistakes (exposure bias): see `ScheduledSampling`.
    Paper: Williams, Zipser, A learning algorithm for continually running fully recurrent neural networks, 1989.
    """
    if target.dim() != 2:
        raise ValueError(f"target must be (B, T); got {tuple(target.shape)}")
    return torch.cat([target.new_full((target.shape[0], 1), begin), target[:, :-1]], 1)


def _likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


@dataclass(frozen=True)
class ScheduledSampling:
    """Feeds the decoder its own prediction instead of the truth, more often the longer training goes on.

    Each token is the truth with probability ``epsilon(step)``, by a coin of its own:

    ==================== ================================ ==========================
    kind                 epsilon(i)                       k
    ==================== ================================ ==========================
    ``linear``           ``max(floor, 1 - i / k)``        steps until it would be 0
    ``exponential``      ``max(floor, k ** i)``           below 1
    ``inverse_sigmoid``  ``max(floor, k/(k+exp(i/k)))``   1 or more: when it falls
    ==================== ================================ ==========================

    Args:
        kind, k: the schedule.
        floor: the least epsilon. 0 is always sampling in the end, which hurts (Bengio et al., table 1).
        choose: from logits ``(..., V)`` to tokens ``(...)``; the likeliest by default.

    >>> round(ScheduledSampling("inverse_sigmoid", 10).epsilon(10), 4)
    0.7863

    Papers: Bengio, Vinyals, Jaitly, Shazeer, Scheduled sampling for sequence prediction with recurrent neural networks,
    2015; Mihaylova, Martins, Scheduled sampling for Transformers, 2019 (`two_pass`).
    """

    kind: str
    k: float
    floor: float = 0.0
    choose: Callable[[Tensor], Tensor] = _likeliest

    def __post_init__(self) -> None:
        good = {"linear": self.k > 0, "exponential": 0 < self.k < 1, "inverse_sigmoid": self.k >= 1}
        if self.kind not in good:
            raise ValueError(f"kind must be one of {', '.join(good)}; got {self.kind!r}")
        if not good[self.kind]:
            raise ValueError(f"k = {self.k} is no {self.kind} schedule: see the table")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be between 0 and 1; got {self.floor}")

    def epsilon(self, step: int) -> float:
        """The probability of the truth in this step, from 0."""
        if self.kind == "linear":
            value = 1 - step / self.k
        elif self.kind == "exponential":
            value = self.k**step
        else:
            fallen = self.k * math.exp(-step / self.k)  # exp(step / k) would overflow
            value = fallen / (fallen + 1)
        return max(self.floor, value)

    def mix(self, truth: Tensor, predicted: Tensor, step: int, generator: torch.Generator | None = None) -> Tensor:
        """Each token (any shape) from `truth` or from `predicted`."""
        coin = torch.rand(truth.shape, device=truth.device, generator=generator)
        return torch.where(coin < self.epsilon(step), truth, predicted)

    def two_pass(
        self,
        decode: Callable[[Tensor], Tensor],
        inputs: Tensor,
        step: int,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Logits (B, T, V) for a decoder that computes all positions at once, such as a Transformer.

        The first pass, without gradients, reads the truth and predicts; the second reads the mixture. BEGIN stays.

        Args:
            decode: ``inputs (B, T) -> logits (B, T, V)``.
            inputs: as of `teacher_forcing`.
        """
        if self.epsilon(step) >= 1:
            return decode(inputs)
        with torch.no_grad():
            predicted = self.choose(decode(inputs))
        mixed = self.mix(inputs[:, 1:], predicted[:, :-1], step, generator)
        return decode(torch.cat([inputs[:, :1], mixed], 1))

    def rollout(
        self, stepper: Stepper, state: Any, inputs: Tensor, step: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Logits (B, T, V) for a decoder that takes one step at a time: it reads what it really has written.

        One call of ``stepper.step`` a position, with gradients.
        """
        outputs: list[Tensor] = []
        tokens = inputs[:, 0]
        for position in range(inputs.shape[1]):
            if position:
                predicted = self.choose(outputs[-1].detach())
                tokens = self.mix(inputs[:, position], predicted, step, generator)
            logits, state = stepper.step(tokens, state)
            outputs.append(logits)
        return torch.stack(outputs, 1)
