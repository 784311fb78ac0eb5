"""Softmax attention: causal, dense, padded, masked, patterns, cross-attention, grouped heads and decoding."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as torch_F
from torch import Tensor

import pyseqnet.functional as F
from bench.case import Case, Cost, Inputs, Rival, Tolerance
from pyseqnet import masks


def attention(
    name: str,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    width: int,
    *,
    key_heads: int | None = None,
    causal: bool = False,
    mask: str = "",
    lengths: bool = False,
    heads_inside: bool = False,
    pattern: masks.Pattern | None = None,
    dtypes: tuple[str, ...] = ("f32",),
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> Case:
    kv_heads = heads if key_heads is None else key_heads
    options: dict[str, Any] = {"is_causal": causal, "enable_gqa": kv_heads != heads}
    generator = torch.Generator().manual_seed(1)
    # Masks and lengths decide how many pairs there are to compute, so they belong to the case, not to a seed.
    length = torch.randint(keys // 4, keys + 1, (batch,), generator=generator) if lengths else None
    visible = torch.rand(queries, keys, generator=generator) > 0.3 if mask == "bool" else None
    rows = torch.ones(queries, keys, dtype=torch.bool)
    rows = rows.tril() if causal else rows
    rows = rows & visible if visible is not None else rows
    rows = pattern.to_dense(queries, keys) if pattern is not None else rows
    pairs = rows.sum().item() * batch * heads
    if length is not None:
        pairs = queries * int(length.sum().item()) * heads

    def make(generator: torch.Generator) -> Inputs:
        def one(h: int, n: int) -> Tensor:
            if heads_inside:  # (B, N, H, D) seen as (B, H, N, D), as multi-head layers have it
                return torch.randn(batch, n, h, width, generator=generator).transpose(1, 2)
            return torch.randn(batch, h, n, width, generator=generator)

        inputs = {"query": one(heads, queries), "key": one(kv_heads, keys), "value": one(kv_heads, keys)}
        if mask in ("additive", "learned"):
            inputs["attn_mask"] = torch.randn(heads, queries, keys, generator=generator)
        return inputs

    @functools.cache
    def fixed(device: torch.device, as_mask: bool) -> dict[str, Tensor]:
        if visible is not None:
            return {"attn_mask": visible.to(device)}
        if pattern is not None:
            return {"attn_mask": rows.to(device)} if as_mask else {"pattern": pattern}
        if length is None:
            return {}
        padding = (torch.arange(keys) < length[:, None])[:, None, None, :]
        return {"attn_mask": padding.to(device)} if as_mask else {"key_lengths": length.to(device)}

    def ours(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        given: dict[str, Any] = fixed(query.device, False) or {"attn_mask": attn_mask}
        return F.scaled_dot_product_attention(query, key, value, **given, **options)

    def theirs(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        given: dict[str, Any] = fixed(query.device, True) or {"attn_mask": attn_mask}
        return torch_F.scaled_dot_product_attention(query, key, value, **given, **options)

    q_count, kv_count = batch * heads * queries * width, 2 * batch * kv_heads * keys * width
    mask_count = heads * queries * keys if mask in ("additive", "learned") else 0
    words = f"B{batch} H{heads}" + (f"/{kv_heads}" if kv_heads != heads else "") + f" L{queries} S{keys} D{width}"
    words += (" causal" if causal else "") + (f" {mask} mask" if mask else "") + (" key lengths" if lengths else "")
    words += f" {pattern!r}" if pattern is not None else ""
    words += ", heads inside" if heads_inside else ""
    user = None if mask or lengths or causal else Rival("matmul and softmax", _by_hand(options))
    if pattern is not None:
        blocked = isinstance(pattern, masks.Local) and pattern.left == pattern.right and keys % pattern.left == 0
        user = Rival("blocks of three windows", functools.partial(_blocked, pattern.left)) if blocked else None
    return Case(
        family="attention",
        name=name,
        shapes=words,
        make=make,
        ours=ours,
        torch=theirs,
        # products only, of visible pairs only; backward computes the logits again
        forward=Cost(4.0 * width * pairs, 2 * q_count + kv_count + mask_count),
        backward=Cost(10.0 * width * pairs, 4 * q_count + 2 * kv_count + mask_count),
        gradients=("query", "key", "value") + (("attn_mask",) if mask == "learned" else ()),
        tolerance=lambda dtype: Tolerance(),
        user=user,
        dtypes=dtypes,
        devices=devices,
    )


def _by_hand(options: dict[str, Any]) -> Any:
    """What is often written by hand."""

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if options["enable_gqa"]:
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        weights = torch.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, dim=-1)
        return weights @ value

    return function


def _blocked(window: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A window to both sides in blocks as wide, as Longformer's chunks and local-attention have it: each block of
    queries meets its own keys and those of its two neighbours."""
    b, h, length, width = query.shape
    blocks = length // window

    def neighbours(t: Tensor) -> Tensor:
        padded = torch_F.pad(t, (0, 0, window, window))
        return padded.unfold(2, 3 * window, window).transpose(-1, -2).reshape(b, h * blocks, 3 * window, width)

    distance = torch.arange(3 * window) - window - torch.arange(window).unsqueeze(1)
    exists = torch.ones(blocks, 1, 3 * window, dtype=torch.bool)
    exists[0, :, :window] = exists[-1, :, 2 * window :] = False
    visible = ((distance.abs() <= window) & exists).repeat(h, 1, 1).to(query.device)
    out = torch_F.scaled_dot_product_attention(
        query.reshape(b, h * blocks, window, width), neighbours(key), neighbours(value), visible
    )
    return out.reshape(b, h, length, width)


BOTH = ("f32", "bf16")


def _random_layout(blocks: int) -> Tensor:
    """A fifth of all blocks and the diagonal."""
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(blocks, blocks, generator=generator) < 0.2) | torch.eye(blocks, dtype=torch.bool)


CASES = [
    attention("causal_2048", 1, 8, 2048, 2048, 64, causal=True, dtypes=BOTH),
    attention("dense_512", 4, 8, 512, 512, 64, dtypes=BOTH),
    attention("lengths_64", 32, 4, 64, 64, 32, lengths=True, heads_inside=True, dtypes=BOTH),
    attention("short_64", 32, 4, 64, 64, 32, heads_inside=True),
    attention("short_16", 32, 4, 16, 16, 32, heads_inside=True),
    attention("bool_mask_512", 4, 8, 512, 512, 64, mask="bool"),
    attention("additive_mask_512", 4, 8, 512, 512, 64, mask="additive"),
    attention("learned_mask_256", 4, 8, 256, 256, 64, mask="learned"),
    attention("cross_32_128", 16, 8, 32, 128, 64, heads_inside=True, dtypes=BOTH),
    attention("grouped_512", 2, 8, 512, 512, 64, key_heads=2, causal=True),
    attention("one_head_2048", 1, 1, 2048, 2048, 64, causal=True),
    attention("wide_512", 2, 4, 512, 512, 128),
    attention("decode_1024", 1, 8, 1, 1024, 64, dtypes=BOTH),
    attention("decode_4096", 1, 8, 1, 4096, 64, dtypes=BOTH),
    attention("decode_1024_batch", 16, 8, 1, 1024, 64),
    attention("decode_1024_grouped", 4, 16, 1, 1024, 64, key_heads=2),
    attention("lengths_512", 16, 8, 512, 512, 64, lengths=True),
    attention("local_1024", 1, 8, 1024, 1024, 64, pattern=masks.Local(64)),
    attention("local_2048", 1, 8, 2048, 2048, 64, pattern=masks.Local(64)),
    attention("local_8192", 1, 8, 8192, 8192, 64, pattern=masks.Local(64)),
    attention(
        "strided_local_global_4096",
        1,
        8,
        4096,
        4096,
        64,
        pattern=masks.Strided(8, 64) | masks.Local(64) | masks.Global(2),
    ),
    attention("blocks_2048", 1, 8, 2048, 2048, 64, pattern=masks.Blocks(_random_layout(32), 64)),
    # a GPU's sizes
    attention("gpu_causal_4096", 4, 16, 4096, 4096, 64, causal=True, dtypes=("bf16",), devices=("cuda",)),
]
