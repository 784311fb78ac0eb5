"""Sliding-window attention over a sequence spread over ranks: each asks its neighbours for the keys its window reaches
into (a halo), and nothing else crosses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyseqnet import functional as F
from pyseqnet.masks import Local


def _reach(distance: int, size: int, hop: int) -> int:
    """How many positions of the rank `hop` ranks away a window of `distance` reaches, ranks holding `size` each."""
    return max(0, min(size, distance - (hop - 1) * size))


def _exchange(outgoing: dict[int, Tensor], incoming: dict[int, Tensor], group: Any) -> None:
    """Send to some ranks of the group and receive from some, all at once."""

    def peer(rank: int) -> int:
        return rank if group is None else dist.get_global_rank(group, rank)

    steps = [dist.P2POp(dist.isend, t.contiguous(), peer(rank), group) for rank, t in outgoing.items()]
    steps += [dist.P2POp(dist.irecv, t, peer(rank), group) for rank, t in incoming.items()]
    for work in dist.batch_isend_irecv(steps) if steps else []:
        work.wait()


class _Halo(torch.autograd.Function):
    """(N, size, W) to (N, left + size + right, W): the neighbours' positions before and behind, less at the ends."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, left: int, right: int, group: Any) -> Tensor:
        ctx.left, ctx.right, ctx.group, ctx.size = left, right, group, mine.shape[1]
        sends, receives = _Halo.shares(left, right, mine.shape[1], group)
        outgoing = {rank: mine[:, part] for rank, part in sends.items()}
        incoming = {
            rank: mine.new_empty((mine.shape[0], count, mine.shape[2])) for rank, count in sorted(receives.items())
        }
        _exchange(outgoing, incoming, group)
        rank = dist.get_rank(group)
        before = [t for r, t in incoming.items() if r < rank]
        behind = [t for r, t in incoming.items() if r > rank]
        return torch.cat([*before, mine, *behind], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """What was received sends its gradient back, and is added where it came from."""
        (grad,) = grads
        sends, receives = _Halo.shares(ctx.left, ctx.right, ctx.size, ctx.group)
        rank = dist.get_rank(ctx.group)
        ranks = sorted([*receives, rank])
        parts = dict(zip(ranks, grad.split([receives.get(r, ctx.size) for r in ranks], 1), strict=True))
        total = parts.pop(rank).clone()
        incoming = {
            r: grad.new_empty((grad.shape[0], part.stop - part.start, grad.shape[2])) for r, part in sends.items()
        }
        _exchange(parts, incoming, ctx.group)
        for r in sorted(incoming):
            total[:, sends[r]] += incoming[r]
        return total, None, None, None

    @staticmethod
    def shares(left: int, right: int, size: int, group: Any) -> tuple[dict[int, slice], dict[int, int]]:
        """Which of this rank's positions go to which rank, and how many come from which."""
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        sends: dict[int, slice] = {}
        receives: dict[int, int] = {}
        for other in range(ranks):
            hop = abs(other - rank)
            if hop == 0:
                continue
            # A window's left side reaches into earlier ranks, so that this rank's end goes to later ones.
            to, back = (left, right) if other > rank else (right, left)
            given, taken = _reach(to, size, hop), _reach(back, size, hop)
            if given:
                sends[other] = slice(size - given, size) if other > rank else slice(0, given)
            if taken:
                receives[other] = taken
        return sends, receives


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    left: int,
    right: int | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention with the window ``masks.Local(left, right)`` over a sequence of which every rank holds a slice.

    Equivalent to::

        parts = [all_gather(t) for t in (query, key, value)]      # each rank's slices, joined along positions
        out = functional.scaled_dot_product_attention(*parts, pattern=Local(left, right), ...)
        out = out.chunk(world_size, dim=2)[rank]

    but only the ``left + right`` keys and values that a slice's windows reach into cross between neighbours, whatever
    the length; a window longer than a slice reaches into several ranks.

    Args:
        query: ``(B, H, L, D)``, this rank's positions; as many on each rank.
        key: ``(B, H', L, D)``.
        value: ``(B, H', L, E)``.
        left: how many earlier keys a query sees, beside its own position.
        right: how many later ones; None: ``left``; 0 is causal.
        group: the ranks that share the sequence, in its order; None: all.
        dropout_p, scale, enable_gqa, softcap: as in `pyseqnet.functional.scaled_dot_product_attention`. Dropout draws
            from each rank's own generator.

    Returns:
        ``(B, H, L, E)``, this rank's positions.

    Raises:
        ValueError: key and query of different lengths, a negative window, and what the function raises.
        RuntimeError: no process group is there.

    Every rank of the group must call it, and run backward through it. Differentiable once.
    """
    window = Local(left, right)
    if query.shape[-2] != key.shape[-2] or key.shape[-2] != value.shape[-2]:
        raise ValueError(
            "distributed.local_attention: query, key and value must hold the same positions, got "
            f"{query.shape[-2]}, {key.shape[-2]} and {value.shape[-2]}"
        )
    if not dist.is_initialized():
        raise RuntimeError("distributed.local_attention: torch.distributed.init_process_group has not been called")
    batch, heads, size, width = key.shape
    both = torch.cat([key, value.to(key.dtype)], -1).flatten(0, 1)
    wide = _Halo.apply(both, window.left, window.right, group).unflatten(0, (batch, heads))
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    behind = min(window.right, (ranks - 1 - rank) * size)  # keys that came from later ranks
    # The last query stands `behind` keys before the last key.
    pattern = Local(window.left + behind, window.right - behind, align="bottom_right")
    result: Tensor = F.scaled_dot_product_attention(
        query, wide[..., :width], wide[..., width:], dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa,
        pattern=pattern, softcap=softcap,
    )  # fmt: skip
    return result
