"""From an attention pattern to the tile lists of kernels/attention/attention_blocks.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

BLOCK = 64  # queries, and keys, of a tile
_FULL = -1
_GRID_AT_ONCE = 1 << 22  # tiles that are classified at once: a few 10 MB
_TILES_AT_ONCE = 512  # tiles whose pairs are looked at at once: 2 M pairs
_MOST_ENTRIES = 2**31 - 1


class TilePattern(Protocol):
    """What `pyseqnet.masks.Pattern` tells about tiles."""

    def _classify(
        self, i: tuple[Tensor, Tensor], j: tuple[Tensor, Tensor], length: int, keys: int
    ) -> tuple[Tensor, Tensor]: ...
    def _bits(self, i0: Tensor, j0: Tensor, length: int, keys: int) -> Tensor: ...
    def _signature(self, i0: Tensor, j0: Tensor, length: int, keys: int) -> Tensor | None: ...


def compiled_tiles(patterns: Sequence[TilePattern], length: int, keys: int) -> tuple[Tensor, ...]:
    """row_begin, row_entries, column_begin, column_entries, row_order, column_order, bits for one pattern a head."""
    rows, columns = -(-length // BLOCK), -(-keys // BLOCK)
    seen: dict[TilePattern, tuple[Tensor, Tensor, Tensor]] = {}
    row_parts, column_parts, kind_parts, heads = [], [], [], []
    pool: list[Tensor] = []
    size = 0
    for head, pattern in enumerate(patterns):
        if pattern not in seen:
            row, column, kind, words = _tiles_of(pattern, length, keys)
            seen[pattern] = row, column, torch.where(kind == _FULL, kind, kind + size)
            pool.append(words)
            size += words.shape[0]
        row, column, kind = seen[pattern]
        row_parts.append(row)
        column_parts.append(column)
        kind_parts.append(kind)
        heads.append(torch.full_like(row, head))
    row, column, kind, head_of = (torch.cat(parts) for parts in (row_parts, column_parts, kind_parts, heads))
    if row.numel() > _MOST_ENTRIES:
        raise ValueError(f"pattern has {row.numel()} tiles that are not empty; at most {_MOST_ENTRIES} can be listed")
    words = torch.cat(pool)
    if len(seen) > 1:
        words, renamed = _unique_tiles(words)
        kind = torch.where(kind == _FULL, kind, renamed[kind.clamp(min=0)] if renamed.numel() else kind)
    by_row = _lists(head_of * rows + row, column, kind, len(patterns) * rows)
    by_column = _lists(head_of * columns + column, row, kind, len(patterns) * columns)
    orders = tuple(torch.argsort(begin.diff(), descending=True, stable=True).int() for begin, _ in (by_row, by_column))
    return *by_row, *by_column, *orders, words


def _lists(owner: Tensor, other: Tensor, kind: Tensor, owners: int) -> tuple[Tensor, Tensor]:
    """begin (owners + 1) and entries (n, 2), ascending in `other`."""
    order = torch.argsort(owner * (int(other.max()) + 1 if other.numel() else 1) + other)
    begin = torch.zeros(owners + 1, dtype=torch.int64)
    begin[1:] = torch.bincount(owner, minlength=owners).cumsum(0) if owners else 0
    return begin.int(), torch.stack([other[order], kind[order]], 1).int().contiguous()


def _tiles_of(pattern: TilePattern, length: int, keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, column and kind of the tiles that are not empty, and the bit tiles (pool, 64) that kinds >= 0 name."""
    rows, columns = -(-length // BLOCK), -(-keys // BLOCK)
    full: list[Tensor] = []
    doubtful: list[Tensor] = []
    step = max(_GRID_AT_ONCE // max(columns, 1), 1)
    j0 = torch.arange(columns).unsqueeze(0) * BLOCK
    for first in range(0, rows if columns else 0, step):
        i0 = torch.arange(first, min(first + step, rows)).unsqueeze(1) * BLOCK
        i1, j1 = (i0 + BLOCK - 1).clamp(max=length - 1), (j0 + BLOCK - 1).clamp(max=keys - 1)
        some, every = pattern._classify((i0, i1), (j0, j1), length, keys)
        some, every = (t.expand(i0.shape[0], columns) for t in (some, every))
        offset = torch.tensor([[first, 0]])
        full.append(every.nonzero() + offset)
        doubtful.append((some & ~every).nonzero() + offset)
    at, tried = (torch.cat(t) if t else torch.zeros(0, 2, dtype=torch.int64) for t in (full, doubtful))
    words, kind = _looked_at(pattern, tried, length, keys)
    kept = kind != _EMPTY
    place = torch.cat([at, tried[kept]])
    kinds = torch.cat([torch.full((at.shape[0],), _FULL), kind[kept]])
    return place[:, 0], place[:, 1], kinds, words


_EMPTY = -2


def _looked_at(pattern: TilePattern, tiles: Tensor, length: int, keys: int) -> tuple[Tensor, Tensor]:
    """Bit tiles, and what each of the tiles (n, 2) is: full, empty or the number of a bit tile."""
    if not tiles.numel():
        return torch.zeros(0, BLOCK, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    i0, j0 = tiles.T * BLOCK
    # The last row and column of tiles may be cut off.
    extent = torch.stack([(length - i0).clamp(max=BLOCK), (keys - j0).clamp(max=BLOCK)], 1)
    same = torch.arange(tiles.shape[0])
    signature = pattern._signature(i0, j0, length, keys)
    if signature is not None:
        distinct, same = torch.unique(torch.cat([signature, extent], 1), dim=0, return_inverse=True)
        first = torch.full((distinct.shape[0],), tiles.shape[0]).scatter_reduce(
            0, same, torch.arange(tiles.shape[0]), "amin"
        )
        i0, j0, extent = i0[first], j0[first], extent[first]
    offset = torch.arange(BLOCK)
    found, count = [], []
    for n in range(0, i0.shape[0], _TILES_AT_ONCE):
        part = slice(n, n + _TILES_AT_ONCE)
        exists = (offset < extent[part, 0, None]).unsqueeze(2) & (offset < extent[part, 1, None]).unsqueeze(1)
        bits = pattern._bits(i0[part], j0[part], length, keys) & exists
        count.append(bits.sum((1, 2)))
        found.append(torch.from_numpy(np.packbits(bits.numpy(), axis=2, bitorder="little").view(np.int64)[..., 0]))
    counts, words = torch.cat(count), torch.cat(found)
    is_full, is_empty = counts == extent.prod(1), counts == 0
    mixed = ~is_full & ~is_empty
    kind = torch.where(is_empty, _EMPTY, _FULL)
    words, renamed = _unique_tiles(words[mixed])
    kind[mixed] = renamed
    return words, kind[same]


def _unique_tiles(words: Tensor) -> tuple[Tensor, Tensor]:
    """Every different tile once, in the order of their first appearance in a sort; and where each one went."""
    if words.shape[0] < 2:
        return words, torch.arange(words.shape[0])
    # Sorting whole tiles is slow: sort hashes, and look whether tiles of one hash are indeed equal.
    generator = torch.Generator().manual_seed(1)
    factors = torch.randint(-(2**62), 2**62, (BLOCK,), generator=generator) * 2 + 1
    hashes = ((words ^ (words >> 29)) * factors).sum(1)
    distinct, renamed = torch.unique(hashes, return_inverse=True)
    first = torch.full((distinct.shape[0],), words.shape[0]).scatter_reduce(
        0, renamed, torch.arange(words.shape[0]), "amin"
    )
    if not torch.equal(words[first][renamed], words):
        return torch.unique(words, dim=0, return_inverse=True)
    return words[first], renamed
