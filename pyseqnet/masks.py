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

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pyseqnet._compilers import constant_result
from pyseqnet._pattern_tiles import BLOCK, compiled_tiles

__all__ = ["Blocks", "Causal", "Dense", "Edges", "Global", "Local", "Pattern", "RandomBlocks", "Strided", "per_head"]

_ALIGNMENTS = ("top_left", "bottom_right")
_KEPT_A_PATTERN, _KEPT_IN_ALL = 8, 32  # compiled shapes


class Pattern(ABC):
    """Which keys each query sees. Patterns are immutable, hashable and equal by what they say."""

    _token: str  # tells patterns apart; an attribute, so that torch.compile can guard on it
    heads: int | None = None  # query heads that have patterns of their own; None: one for all
    depends_on_surplus = False  # whether something is aligned bottom-right
    _small = True  # made of a few numbers, so that equal patterns may share what was compiled

    # --- what a kind of pattern says ---

    @abstractmethod
    def _arguments(self) -> tuple[Any, ...]:
        """What makes two patterns of this class equal."""

    @abstractmethod
    def _visible(self, i: Tensor, j: Tensor, length: int, keys: int) -> Tensor:
        """Whether queries i see keys j (int64, broadcasting). Positions may lie past length and keys."""

    @abstractmethod
    def _classify(
        self, i: tuple[Tensor, Tensor], j: tuple[Tensor, Tensor], length: int, keys: int
    ) -> tuple[Tensor, Tensor]:
        """Of tiles from queries i[0] to i[1] and keys j[0] to j[1], inclusive: which may hold a visible pair, and which
        hold nothing else. Doubtful tiles are looked at pair by pair."""

    def _bits(self, i0: Tensor, j0: Tensor, length: int, keys: int) -> Tensor:
        """The pairs (n, 64, 64) of tiles that begin at i0 and j0 (n)."""
        offset = torch.arange(BLOCK)
        return self._visible(
            i0[:, None, None] + offset[:, None], j0[:, None, None] + offset[None, :], length, keys
        ).expand(i0.shape[0], BLOCK, BLOCK)

    def _signature(self, i0: Tensor, j0: Tensor, length: int, keys: int) -> Tensor | None:
        """Integers (n, any) that agree only for tiles with the same pairs; None: look at every tile."""
        return None

    def _of_head(self, head: int) -> Pattern:
        return self

    def _check(self, length: int, keys: int) -> None:  # noqa: B027 (most patterns fit any extents)
        """Raises where the pattern was made for other extents."""

    # --- what all have ---

    def _seal(self) -> None:
        """The last step of every constructor."""
        words = (a._token if isinstance(a, Pattern) else repr(a) for a in self._arguments())
        self._token = f"{type(self).__name__}({', '.join(words)})"
        self._compiled: dict[str, tuple[Tensor, ...]] = {}

    def __and__(self, other: Pattern) -> Pattern:
        return _And(self, other) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: Pattern) -> Pattern:
        return _Or(self, other) if isinstance(other, Pattern) else NotImplemented

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self._token == other._token

    def __hash__(self) -> int:
        return hash(self._token)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self._arguments()))})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": {}}

    def to_dense(self, L: int, S: int, device: torch.device | str | None = None) -> Tensor:
        """The bool mask ``(L, S)``, of a pattern with heads ``(H, L, S)``: True takes part."""
        length, keys = _extent("L", L), _extent("S", S)
        self._check(length, keys)
        i, j = torch.arange(length).unsqueeze(1), torch.arange(keys).unsqueeze(0)
        if self.heads is None:
            return self._visible(i, j, length, keys).expand(length, keys).contiguous().to(device)
        heads = [self._of_head(h)._visible(i, j, length, keys).expand(length, keys) for h in range(self.heads)]
        return torch.stack(heads).to(device)

    def compile(
        self,
        L: int,
        S: int,
        *,
        heads: int = 1,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, ...]:
        """The tensors of kernels/attention/attention_blocks.h for ``L`` queries and ``S`` keys, on the device:
        row_begin, row_entries, column_begin, column_entries, row_order, column_order, bits. Kept for the next call."""
        # index: under torch.compile lists are made for known extents only.
        return self._compiled[self._prepare(index(L), index(S), index(heads), str(device or "cpu"))]

    # Compilers take its result for a constant, and find the tensors in a dictionary that the pattern holds: so they
    # guard on both, and on the token.
    @constant_result
    def _prepare(self, length: int, keys: int, heads: int, device: str) -> str:
        """Sees to it that a shape is compiled; its name in `_compiled`."""
        if self.heads is not None and self.heads != heads:
            raise ValueError(f"pattern has {self.heads} heads, query {heads}")
        name = f"{int(length)} {int(keys)} {device}"
        equals = (self._token, name)
        found = self._compiled.get(name)
        if found is None and self._small:
            found = _compiled_of_equals.get(equals)
        if found is None:
            self._check(int(length), int(keys))
            patterns = [self] if self.heads is None else [self._of_head(h) for h in range(self.heads)]
            # Real tensors, made of numbers alone, for whoever traces (torch.export) or counts.
            with _disable_current_modes():
                found = tuple(t.to(device) for t in compiled_tiles(patterns, int(length), int(keys)))
        _keep(self._compiled, name, found, _KEPT_A_PATTERN)
        if self._small:
            _keep(_compiled_of_equals, equals, found, _KEPT_IN_ALL)
        return name


_compiled_of_equals: dict[tuple[str, str], tuple[Tensor, ...]] = {}


def _keep(cache: dict[Any, Any], name: Any, value: Any, most: int) -> None:
    cache.pop(name, None)
    cache[name] = value  # the last now
    while len(cache) > most:
        del cache[next(iter(cache))]


# --- checks ---------------------------------------------------------------------------------------------------------


def _extent(name: str, value: Any) -> int:
    return _integer(name, value, 0)


def _integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def _alignment(align: Any) -> str:
    if align not in _ALIGNMENTS:
        raise ValueError(f"align must be 'top_left' or 'bottom_right', got {align!r}")
    return str(align)


def _bool_tensor(name: str, value: Any, what: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a bool tensor, got {type(value).__name__}")
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {value.dtype}")
    if value.dim() not in (2, 3):
        raise ValueError(f"{name} must have shape {what}, got {tuple(value.shape)}")
    return value.detach().to("cpu", copy=True).contiguous()


def _digest(tensor: Tensor) -> str:
    return hashlib.sha1(tensor.numpy().tobytes(), usedforsecurity=False).hexdigest()[:16]


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
        self.align = _alignment(align)
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
        self.left = _integer("left", left, 0)
        self.right = self.left if right is None else _integer("right", right, 0)
        self.align = _alignment(align)
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
        self.stride = _integer("stride", stride, 1)
        self.window = None if window is None else _integer("window", window, 0)
        self.align = _alignment(align)
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
            self.tokens: int | tuple[int, ...] = tuple(sorted({_integer("tokens", t, 0) for t in tokens}))
            self._positions = torch.tensor(self.tokens, dtype=torch.int64)
        else:
            self.tokens = _integer("tokens", tokens, 0)
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
        self.layout = _bool_tensor("layout", layout, "(rows, columns) or (heads, rows, columns)")
        self.block = _integer("block", block, 1)
        self.heads = self.layout.shape[0] if self.layout.dim() == 3 else None
        sums = torch.zeros(self.layout.shape[-2] + 1, self.layout.shape[-1] + 1, dtype=torch.int64)
        if self.heads is None:
            sums[1:, 1:] = self.layout.long().cumsum(0).cumsum(1)
        self._sums = sums
        self._seal()

    def _arguments(self) -> tuple[Any, ...]:
        return _digest(self.layout), tuple(self.layout.shape), self.block

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
        self.count = _integer("count", count, 0)
        self.block = _integer("block", block, 1)
        self.seed = _integer("seed", seed, 0)
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
            _keep(self._drawn, (rows, columns), found, _KEPT_A_PATTERN)
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
        self.mask = _bool_tensor("mask", mask, "(L, S) or (heads, L, S)")
        self.heads = self.mask.shape[0] if self.mask.dim() == 3 else None
        self._seal()

    def _arguments(self) -> tuple[Any, ...]:
        return _digest(self.mask), tuple(self.mask.shape)

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
        self.num_keys, self.num_queries = (_integer("num_nodes", n, 0) for n in both)
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
        return _digest(self._edges), self._edges.numel(), self.num_keys, self.num_queries

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


# --- combinations ---------------------------------------------------------------------------------------------------


class _Pair(Pattern):
    """Two patterns; where both have heads, as many."""

    _sign = ""

    def __init__(self, left: Pattern, right: Pattern) -> None:
        if left.heads is not None and right.heads is not None and left.heads != right.heads:
            raise ValueError(f"patterns of {left.heads} and {right.heads} heads cannot be combined")
        self.left, self.right = left, right
        self.heads = left.heads if left.heads is not None else right.heads
        self._small = left._small and right._small
        self._seal()

    @property
    def depends_on_surplus(self) -> bool:  # type: ignore[override]
        return self.left.depends_on_surplus or self.right.depends_on_surplus

    def _arguments(self) -> tuple[Any, ...]:
        return self.left, self.right

    def __repr__(self) -> str:
        return f"({self.left!r} {self._sign} {self.right!r})"

    @abstractmethod
    def _combine(self, a: Tensor, b: Tensor) -> Tensor: ...

    def _of_head(self, head: int) -> Pattern:
        return type(self)(self.left._of_head(head), self.right._of_head(head))

    def _check(self, length: int, keys: int) -> None:
        self.left._check(length, keys)
        self.right._check(length, keys)

    def _visible(self, i: Tensor, j: Tensor, length: int, keys: int) -> Tensor:
        return self._combine(self.left._visible(i, j, length, keys), self.right._visible(i, j, length, keys))

    def _bits(self, i0: Tensor, j0: Tensor, length: int, keys: int) -> Tensor:
        return self._combine(self.left._bits(i0, j0, length, keys), self.right._bits(i0, j0, length, keys))

    def _classify(
        self, i: tuple[Tensor, Tensor], j: tuple[Tensor, Tensor], length: int, keys: int
    ) -> tuple[Tensor, Tensor]:
        a, b = self.left._classify(i, j, length, keys), self.right._classify(i, j, length, keys)
        return self._combine(a[0], b[0]), self._combine(a[1], b[1])

    def _signature(self, i0: Tensor, j0: Tensor, length: int, keys: int) -> Tensor | None:
        a, b = self.left._signature(i0, j0, length, keys), self.right._signature(i0, j0, length, keys)
        return None if a is None or b is None else torch.cat([a, b], 1)


class _And(_Pair):
    _sign = "&"

    def _combine(self, a: Tensor, b: Tensor) -> Tensor:
        return a & b


class _Or(_Pair):
    _sign = "|"

    def _combine(self, a: Tensor, b: Tensor) -> Tensor:
        return a | b


class _PerHead(Pattern):
    def __init__(self, patterns: tuple[Pattern, ...]) -> None:
        self.patterns = patterns
        self.heads = len(patterns)
        self._small = all(p._small for p in patterns)
        self._seal()

    @property
    def depends_on_surplus(self) -> bool:  # type: ignore[override]
        return any(p.depends_on_surplus for p in self.patterns)

    def _arguments(self) -> tuple[Any, ...]:
        return self.patterns

    def __repr__(self) -> str:
        return f"per_head([{', '.join(map(repr, self.patterns))}])"

    def _of_head(self, head: int) -> Pattern:
        return self.patterns[head]

    def _check(self, length: int, keys: int) -> None:
        for pattern in self.patterns:
            pattern._check(length, keys)

    def _visible(self, i: Tensor, j: Tensor, length: int, keys: int) -> Tensor:
        raise AssertionError("heads are asked one by one")

    def _classify(
        self, i: tuple[Tensor, Tensor], j: tuple[Tensor, Tensor], length: int, keys: int
    ) -> tuple[Tensor, Tensor]:
        raise AssertionError("heads are asked one by one")


def per_head(patterns: Sequence[Pattern]) -> Pattern:
    """A pattern for each query head, in their order."""
    if not isinstance(patterns, (list, tuple)):
        raise TypeError(f"patterns must be a sequence of patterns, got {type(patterns).__name__}")
    if not patterns:
        raise ValueError("patterns must not be empty")
    for n, pattern in enumerate(patterns):
        if not isinstance(pattern, Pattern):
            raise TypeError(f"patterns[{n}] must be a pattern, got {type(pattern).__name__}")
        if pattern.heads is not None:
            raise ValueError(f"patterns[{n}] has heads of its own")
    return _PerHead(tuple(patterns))
