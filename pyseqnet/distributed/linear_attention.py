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
from pyseqnet.functional._linear_attention_call import read_decay
from pyseqnet.functional.linear_attention import FeatureMap, State


class _FromOthers(torch.autograd.Function):
    """What the tensors of other ranks add up to here: of the earlier ranks, of the later ones, or of both.

    `fades[r]` is what a tensor keeps of itself on its way past rank r, or None: all. Linear in the tensor, so that
    backward is the same in the other direction, and as differentiable.
    """

    @staticmethod
    def forward(ctx: Any, mine: Tensor, fades: Tensor | None, earlier: bool, later: bool, group: Any) -> Tensor:
        ctx.options = (fades, later, earlier, group)
        mine = mine.contiguous()
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        everybody = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(everybody, mine, group=group)
        total = torch.zeros_like(mine)
        # From far to near, in the order of ranks, so that results are equal from run to run.
        for other in (*range(rank * earlier), *reversed(range(rank + 1, size if later else 0))):
            total = (total if fades is None else total * fades[other]) + everybody[other]
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _FromOthers.apply(grads[0], *ctx.options), None, None, None, None


def _leaving(key: Tensor, value: Tensor, decay: Tensor | None, counts: Tensor, options: dict[str, Any]) -> Tensor:
    """All that this rank's keys leave at its end: the state and, as its last column, the normaliser."""
    if decay is not None:  # once the rank's last key has come; in the dtype of the sums, which a product would round to
        positions = torch.arange(key.shape[2], device=key.device)
        age = (counts[:, None] - 1 - positions).clamp(min=0)[:, None, :, None]
        wide = torch.float64 if key.dtype == torch.float64 else torch.float32
        kept = (decay[:, None, None] ** age).to(wide)
        value = torch.cat([value.to(wide), torch.ones_like(value[..., :1], dtype=wide)], -1) * kept
        key = key.to(wide)
    # No query: all that the keys leave.
    _, (state, normalizer) = F.linear_attention(key[:, :, :0], key, value, return_state=True, **options)
    return state if decay is not None else torch.cat([state, normalizer.unsqueeze(-1)], -1)


def _fades(decay: Tensor, counts: Tensor, group: Any) -> Tensor:
    """(ranks, B, H, 1, 1): what a state keeps of itself past the keys of each rank."""
    everybody = [torch.empty_like(counts) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everybody, counts.contiguous(), group=group)
    return (decay ** torch.stack(everybody).unsqueeze(-1))[..., None, None]


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    feature_map: FeatureMap = "elu",
    causal: bool = False,
    normalize: bool | None = None,
    decay: Any = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
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
        normalize, decay, scale, eps: as there; the same on every rank. ``decay`` gets no gradient here.
        key_lengths: ``(B,)``: how many keys of this rank's slice take part. With ``decay`` nothing fades beyond them.
        cu_seqlens: refused: sequences packed one behind the other need no exchange where each rank has whole ones.

    Returns:
        ``(B, H, L, E)``, this rank's positions.

    Raises:
        ValueError: ``feature_map="softmax"``, which normalises over all positions; ``cu_seqlens``; and what the
            function raises.
        RuntimeError: no process group is there.

    Every rank of the group must call it, and run backward through it, each time. Differentiable twice.
    """
    if feature_map == "softmax":
        raise ValueError(
            "distributed.linear_attention: feature_map='softmax' normalises each key feature over all positions, which "
            "no rank holds"
        )
    if cu_seqlens is not None:
        raise ValueError(
            "distributed.linear_attention: cu_seqlens is not supported: give each rank whole sequences and call "
            "functional.linear_attention there, or pad them and say key_lengths"
        )
    if decay is not None and not causal:
        raise ValueError("distributed.linear_attention: decay needs causal=True: it fades what came earlier")
    if isinstance(decay, Tensor) and decay.requires_grad:
        raise ValueError("distributed.linear_attention: decay is a constant across ranks: pass decay.detach()")
    if not dist.is_initialized():
        raise RuntimeError("distributed.linear_attention: torch.distributed.init_process_group has not been called")
    options: dict[str, Any] = {"feature_map": feature_map, "normalize": normalize, "scale": scale, "eps": eps}
    options["key_lengths"] = key_lengths
    fades = faded = None
    counts = key.new_full(key.shape[:1], key.shape[2], dtype=torch.int64) if key_lengths is None else key_lengths.long()
    if decay is not None:
        faded = read_decay(decay, query, query.shape[1])
        fades = _fades(faded, counts, group)
    mine = _leaving(key, value, faded, counts, options)
    fades = None if fades is None else fades.to(mine.dtype)
    others: Tensor = _FromOthers.apply(mine, fades, True, not causal, group)
    start: State = (others[..., :-1], others[..., -1])
    result: Tensor = F.linear_attention(query, key, value, causal=causal, decay=decay, initial_state=start, **options)
    return result
