"""Copying from the source: the pointer-generator, whose vocabulary each source extends by its own words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_NEVER = float("-inf")


def _scores(
    logits: Tensor, gate: Tensor, weights: Tensor, source: Tensor, target: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Checked; log P(generate) and log P(copy), (B, T, 1) each."""
    batch, steps = logits.shape[:2]
    if logits.dim() != 3 or weights.dim() != 3 or weights.shape[:2] != (batch, steps):
        raise ValueError(
            f"logits and weights must be (B, T, V) and (B, T, S); got {tuple(logits.shape)} and {tuple(weights.shape)}"
        )
    if gate.shape != (batch, steps, 1):
        raise ValueError(f"gate must be ({batch}, {steps}, 1); got {tuple(gate.shape)}")
    if source.shape != (batch, weights.shape[2]):
        raise ValueError(f"source must be ({batch}, {weights.shape[2]}); got {tuple(source.shape)}")
    if target is not None and target.shape != (batch, steps):
        raise ValueError(f"target must be ({batch}, {steps}); got {tuple(target.shape)}")
    return torch.nn.functional.logsigmoid(gate), torch.nn.functional.logsigmoid(-gate)


def _log(mass: Tensor) -> Tensor:
    """log of a mass that may be 0, with gradient 0 there."""
    there = mass > 0
    return torch.where(there, mass.where(there, torch.ones_like(mass)).log(), _NEVER)


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)); torch's has the gradient NaN where both are -inf."""
    nowhere = (a == _NEVER) & (b == _NEVER)
    return torch.logaddexp(a.masked_fill(nowhere, 0.0), b.masked_fill(nowhere, 0.0)).masked_fill(nowhere, _NEVER)


def pointer_log_probs(logits: Tensor, gate: Tensor, weights: Tensor, source: Tensor, extra: int = 0) -> Tensor:
    """log P over the vocabulary and the `extra` words that only the sources have, (B, T, V + extra).

    ``P(w) = p_gen P_vocab(w) + (1 - p_gen) sum of the attention on the places of the source that hold w``, with
    ``p_gen = sigmoid(gate)``, in log space throughout: no probability is rounded to 0 before the logarithm.

    Args:
        logits: ``(B, T, V)``, before softmax.
        gate: ``(B, T, 1)``.
        weights: ``(B, T, S)``, the attention, 0 on padding.
        source: ``(B, S)`` int64, words by extended number: below V those of the vocabulary, from V on the source's own.
        extra: how many extended numbers there are.

    Equivalent to::

        p = F.pad(gate.sigmoid() * logits.softmax(2), (0, extra))
        index = source.unsqueeze(1).expand_as(weights)
        p.scatter_add(2, index, (1 - gate.sigmoid()) * weights).log()

    Papers: Vinyals, Fortunato, Jaitly, Pointer networks, 2015; Gu et al., Incorporating copying mechanism in
    sequence-to-sequence learning, 2016; See, Liu, Manning, Get to the point, 2017.
    """
    generate, copy = _scores(logits, gate, weights, source)
    size = logits.shape[2] + extra
    if source.numel():
        least, most = int(source.min()), int(source.max())
        if least < 0 or most >= size:
            raise ValueError(f"source must hold numbers from 0 to {size - 1}; got {least} to {most}")
    index = source.unsqueeze(1).expand_as(weights)
    copied = weights.new_zeros(*logits.shape[:2], size).scatter_add(2, index, weights)
    generated = torch.nn.functional.pad(generate + logits.log_softmax(2), (0, extra), value=_NEVER)
    return _log_add(generated, copy + _log(copied))


def pointer_loss(
    logits: Tensor,
    gate: Tensor,
    weights: Tensor,
    source: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    unknown: int | None = None,
) -> Tensor:
    """Mean of ``-log P(target)``, without the distribution over the extended vocabulary: only the target is looked up.

    Args:
        logits, gate, weights, source: as of `pointer_log_probs`.
        target: ``(B, T)``, extended numbers.
        ignore_index: targets that do not count.
        unknown: what a target counts as that is neither in the vocabulary nor in its source, as in See et al. With None
            such a target is impossible, and the loss is infinite.
    """
    generate, copy = _scores(logits, gate, weights, source, target)
    size = logits.shape[2]
    counts = target != ignore_index
    wanted = target.masked_fill(~counts, 0)
    held = (source.unsqueeze(1) == wanted.unsqueeze(2)) & counts.unsqueeze(2)
    if unknown is not None:
        wanted = wanted.masked_fill((wanted >= size) & ~held.any(2), unknown)
    known = wanted < size
    found = logits.log_softmax(2).gather(2, wanted.where(known, torch.zeros_like(wanted)).unsqueeze(2)).squeeze(2)
    generated = torch.where(known, generate.squeeze(2) + found, _NEVER)
    copied = copy.squeeze(2) + _log((weights * held).sum(2))
    total = _log_add(generated, copied).masked_fill(~counts, 0.0)
    return -total.sum() / counts.sum().clamp(min=1)


class PointerGenerator(torch.nn.Module):
    """The output layer of a decoder that can copy: vocabulary logits and the gate between writing and copying.

    Args:
        features: of the decoder's states, to which what was attended to may already be joined.
        vocabulary: V.

    Shapes of ``forward(states, weights, source, extra=0)``: states (B, T, features), weights (B, T, S), source (B, S);
    log-probabilities (B, T, V + extra); see `pointer_log_probs`. ``loss(states, weights, source, target)`` is
    `pointer_loss`.

    >>> layer = PointerGenerator(8, 20)
    >>> source = torch.tensor([[5, 20, 6, 20], [7, 7, 20, 9]])
    >>> log_probs = layer(torch.randn(2, 3, 8), torch.full((2, 3, 4), 0.25), source, extra=1)
    >>> log_probs.shape, bool((log_probs.exp().sum(2) - 1).abs().max() < 1e-5)
    (torch.Size([2, 3, 21]), True)

    Paper: See, Liu, Manning, Get to the point: summarization with pointer-generator networks, 2017.
    """

    def __init__(self, features: int, vocabulary: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.vocabulary = torch.nn.Linear(features, vocabulary, device=device, dtype=dtype)
        self.gate = torch.nn.Linear(features, 1, device=device, dtype=dtype)

    def forward(self, states: Tensor, weights: Tensor, source: Tensor, extra: int = 0) -> Tensor:
        return pointer_log_probs(self.vocabulary(states), self.gate(states), weights, source, extra)

    def loss(self, states: Tensor, weights: Tensor, source: Tensor, target: Tensor, **options: Any) -> Tensor:
        return pointer_loss(self.vocabulary(states), self.gate(states), weights, source, target, **options)
