"""Attention patterns as data: which keys each query sees, for ``scaled_dot_product_attention(..., pattern=...)``.

Patterns combine with ``&`` and ``|``, and ``per_head([...])`` gives every query head its own::

    from pyseqnet.masks import Causal, Global, Local, Strided, per_head

    longformer = Local(256) | Global(2)
    sparse_transformer = Causal() & (Local(128) | Strided(128))
    mixed = per_head([Local(16), Local(64), Strided(8, window=512), Causal()])

What a pattern hides costs no time: it is compiled, once a shape and device, into lists of the tiles of 64 queries x 64
keys that hold something (kernels/attention/attention_blocks.h). For the structured patterns nothing of the size L x S
exists at any time. `to_dense` gives the same as the bool mask that torch takes (True takes part).

Where there are more keys than queries, ``align`` says where query 0 stands: at key 0 ("top_left", as torch), or so that
the last query stands at the last key ("bottom_right", as in decoding with a cache).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyseqnet._pattern import KEPT_A_PATTERN, Pattern, alignment, bool_tensor, digest, integer, keep, per_head
from pyseqnet._pattern_tiles import BLOCK

__all__ = ["Blocks", "Causal", "Dense", "Edges", "Global", "Local", "Pattern", "RandomBlocks", "Strided", "per_head"]


# --- by distance ----------------------------------------------------------------------------------------------------


class _ByDistance(Pattern):
    """What depends on how far the key stands from the query only."""

    align: str

    @property
    def depends_on_surplus(self) -> bool:  # type: ignore[override]
        return self.align == "bottom_right"

    def _offset(self, length: int, keys: int) -> int:
        return keys - length if self.align == "bottom_right" else 0

    @abstractmethod
    def _at(self, distance: Tensor) -> Tensor:
        """Whether a key at j - i = distance is seen."""

    @abstractmethod
    def _range(self, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
        """Whether some distance from least to most is seen, and whether all are."""

    def _visible(self, i: Tensor, j: Tensor, length: int, keys: int) -> Tensor:
        return self._at(j - i - self._offset(length, keys))

    def _classify(
        self, i: tuple[Tensor, Tensor], j: tuple[Tensor, Tensor], length: int, keys: int
    ) -> tuple[Tensor, Tensor]:
        offset = self._offset(length, keys)
        return self._range(j[0] - i[1] - offset, j[1] - i[0] - offset)

    def _signature(self, i0: Tensor, j0: Tensor, length: int, keys: int) -> Tensor:
        return (j0 - i0).unsqueeze(1)


class Causal(_ByDistance):
    """Query ``i`` sees keys ``j <= i``."""

    def __init__(self, align: str = "top_left") -> None:
        self.align = alignment(align)
        self._seal()

    def _arguments(self) -> tuple[Any, ...]:
        return (self.align,)

    def _at(self, distance: Tensor) -> Tensor:
        return distance <= 0

    def _range(self, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
        return least <= 0, most <= 0


class Local(_ByDistance):
    """A sliding window: query ``i`` sees keys ``i - left <= j <= i + right``; ``right=None``: as far as to the left.

    Truncated self-attention. Longformer's window of 512 is ``Local(256)``; flash-attention's ``window_size=(l, r)`` is
    ``Local(l, r, align="bottom_right")``.
    """

    def __init__(self, left: int, right: int | None = None, align: str = "top_left") -> None:
        self.left = integer("left", left, 0)
        self.right = self.left if right is None else integer("right", right, 0)
        self.align = alignment(align)
        self._seal()

    def _arguments(self) -> tuple[Any, ...]:
        return self.left, self.right, self.align

    def _at(self, distance: Tensor) -> Tensor:
        return (distance >= -self.left) & (distance <= self.right)

    def _range(self, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
        some = (most >= -self.left) & (least <= self.right)
        return some, (least >= -self.left) & (most <= self.right)


class Strided(_ByDistance):
    """Every ``stride``-th key to both sides: ``(i - j) % stride == 0``, and ``|i - j| <= window`` if given.

    The dilated window of Longformer; with ``Local`` and ``Causal`` the strided head of Sparse Transformers.
    """

    def __init__(self, stride: int, window: int | None = None, align: str = "top_left") -> None:
        self.stride = integer("stride", stride, 1)
        self.window = None if window is None else integer("window", window, 0)
        self.align = alignment(align)
        self._seal()

    def _arguments(self) -> tuple[Any, ...]:
        return self.stride, self.window, self.align

    def _at(self, distance: Tensor) -> Tensor:
        seen = distance % self.stride == 0
        return seen if self.window is None else seen & (distance.abs() <= self.window)

    def _range(self, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
        inside = torch.ones((), dtype=torch.bool)
        if self.window is not None:
            inside = (least >= -self.window) & (most <= self.window)
            least, most = least.clamp(min=-self.window), most.clamp(max=self.window)
        some = (most.div(self.stride, rounding_mode="floor") * self.stride >= least) & (most >= least)
        return some, some & inside & (self.stride == 1)


# --- by position ----------------------------------------------------------------------------------------------------


class Global(Pattern):
    """Global tokens: they see every key, and every query sees them. An integer means that many first ones, a sequence
    the positions it names. (Longformer, ETC, BigBird.)"""

    def __init__(self, tokens: int | Sequence[int]) -> None:
        if isinstance(tokens, (list, tuple)):
            self.tokens: int | tuple[int, ...] = tuple(sorted({integer("tokens", t, 0) for t in tokens}))
            self._positions = torch.tensor(self.tokens, dtype=torch.int64)
        else:
            self.tokens = integer("tokens", tokens, 0)
            self._positions = torch.arange(self.tokens)
        self._seal()

    def _arguments(self) -> tuple[Any, ...]:
        return (self.tokens,)

    def _is_token(self, at: Tensor) -> Tensor:
        return at < self.tokens if isinstance(self.tokens, int) else torch.isin(at, self._positions)

    def _visible(self, i: Tensor, j: Tensor, length: int, keys: int) -> Tensor:
        return self._is_token(i) | self._is_token(j)

    def _tokens_between(self, first: Tensor, last: Tensor) -> Tensor:
        first, last = first.contiguous(), last.contiguous()
        return torch.searchsorted(self._positions, last, right=True) - torch.searchsorted(self._positions, first)

    def _classify(
        self, i: tuple[Tensor, Tensor], j: tuple[Tensor, Tensor], length: int, keys: int
    ) -> tuple[Tensor, Tensor]:
        rows, columns = self._tokens_between(*i), self._tokens_between(*j)
        return (rows > 0) | (columns > 0), (rows == i[1] - i[0] + 1) | (columns == j[1] - j[0] + 1)

    def _signature(self, i0: Tensor, j0: Tensor, length: int, keys: int) -> Tensor:
        def of(first: Tensor) -> Tensor:  # which positions of a tile are tokens: its number, or -1 for none
            return torch.where(self._tokens_between(first, first + BLOCK - 1) > 0, first, -1)

        return torch.stack([of(i0), of(j0)], 1)


class Blocks(Pattern):
    """Blocks of ``block`` x ``block`` pairs: query ``i`` sees key ``j`` where ``layout[i // block, j // block]``.

    layout: bool ``(rows, columns)``, or ``(H, rows, columns)`` with a layout for each query head. (BigBird, Sparse
    Transformers' block-sparse kernels.)
    """

    _small = False

    def __init__(self, layout: Tensor, block: int) -> None:
        self.layout = bool_tensor("layout", layout, "(rows, columns) or (heads, rows, columns)")
        self.block = integer("block", block, 1)
        self.heads = self.layout.shape[0] if self.layout.dim() == 3 else None
        sums = torch.zeros(self.layout.shape[-2] + 1, self.layout.shape[-1] + 1, dtype=torch.int64)
        if self.heads is None:
            sums[1:, 1:] = self.layout.long().cumsum(0).cumsum(1)
        self._sums = sums
        self._seal()

    def _arguments(self) -> tuple[Any, ...]:
        return digest(self.layout), tuple(self.layout.shape), self.block

    def __repr__(self) -> str:
        return f"Blocks(layout={tuple(self.layout.shape)}, block={self.block})"

    def _of_head(self, head: int) -> Pattern:
        return self if self.heads is None else Blocks(self.layout[head], self.block)

    def _check(self, length: int, keys: int) -> None:
        rows, columns = self.layout.shape[-2:]
        if length > rows * self.block or keys > columns * self.block:
            raise ValueError(
                f"layout of {rows} x {columns} blocks of {self.block} does not reach {length} queries and {keys} keys"
            )

    def _visible(self, i: Tensor, j: Tensor, length: int, keys: int) -> Tensor:
        rows, columns = self.layout.shape
        return self.layout[(i // self.block).clamp(max=rows - 1), (j // self.block).clamp(max=columns - 1)]

    def _classify(
        self, i: tuple[Tensor, Tensor], j: tuple[Tensor, Tensor], length: int, keys: int
    ) -> tuple[Tensor, Tensor]:
        top, bottom = i[0] // self.block, i[1] // self.block + 1
        left, right = j[0] // self.block, j[1] // self.block + 1
        s = self._sums
        count = s[bottom, right] - s[top, right] - s[bottom, left] + s[top, left]
        return count > 0, count == (bottom - top) * (right - left)


class RandomBlocks(Pattern):
    """Each row of blocks sees ``count`` blocks of keys, drawn at random. (BigBird, with ``Local`` and ``Global``.)

    ``seed`` and the number of blocks decide the draw, the same on every machine and device. Where there are no more
    than ``count`` blocks of keys, all are seen. Blocks of 64, or multiples, cost nothing beyond their pairs.
    """

    def __init__(self, count: int, block: int = BLOCK, seed: int = 0) -> None:
        self.count = integer("count", count, 0)
        self.block = integer("block", block, 1)
        self.seed = integer("seed", seed, 0)
        self._drawn: dict[tuple[int, int], Blocks] = {}
        self._seal()

    def _arguments(self) -> tuple[Any, ...]:
        return self.count, self.block, self.seed

    def _blocks(self, length: int, keys: int) -> Blocks:
        rows, columns = -(-length // self.block), -(-keys // self.block)
        found = self._drawn.get((rows, columns))
        if found is None:
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.rand(rows, columns, generator=generator, dtype=torch.float64).argsort(dim=1, stable=True)
            layout = torch.zeros(rows, columns, dtype=torch.bool)
            layout.scatter_(1, order[:, : self.count], True)
            found = Blocks(layout, self.block)
            keep(self._drawn, (rows, columns), found, KEPT_A_PATTERN)
        return found

    def _visible(self, i: Tensor, j: Tensor, length: int, keys: int) -> Tensor:
        return self._blocks(length, keys)._visible(i, j, length, keys)

    def _classify(
        self, i: tuple[Tensor, Tensor], j: tuple[Tensor, Tensor], length: int, keys: int
    ) -> tuple[Tensor, Tensor]:
        return self._blocks(length, keys)._classify(i, j, length, keys)


class Dense(Pattern):
    """Any bool mask ``(L, S)``, or ``(H, L, S)`` with one for each query head: True takes part."""

    _small = False

    def __init__(self, mask: Tensor) -> None:
        self.mask = bool_tensor("mask", mask, "(L, S) or (heads, L, S)")
        self.heads = self.mask.shape[0] if self.mask.dim() == 3 else None
        self._seal()

    def _arguments(self) -> tuple[Any, ...]:
        return digest(self.mask), tuple(self.mask.shape)

    def __repr__(self) -> str:
        return f"Dense(mask={tuple(self.mask.shape)})"

    def _of_head(self, head: int) -> Pattern:
        return self if self.heads is None else Dense(self.mask[head])

    def _check(self, length: int, keys: int) -> None:
        if tuple(self.mask.shape[-2:]) != (length, keys):
            raise ValueError(
                f"mask is for {self.mask.shape[-2]} queries and {self.mask.shape[-1]} keys, not {length} and {keys}"
            )

    def _visible(self, i: Tensor, j: Tensor, length: int, keys: int) -> Tensor:
        return self.mask[i.clamp(max=max(length - 1, 0)), j.clamp(max=max(keys - 1, 0))]

    def _classify(
        self, i: tuple[Tensor, Tensor], j: tuple[Tensor, Tensor], length: int, keys: int
    ) -> tuple[Tensor, Tensor]:
        rows = self.mask[i[0].min() : i[1].max() + 1]
        padded = torch.nn.functional.pad(rows, (0, -keys % BLOCK, 0, -rows.shape[0] % BLOCK))
        some = padded.view(-1, BLOCK, padded.shape[1] // BLOCK, BLOCK).any(3).any(1)
        return some, torch.zeros((), dtype=torch.bool)


class Edges(Pattern):
    """A graph: query ``i`` sees key ``j`` where there is an edge from ``j`` to ``i``.

    Args:
        edge_index: int64 ``(2, E)``: row 0 the key (source), row 1 the query (target). Repeated edges count once.
        num_nodes: number of keys and queries, or the pair ``(keys, queries)``.
    """

    _small = False

    def __init__(self, edge_index: Tensor, num_nodes: int | tuple[int, int]) -> None:
        if not isinstance(edge_index, Tensor):
            raise TypeError(f"edge_index must be a tensor, got {type(edge_index).__name__}")
        if edge_index.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"edge_index must be int64 or int32, got {edge_index.dtype}")
        if edge_index.dim() != 2 or edge_index.shape[0] != 2:
            raise ValueError(f"edge_index must have shape (2, edges), got {tuple(edge_index.shape)}")
        both = num_nodes if isinstance(num_nodes, tuple) else (num_nodes, num_nodes)
        if len(both) != 2:
            raise ValueError(f"num_nodes must be a number or (keys, queries), got {num_nodes}")
        self.num_keys, self.num_queries = (integer("num_nodes", n, 0) for n in both)
        edges = edge_index.detach().to("cpu", torch.int64)
        for row, bound in zip(edges, (self.num_keys, self.num_queries), strict=True):
            if row.numel() and (int(row.min()) < 0 or int(row.max()) >= bound):
                raise ValueError(f"edge_index names nodes outside 0 .. {bound - 1}")
        # Sorted by tile, then by pair, without repetition.
        key, query = edges
        columns = -(-self.num_keys // BLOCK)
        tile = query // BLOCK * columns + key // BLOCK
        self._edges = torch.unique((tile * BLOCK + query % BLOCK) * BLOCK + key % BLOCK)
        self._tiles = self._edges // BLOCK**2
        self._seal()

    def _arguments(self) -> tuple[Any, ...]:
        return digest(self._edges), self._edges.numel(), self.num_keys, self.num_queries

    def __repr__(self) -> str:
        return f"Edges({self._edges.numel()} edges, num_nodes=({self.num_keys}, {self.num_queries}))"

    def _check(self, length: int, keys: int) -> None:
        if (keys, length) != (self.num_keys, self.num_queries):
            raise ValueError(
                f"edge_index is for {self.num_keys} keys and {self.num_queries} queries, not {keys} and {length}"
            )

    def _tile(self, i: Tensor, j: Tensor) -> Tensor:
        return i // BLOCK * -(-self.num_keys // BLOCK) + j // BLOCK

    def _visible(self, i: Tensor, j: Tensor, length: int, keys: int) -> Tensor:
        if not self._edges.numel():
            return torch.zeros_like(i + j, dtype=torch.bool)
        pair = (self._tile(i, j) * BLOCK + i % BLOCK) * BLOCK + j % BLOCK
        at = torch.searchsorted(self._edges, pair).clamp(max=self._edges.numel() - 1)
        return (self._edges[at] == pair) & (i < length) & (j < keys)

    def _classify(
        self, i: tuple[Tensor, Tensor], j: tuple[Tensor, Tensor], length: int, keys: int
    ) -> tuple[Tensor, Tensor]:
        tile = self._tile(i[0], j[0])
        some = torch.searchsorted(self._tiles, tile, right=True) > torch.searchsorted(self._tiles, tile)
        return some, torch.zeros((), dtype=torch.bool)
