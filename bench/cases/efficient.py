"""Efficient attention against the length, 256 to 16384: dense, local, linear, Linformer, Performer and LSH.

Beside each the same mechanism in plain torch. The lectures count (d + d') N^2 multiplications for dense attention and
2 d d' N for linear: they are equal at N = 2 d d' / (d + d'), 32 here. Dense attention ends where a run takes minutes.
Rows hold the peak of memory as well, and `python -m bench plot` draws both against the length.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as torch_F
from torch import Tensor

import pyseqnet.functional as F
from bench.case import Case, Cost, Inputs, Tolerance
from pyseqnet.masks import Local
from pyseqnet.nn import PositiveRandomFeatures, ReformerAttention
from pyseqnet.nn.efficient.reformer import SELF_SCORE, hash_vectors

HEADS, D = 4, 32
LENGTHS = (256, 1024, 4096, 16384)
MOST_DENSE = 4096
WINDOW, REDUCED, FEATURES, BUCKET, ROUNDS = 64, 128, 128, 64, 2
EPS = 1e-6


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch_F.scaled_dot_product_attention(query, key, value)


def local_in_blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Blocks of the window's size, each against itself and its two neighbours: linear in the length."""
    n = query.shape[2]
    blocks = query.unflatten(2, (-1, WINDOW))
    near = [torch_F.pad(t, (0, 0, WINDOW, WINDOW)).unfold(2, 3 * WINDOW, WINDOW).transpose(3, 4) for t in (key, value)]
    i = torch.arange(n, device=query.device).view(-1, WINDOW, 1)
    j = (
        torch.arange(3 * WINDOW, device=query.device)
        + (torch.arange(n // WINDOW, device=query.device) - 1).view(-1, 1, 1) * WINDOW
    )
    mask = ((i - j).abs() <= WINDOW) & (j >= 0) & (j < n)
    return torch_F.scaled_dot_product_attention(blocks, *near, mask).flatten(2, 3)


def linear(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return linear_of(torch_F.elu(query) + 1, torch_F.elu(key) + 1, value)


def linear_of(q: Tensor, k: Tensor, value: Tensor) -> Tensor:
    return q @ (k.transpose(2, 3) @ value) / (q @ k.sum(2).unsqueeze(3) + EPS)


def linformer(query: Tensor, key: Tensor, value: Tensor, reduce: Tensor) -> Tensor:
    return torch_F.scaled_dot_product_attention(query, reduce @ key, reduce @ value)


def our_linformer(query: Tensor, key: Tensor, value: Tensor, reduce: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, reduce @ key, reduce @ value)


def performer(query: Tensor, key: Tensor, value: Tensor, projection: Tensor) -> Tensor:
    phi = PositiveRandomFeatures(projection)
    return linear_of(phi(query), phi(key), value)


def our_performer(query: Tensor, key: Tensor, value: Tensor, projection: Tensor) -> Tensor:
    return F.linear_attention(query, key, value, feature_map=PositiveRandomFeatures(projection))


LSH = ReformerAttention(HEADS * D, HEADS, bucket_size=BUCKET, n_hashes=ROUNDS).eval()


def our_lsh(query: Tensor, value: Tensor) -> Tensor:
    return LSH._attend((query, value), None, False)


def lsh(query: Tensor, value: Tensor) -> Tensor:
    """Sorted chunks in plain torch; a pair that both rounds meet is counted once."""
    n = query.shape[2]
    buckets = hash_vectors(query.detach(), LSH.rotations[:, :, : -(-n // (2 * BUCKET))])
    order = buckets.argsort(dim=3, stable=True)
    place = order.argsort(3)
    token = order.unflatten(3, (-1, BUCKET))
    other = torch.cat([torch_F.pad(token[:, :, :, :-1], (0, 0, 1, 0), value=-1), token], 4)
    met = torch.zeros(*token.shape, 2 * BUCKET, dtype=torch.int64, device=query.device)
    seen = None
    for r in range(ROUNDS):

        def of(table: Tensor, at: Tensor) -> Tensor:
            return table.gather(2, at.clamp(min=0).flatten(2)).view_as(at)

        chunk = place[:, :, r] // BUCKET
        step = of(chunk, token).unsqueeze(5) - of(chunk, other).unsqueeze(4)
        same = of(buckets[:, :, r], token).unsqueeze(5) == of(buckets[:, :, r], other).unsqueeze(4)
        now = same & ((step == 0) | (step == 1)) & (other >= 0).unsqueeze(4)
        met += now
        own = now[:, :, r : r + 1]
        seen = own if seen is None else torch.cat([seen, own], 2)
    bias = torch.where(seen, -met.clamp(min=1).to(query.dtype).log(), -math.inf)
    bias = bias + SELF_SCORE * (token.unsqueeze(5) == other.unsqueeze(4))

    def rows(t: Tensor, at: Tensor) -> Tensor:
        index = at.clamp(min=0).flatten(2).unsqueeze(3).expand(-1, -1, -1, t.shape[3])
        return t.gather(2, index).unflatten(2, at.shape[2:])

    scores = rows(query, token) @ rows(torch_F.normalize(query, dim=3), other).transpose(4, 5) / math.sqrt(D) + bias
    out = (scores.softmax(5) @ rows(value, other)).flatten(3, 4)
    share = scores.logsumexp(5).flatten(3, 4).gather(3, place).softmax(2).unsqueeze(4)
    return (out.gather(3, place.unsqueeze(4).expand_as(out)) * share).sum(2)


def case(name: str, n: int, pairs: float, ours: Callable[..., Tensor], theirs: Callable[..., Tensor]) -> Case:
    """`pairs`: products of a query and a key (or what stands for one) that each position costs."""
    shape = (1, HEADS, n, D)
    names = ("query", "value") if name == "lsh" else ("query", "key", "value")

    def make(generator: torch.Generator) -> Inputs:
        inputs = {name: torch.randn(shape, generator=generator) for name in names}
        if name == "linformer":
            inputs["reduce"] = torch.randn(REDUCED, n, generator=generator) * REDUCED**-0.5
        if name == "performer":
            inputs["projection"] = torch.randn(FEATURES, D, generator=generator)
        return inputs

    product = 2.0 * HEADS * n * pairs * D
    elements = (len(names) + 1) * HEADS * n * D
    return Case(
        family="efficient",
        name=f"{name}_{n}",
        shapes=f"H{HEADS} N{n} D{D}",
        make=make,
        ours=ours,
        torch=theirs,
        forward=Cost(2 * product, elements),
        backward=Cost(5 * product, 2 * elements),
        gradients=names,
        tolerance=lambda dtype: Tolerance(ulps=32.0),
        devices=("cpu",) if name == "lsh" else ("cpu", "cuda"),  # its rotations lie on the CPU
        memory=True,
    )


CASES = [
    one
    for n in LENGTHS
    for one in (
        *([case("dense", n, n, F.scaled_dot_product_attention, dense)] if n <= MOST_DENSE else []),
        case(
            "local",
            n,
            min(2 * WINDOW + 1, n),
            lambda query, key, value: F.scaled_dot_product_attention(query, key, value, pattern=Local(WINDOW)),
            local_in_blocks,
        ),
        case("linear", n, D, F.linear_attention, linear),
        case("linformer", n, 2 * REDUCED, our_linformer, linformer),
        case("performer", n, 2 * FEATURES, our_performer, performer),
        case("lsh", n, ROUNDS * 2 * BUCKET, our_lsh, lsh),
    )
]
