"""Softmax attention in plain torch: what the kernels compute, differentiable any number of times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NOT_CAUSAL, TOP_LEFT, BOTTOM_RIGHT = 0, 1, 2
BLOCK = 64  # positions of a pattern's tile (kernels/attention/attention_blocks.h)


class Options(NamedTuple):
    """What is no tensor; the raw operations take them in this order."""

    causal: int
    scale: float
    softcap: float
    dropout_p: float
    max_q: int  # bounds of packed sequences' lengths; 0: their positions
    max_k: int


class Extras(NamedTuple):
    """What comes beside query, key and value; the raw operations take them in this order."""

    mask: Tensor | None = None  # bool, four-dimensional, as bias is
    bias: Tensor | None = None
    slopes: Tensor | None = None
    key_lengths: Tensor | None = None
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    pattern: Sequence[Tensor] = ()
    seed: Tensor | None = None


class _Places(NamedTuple):
    """Where pairs of queries and keys stand. Of packed sequences rows and columns are all positions."""

    i: Tensor  # (L, 1) positions in their sequence, j (1, S)
    j: Tensor
    sequence: Tensor | None  # (L, 1) of the query, if packed
    together: Tensor | None  # (L, S) same sequence, if packed
    surplus: Tensor | int  # keys minus queries, of the row's sequence


def _places(length: int, keys: int, extras: Extras, device: torch.device) -> _Places:
    i, j = torch.arange(length, device=device).unsqueeze(1), torch.arange(keys, device=device).unsqueeze(0)
    if extras.cu_q is None or extras.cu_k is None:
        return _Places(i, j, None, None, keys - length)
    cu_q, cu_k = extras.cu_q.long(), extras.cu_k.long()
    q_sequence = torch.searchsorted(cu_q, i, right=True) - 1
    k_sequence = torch.searchsorted(cu_k, j, right=True) - 1
    surplus = (cu_k.diff() - cu_q.diff())[q_sequence]
    return _Places(i - cu_q[q_sequence], j - cu_k[k_sequence], q_sequence, q_sequence == k_sequence, surplus)


def dense_pattern(pattern: Sequence[Tensor], length: int, keys: int) -> Tensor:
    """A compiled pattern as the bool mask (1 or H, L, S)."""
    row_begin, row_entries, *_, bits = pattern
    rows, columns = -(-length // BLOCK), -(-keys // BLOCK)
    heads = (row_begin.numel() - 1) // rows if rows else 1
    counts = row_begin.diff().long()
    row = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    words = torch.cat([bits.reshape(-1, BLOCK), torch.full((1, BLOCK), -1, device=bits.device)])
    tiles = words[row_entries.reshape(-1, 2)[:, 1].long()]  # -1, full: the last
    dense = torch.zeros(heads * rows, columns, BLOCK, BLOCK, dtype=torch.bool, device=bits.device)
    dense[row, row_entries.reshape(-1, 2)[:, 0].long()] = (
        tiles.unsqueeze(-1) >> torch.arange(BLOCK, device=bits.device) & 1
    ).bool()
    dense = dense.view(heads, rows, columns, BLOCK, BLOCK).transpose(2, 3)
    return dense.reshape(heads, rows * BLOCK, columns * BLOCK)[:, :length, :keys]


def keep_factors(shape: tuple[int, int, int, int], columns: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """The kernels' dropout factors (kernels/common/random.h) in plain torch: 0 or 1 / (1 - p), shape (B, H, L, S);
    columns (1, S): the keys' positions."""

    def signed(constant: int) -> int:
        return constant - 2**64 if constant >= 2**63 else constant

    def shift(x: Tensor, bits: int) -> Tensor:  # logical
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    def mix64(x: Tensor) -> Tensor:  # int64 products wrap
        x = (x ^ shift(x, 30)) * signed(0xBF58476D1CE4E5B9)
        x = (x ^ shift(x, 27)) * signed(0x94D049BB133111EB)
        return x ^ shift(x, 31)

    low = 0xFFFFFFFF
    golden = signed(0x9E3779B97F4A7C15)
    b, h, length, _ = shape
    rows = torch.arange(b * h * length, device=seed.device)
    row_key = mix64(mix64(seed + golden) + golden * (rows + 1)).unsqueeze(1)
    x = (columns + row_key) & low
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & low
    x = (((x ^ (x >> 15)) ^ shift(row_key, 32)) * 0x735A2D97) & low
    x = ((x ^ (x >> 15)) * 0x21F0AAAD) & low
    x = x ^ (x >> 16)
    threshold = min(int(dropout_p * 2**32 + 0.5), low)
    return (x >= threshold).reshape(shape).to(torch.float64) / (1 - dropout_p)


def _of_pairs(mask: Tensor, places: _Places) -> Tensor:
    """A mask or bias (B or 1, H or 1, L or 1, S or 1) as one that broadcasts over the pairs."""
    if places.sequence is None:
        return mask
    b, _, length, keys = mask.shape
    at = (
        places.sequence if b > 1 else torch.zeros_like(places.sequence),
        places.i if length > 1 else torch.zeros_like(places.i),
        places.j.clamp(max=keys - 1) if keys > 1 else torch.zeros_like(places.j),
    )
    return mask[at[0], :, at[1], at[2]].permute(2, 0, 1).unsqueeze(0)


def _visible(shape: tuple[int, int, int, int], extras: Extras, options: Options, places: _Places) -> Tensor:
    b, h, length, keys = shape
    i, j = places.i, places.j
    visible = torch.ones(b, h, length, keys, dtype=torch.bool, device=i.device)
    if places.together is not None:
        visible = visible & places.together
    if options.causal:
        visible = visible & (j <= i + (0 if options.causal == TOP_LEFT else places.surplus))
    if extras.key_lengths is not None:
        visible = visible & (j < extras.key_lengths.view(b, 1, 1, 1))
    if extras.pattern:
        packed = places.sequence is not None
        sizes = (options.max_q, options.max_k) if packed else (length, keys)
        dense = dense_pattern(extras.pattern, *sizes)
        visible = visible & (dense[:, i, j.clamp(max=max(sizes[1] - 1, 0))] if packed else dense)
    if extras.mask is not None:
        visible = visible & _of_pairs(extras.mask, places)
    if extras.bias is not None:
        visible = visible & (_of_pairs(extras.bias, places) != -math.inf)
    return visible


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, extras: Extras, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, weights, lse) as the raw operations give them."""
    b, h, length, _ = query.shape
    keys = key.shape[2]
    if key.shape[1] != h:
        key, value = (t.repeat_interleave(h // t.shape[1], dim=1) for t in (key, value))
    places = _places(length, keys, extras, query.device)
    visible = _visible((b, h, length, keys), extras, options, places)
    row_sees, key_seen = visible.any(-1, keepdim=True), visible.any(-2).unsqueeze(-1)
    # What takes no part must not meet a product: 0 * NaN is NaN.
    query = torch.where(row_sees, query, 0.0)
    key, value = torch.where(key_seen, key, 0.0), torch.where(key_seen, value, 0.0)

    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    logits = (query.to(wide) * options.scale) @ key.to(wide).transpose(-1, -2)
    if options.softcap > 0:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    if extras.slopes is not None:
        shift = 0 if options.causal == TOP_LEFT else places.surplus
        slopes = extras.slopes.view(-1, h, 1, 1)
        if places.sequence is not None and slopes.shape[0] > 1:
            slopes = slopes[places.sequence.squeeze(1), :, 0, 0].t().view(1, h, length, 1)
        logits = logits - slopes * (places.i + shift - places.j).abs()
    if extras.bias is not None:
        bias = torch.where(extras.bias == -math.inf, 0.0, extras.bias)
        logits = logits + torch.where(visible, _of_pairs(bias, places), 0.0)
    logits = torch.where(visible, logits, -math.inf)
    logits = torch.where(row_sees, logits, 0.0)
    weights = torch.where(row_sees, torch.softmax(logits, -1), 0.0)
    lse = torch.where(row_sees.squeeze(-1), torch.logsumexp(logits, -1), -math.inf)
    if options.dropout_p > 0:
        assert extras.seed is not None
        weights = weights * keep_factors((b, h, length, keys), places.j, extras.seed, options.dropout_p).to(wide)
    out = weights @ value.to(wide)
    if places.sequence is not None:
        weights = _unpacked_weights(weights[0], extras, options)
    return out.to(query.dtype), weights.to(query.dtype), lse


def _unpacked_weights(weights: Tensor, extras: Extras, options: Options) -> Tensor:
    """(H, all queries, all keys) as (B, H, max_q, max_k), zero beyond each sequence's end."""
    assert extras.cu_q is not None
    assert extras.cu_k is not None

    def positions(cu: Tensor, bound: int, total: int) -> tuple[Tensor, Tensor]:
        offset = torch.arange(bound, device=cu.device)
        return (cu[:-1, None] + offset).clamp(max=max(total - 1, 0)).long(), offset < cu.diff()[:, None]

    rows, row_exists = positions(extras.cu_q, options.max_q, weights.shape[1])
    columns, column_exists = positions(extras.cu_k, options.max_k, weights.shape[2])
    if weights.numel() == 0:
        return weights.new_zeros(rows.shape[0], weights.shape[0], options.max_q, options.max_k)
    found = weights[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1)
    return torch.where((row_exists[:, :, None] & column_exists[:, None, :])[:, None], found, 0.0)
