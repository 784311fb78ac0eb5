"""Monotonic attention: alignments that never step back.

Raffel, Luong, Liu, Weiss, Eck: Online and linear-time attention by enforcing monotonic alignments, 2017.
Chiu, Raffel: Monotonic chunkwise attention, 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _shifted(x: Tensor, by: int) -> Tensor:
    """x[..., j - by], 0 in front."""
    return torch.nn.functional.pad(x, (by, 0))[..., : x.shape[-1]]


def _check(name: str, x: Tensor) -> None:
    if x.dim() < 2:
        raise ValueError(f"{name} must be (..., I, J), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating-point, got {x.dtype}")


def monotonic_alignment(p: Tensor) -> Tensor:
    """Where a decoder that moves only forward is expected to look.

    For each output i it walks from the place j it last took, and takes each place with probability ``p[i, j]``::

        alpha[i, j] = p[i, j] * sum over k <= j of alpha[i - 1, k] * prod over k <= l < j of (1 - p[i, l])

    with all of ``alpha[-1]`` at place 0. Rows sum to less than 1 where it walks off the end.

    Args:
        p: ``(..., I, J)`` probabilities of stopping; 0 for places that do not exist.

    Returns:
        ``(..., I, J)``. Differentiable.

    The sum is q[j] = (1 - p[j-1]) q[j-1] + alpha[i-1, j], found for all j in log2(J) steps by composing pairs, then
    fours, ...: no division and no difference, unlike the usual quotient of cumulative products.

    Paper: Raffel et al., Online and linear-time attention by enforcing monotonic alignments, 2017.
    """
    _check("p", p)
    outputs, places = p.shape[-2:]
    if outputs == 0 or places == 0:
        return torch.zeros_like(p)
    spans = [_shifted(1 - p, 1)]  # spans[k][j]: probability of passing all of the 2^k places before j
    while 2 ** len(spans) < places:
        spans.append(spans[-1] * _shifted(spans[-1], 2 ** (len(spans) - 1)))
    previous = torch.zeros_like(p[..., 0, :])
    previous[..., 0] = 1
    rows = []
    for i in range(outputs):
        arriving = previous
        for k, span in enumerate(spans):
            arriving = arriving + span[..., i, :] * _shifted(arriving, 2**k)
        previous = p[..., i, :] * arriving
        rows.append(previous)
    return torch.stack(rows, -2)


@torch.no_grad()
def hard_monotonic_alignment(p: Tensor) -> Tensor:
    """What is done at test time: each output takes the first place, from the last one taken on, with ``p >= 0.5``.

    Args as `monotonic_alignment`. Returns ``(..., I, J)`` of 0 and 1; a row is all 0, as are those after it, where no
    place is left to take. Equal to `monotonic_alignment` where every p is 0 or 1.
    """
    _check("p", p)
    outputs, places = p.shape[-2:]
    found = torch.zeros_like(p)
    place = torch.arange(places, device=p.device)
    at = torch.zeros(p.shape[:-2], dtype=torch.int64, device=p.device)
    for i in range(outputs):
        may = (p[..., i, :] >= 0.5) & (place >= at[..., None])
        at = torch.where(may, place, places).amin(-1) if places else at
        found[..., i, :] = (place == at[..., None]).to(p.dtype)
    return found


def chunkwise_alignment(alignment: Tensor, energies: Tensor, chunk: int | None) -> Tensor:
    """Soft attention over a chunk of places that ends where a monotonic alignment looks (MoChA).

    Equivalent to::

        for each place k: weights = energies[i, k - chunk + 1 : k + 1].softmax(-1)   # from place 0 on
        result[i, j] = sum over k of alignment[i, k] * (j's share of k's weights)

    Args:
        alignment: ``(..., I, J)``, expected or hard.
        energies: ``(..., I, J)`` of the soft attention; finite, or -inf for places that do not exist.
        chunk: how many places; None: all from the first on (infinite lookback).

    Returns:
        ``(..., I, J)``, rows with the sums of the alignment's. Each chunk has its own maximum: no share underflows.

    Paper: Chiu and Raffel, Monotonic chunkwise attention, 2018.
    """
    _check("alignment", alignment)
    if alignment.shape != energies.shape:
        raise ValueError(f"energies must have the alignment's shape {tuple(alignment.shape)}: {tuple(energies.shape)}")
    places = alignment.shape[-1]
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be positive, got {chunk}")
    width = places if chunk is None else min(chunk, places)
    if width == 0:
        return torch.zeros_like(alignment)
    low = torch.finfo(energies.dtype).min
    padded = torch.nn.functional.pad(energies.clamp(min=low), (width - 1, 0), value=low)
    # (..., I, k, w): the chunk that ends at k, whose element w is place k - width + 1 + w
    shares = padded.unfold(-1, width, 1).softmax(-1) * alignment[..., None]
    # Place j is element w of the chunk that ends at k = j + width - 1 - w.
    later = torch.nn.functional.pad(shares, (0, 0, 0, width - 1))
    ends = torch.arange(places, device=energies.device)[:, None] + torch.arange(width, device=energies.device)
    elements = (width - 1) - torch.arange(width, device=energies.device)
    return later[..., ends, elements].sum(-1)
