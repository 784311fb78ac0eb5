"""Linear attention over a sequence spread over ranks: what crosses between them are states, of one size whatever the
length.

A state is the sum of what keys leave, so that the state before a rank's first position is the sum of the states of the
ranks before it. Sun et al., Linear attention sequence parallelism, 2024; with one all-gather instead of a ring.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyseqnet import functional as F
from pyseqnet.functional.linear_attention import FeatureMap, State


class _SumOfOthers(torch.autograd.Function):
    """Each rank's sum over the others' tensors: over the earlier ones only, where it is `causal`."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, causal: bool, group: Any) -> Tensor:
        ctx.causal, ctx.group = causal, group
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        return _sum_of(mine, [r for r in range(size) if (r < rank if causal else r != rank)], group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Whoever summed this rank's tensor sends its gradient: the later ones.
        rank, size = dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
        readers = [r for r in range(size) if (r > rank if ctx.causal else r != rank)]
        return _sum_of(grads[0], readers, ctx.group), None, None


def _sum_of(mine: Tensor, ranks: list[int], group: Any) -> Tensor:
    """The sum of the tensors of some ranks. All ranks must call it."""
    mine = mine.contiguous()
    everybody = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everybody, mine, group=group)
    total = torch.zeros_like(mine)
    for rank in ranks:  # in the order of ranks, so that results are equal from run to run
        total += everybody[rank]
    return total


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    feature_map: FeatureMap = "elu",
    causal: bool = False,
    normalize: bool | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`pyseqnet.functional.linear_attention` of a sequence of which every rank holds a slice.

    Equivalent to::

        parts = [all_gather(t) for t in (query, key, value)]      # each rank's slices, joined along positions
        out = functional.linear_attention(*parts, causal=causal, ...)
        out = out.split(lengths, dim=2)[rank]

    but only states ``(B, H, D, E + 1)`` are exchanged, once forward and once backward, whatever the length.

    Args:
        query: ``(B, H, L, D)``, this rank's positions; ranks may have slices of different lengths, also empty ones.
        key: ``(B, H, S, D)``.
        value: ``(B, H, S, E)``.
        group: the ranks that share the sequence, in its order; None: all.
        feature_map: as in `pyseqnet.functional.linear_attention`, but not ``"softmax"``. A callable must not depend on
            the other positions.
        causal: a query sees the keys of earlier ranks, and of its own rank those up to its position; needs L == S.
        normalize, scale, eps: as there.
        key_lengths: ``(B,)``: how many keys of this rank's slice take part.

    Returns:
        ``(B, H, L, E)``, this rank's positions.

    Raises:
        ValueError: ``feature_map="softmax"``, which normalises over all positions, and what the function raises.
        RuntimeError: no process group is there.

    Every rank of the group must call it, and run backward through it. Differentiable once.
    """
    if feature_map == "softmax":
        raise ValueError(
            "distributed.linear_attention: feature_map='softmax' normalises each key feature over all positions, which "
            "no rank holds"
        )
    if not dist.is_initialized():
        raise RuntimeError("distributed.linear_attention: torch.distributed.init_process_group has not been called")
    options: dict[str, Any] = {"feature_map": feature_map, "normalize": normalize, "scale": scale, "eps": eps}
    options["key_lengths"] = key_lengths
    # No query: all that the keys leave.
    _, (state, normalizer) = F.linear_attention(query[:, :, :0], key, value, return_state=True, **options)
    packed = torch.cat([state, normalizer.unsqueeze(-1)], -1)
    others: Tensor = _SumOfOthers.apply(packed, causal, group)
    start: State = (others[..., :-1], others[..., -1])
    result: Tensor = F.linear_attention(query, key, value, causal=causal, initial_state=start, **options)
    return result
