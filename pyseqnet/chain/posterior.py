"""Entropy and samples of the distribution of tag sequences that a linear-chain CRF defines.

Hernando, Crespi, Cybenko: Efficient computation of the hidden Markov model entropy for a given observation sequence,
2005.
Frühwirth-Schnatter: Data augmentation and dynamic linear models, 1994 (forward filtering, backward sampling).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet.functional._common import accumulation_dtype
from pyseqnet.functional.crf import check_shapes, lengths_of_mask

# Stands for log 0: finite, so that 0 log 0 and its gradient are 0.
_NEVER = -1e30


def _read(
    emissions: Tensor, mask: Tensor | None, start: Tensor, end: Tensor, transitions: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Lengths, and scores in float32 or float64 with a finite log 0; those of steps that are off are 0."""
    check_shapes(emissions, None, mask, start, end, transitions)
    lengths = lengths_of_mask(mask, emissions)
    dtype = accumulation_dtype(emissions.dtype)
    off = torch.arange(emissions.shape[1], device=emissions.device) >= lengths[:, None]
    e = emissions.to(dtype).masked_fill(off[:, :, None], 0).clamp(min=_NEVER)
    s, z, a = (x.to(dtype).clamp(min=_NEVER) for x in (start, end, transitions))
    return lengths, e, s, z, a


def crf_entropy(emissions: Tensor, mask: Tensor | None, start: Tensor, end: Tensor, transitions: Tensor) -> Tensor:
    """Entropy, in nats, of each sequence's distribution of tag sequences.

    Equivalent to::

        log_p = torch.stack([crf_log_likelihood(emissions, y, ...) for y in all_tag_sequences])
        -(log_p.exp() * log_p).sum(0)

    Args and errors as `pyseqnet.functional.crf_log_likelihood`. Returns ``(B)``; NaN where every sequence is forbidden.
    Differentiable any number of times. T steps of C² terms in torch.

    Paper: Hernando et al., Efficient computation of the hidden Markov model entropy, 2005.
    """
    lengths, e, start, end, transitions = _read(emissions, mask, start, end, transitions)
    alpha = start + e[:, 0]
    entropy = torch.zeros_like(alpha)  # of the tags before, given the tag of this step
    for step in range(1, e.shape[1]):
        paths = alpha[:, :, None] + transitions
        origin = paths.log_softmax(1)
        real = (step < lengths)[:, None]
        entropy = torch.where(real, (origin.exp() * (entropy[:, :, None] - origin)).sum(1), entropy)
        alpha = torch.where(real, paths.logsumexp(1) + e[:, step], alpha)
    last = (alpha + end).log_softmax(1)
    result = (last.exp() * (entropy - last)).sum(1)
    impossible = ((alpha + end).amax(1) < _NEVER / 2) | (lengths < 1)
    return result.masked_fill(impossible, torch.nan)


@torch.no_grad()
def crf_sample(
    emissions: Tensor,
    mask: Tensor | None,
    start: Tensor,
    end: Tensor,
    transitions: Tensor,
    num_samples: int = 1,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Tag sequences drawn from the CRF's distribution: forward sums, then tags from the last to the first.

    Args:
        num_samples: how many of each sequence, K, independent of each other.
        generator: of random numbers, on the emissions' device. None: torch's.
        The others, and errors, as `pyseqnet.functional.crf_log_likelihood`.

    Returns:
        ``(K, B, T)`` int64; -1 where the mask is off, and everywhere in a sequence that has no distribution (all tags
        forbidden, NaN).

    Paper: Frühwirth-Schnatter, Data augmentation and dynamic linear models, 1994.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be positive, got {num_samples}")
    lengths, e, start, end, transitions = _read(emissions, mask, start, end, transitions)
    batch, steps, _ = e.shape
    alphas = [start + e[:, 0]]
    for step in range(1, steps):
        arrived = (alphas[-1][:, :, None] + transitions).logsumexp(1) + e[:, step]
        alphas.append(torch.where((step < lengths)[:, None], arrived, alphas[-1]))
    into = transitions.t().contiguous()
    tags = torch.full((num_samples, batch, steps), -1, dtype=torch.int64, device=e.device)
    after = torch.zeros((num_samples, batch), dtype=torch.int64, device=e.device)
    for step in reversed(range(steps)):
        later = torch.where((lengths - 1 == step)[:, None], end, into[after])
        weights = (alphas[step] + later).softmax(2)
        # The largest of weight / exponential noise is a tag drawn by weight.
        drawn = (weights / torch.empty_like(weights).exponential_(generator=generator)).argmax(2)
        after = torch.where(step < lengths, drawn, after)
        tags[:, :, step] = torch.where(step < lengths, drawn, -1)
    total = (alphas[-1] + end).amax(1)
    possible = (total > _NEVER / 2) & total.isfinite()
    return tags.masked_fill(~possible[:, None], -1)
