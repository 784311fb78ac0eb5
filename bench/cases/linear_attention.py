"""Linear attention: causal in chunks, over all keys, and a decoder's step."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as torch_F
from torch import Tensor

import pyseqnet.functional as F
from bench.case import Case, Cost, Inputs, Rival, Tolerance

EPS = 1e-6
CHUNK = 64  # of our kernels, and the fastest of 32, 64 and 128 for the formulation in torch


def _features(x: Tensor) -> Tensor:
    return torch_F.elu(x) + 1


def causal_in_chunks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The fastest formulation in plain torch: a masked matrix inside chunks, a running sum of states between them."""
    b, h, n, _ = query.shape
    q, k, v = (x.view(b, h, n // CHUNK, CHUNK, -1) for x in (_features(query), _features(key), value))
    state = k.transpose(3, 4) @ v
    state = state.cumsum(2) - state
    z = k.sum(3, keepdim=True)
    z = z.cumsum(2) - z
    scores = (q @ k.transpose(3, 4)).tril()
    sums = scores.sum(-1, keepdim=True) + (q * z).sum(-1, keepdim=True) + EPS
    return ((scores @ v + q @ state) / sums).view(b, h, n, -1)


def causal_masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What is written first: the whole matrix of scores."""
    scores = (_features(query) @ _features(key).transpose(2, 3)).tril()
    return scores @ value / (scores.sum(-1, keepdim=True) + EPS)


def retention_in_chunks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Retention's chunkwise form (Sun et al., 2023): powers of the decay inside chunks, a loop over states between."""
    b, h, n, _ = query.shape
    q, k, v = (x.view(b, h, n // CHUNK, CHUNK, -1) for x in (query, key, value))
    g, at = _decays(h)[:, None, None, None], torch.arange(CHUNK, dtype=torch.float32)
    within = (g ** (at[:, None] - at).clamp(min=0)).tril()
    sums = (k * g ** (CHUNK - 1 - at)[:, None]).transpose(3, 4) @ v
    states, state = [], torch.zeros_like(sums[:, :, 0])
    for part in sums.unbind(2):
        states.append(state)
        state = state * g[:, 0] ** CHUNK + part
    out = (q @ k.transpose(3, 4) * within) @ v + q * g ** (at + 1)[:, None] @ torch.stack(states, 2)
    return out.view(b, h, n, -1)


def _decays(heads: int) -> Tensor:
    """Those of RetNet: 1 - 2^-5, 1 - 2^-6, ..."""
    return 1 - 2.0 ** -torch.arange(5, 5 + heads)


def over_all_keys(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k = _features(query), _features(key)
    return q @ (k.transpose(2, 3) @ value) / (q @ k.sum(2).unsqueeze(3) + EPS)


def causal_softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch_F.scaled_dot_product_attention(query, key, value, is_causal=True)


def attention(
    name: str,
    shape: tuple[int, int, int, int],
    *,
    causal: bool,
    user: Rival | None = None,
    dtypes: tuple[str, ...] = ("f32",),
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> Case:
    b, h, n, d = shape

    def make(generator: torch.Generator) -> Inputs:
        return {name: torch.randn(shape, generator=generator) for name in ("query", "key", "value")}

    # Multiply-adds of the products: those with the state, and causal the triangular ones of a chunk, counted whole.
    with_state, in_chunk = 2.0 * b * h * n * d * d, 2.0 * b * h * n * d * CHUNK
    forward = 2 * with_state + (2 * in_chunk if causal else 0)
    backward = 4 * with_state + (5 * in_chunk if causal else 0)
    elements = math.prod(shape)
    # Causal training writes and reads a state of d*d + d floats for every chunk.
    states = b * h * (n // CHUNK) * (d * d + d) * 4 if causal else 0
    return Case(
        family="linear_attention",
        name=name,
        shapes=f"B{b} H{h} N{n} D{d}" + (", causal" if causal else ""),
        make=make,
        ours=lambda query, key, value: F.linear_attention(query, key, value, causal=causal),
        torch=causal_in_chunks if causal else over_all_keys,
        forward=Cost(forward, 4 * elements),
        backward=Cost(backward, 8 * elements, 2 * states),
        gradients=("query", "key", "value"),
        tolerance=lambda dtype: Tolerance(),
        user=user,
        dtypes=dtypes,
        devices=devices,
    )


def step(name: str, batch: int, heads: int, d: int) -> Case:
    """One token of a decoder: the state is read, updated and written."""

    def make(generator: torch.Generator) -> Inputs:
        rows = {name: torch.randn((batch, heads, d), generator=generator) for name in ("query", "key", "value")}
        state = torch.rand((batch, heads, d, d), generator=generator)
        return {**rows, "state": state, "normalizer": torch.rand((batch, heads, d), generator=generator) + 1}

    def ours(query: Tensor, key: Tensor, value: Tensor, state: Tensor, normalizer: Tensor) -> Tensor:
        out, _ = F.linear_attention_step(query, key, value, (state, normalizer))
        return out

    def theirs(query: Tensor, key: Tensor, value: Tensor, state: Tensor, normalizer: Tensor) -> Tensor:
        q, k = _features(query), _features(key)
        last = torch.addcmul(state, k.unsqueeze(3), value.unsqueeze(2))
        z = normalizer + k
        q = q.unsqueeze(2)
        return (q @ last / (q @ z.unsqueeze(3) + EPS)).squeeze(2)

    elements = batch * heads * d * d
    return Case(
        family="linear_attention",
        name=name,
        shapes=f"B{batch} H{heads} D{d}, one token",
        make=make,
        ours=ours,
        torch=theirs,
        forward=Cost(4.0 * elements, 2 * elements),
        backward=Cost(8.0 * elements, elements),
        gradients=("query", "key", "value"),
        tolerance=lambda dtype: Tolerance(),
        dtypes=("f32",),
    )


def retention(name: str, shape: tuple[int, int, int, int]) -> Case:
    """Causal, with decay, not normalised."""
    decay = _decays(shape[1]).double()

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.linear_attention(query, key, value, causal=True, decay=decay, feature_map="identity", normalize=False)

    case = attention(name, shape, causal=True, devices=("cpu",))
    return replace(case, shapes=case.shapes + ", decay", ours=ours, torch=retention_in_chunks)


def packed(name: str, lengths: tuple[int, ...], heads: int, d: int) -> Case:
    """Sequences one behind the other, beside the same padded to the longest."""
    total, longest = sum(lengths), max(lengths)
    starts = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
    inside = torch.arange(longest) < torch.tensor(lengths)[:, None]

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.linear_attention(query, key, value, causal=True, cu_seqlens=starts)

    def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        def padded(x: Tensor) -> Tensor:
            return x.new_zeros(len(lengths), longest, heads, d).index_put((inside,), x).transpose(1, 2)

        return causal_in_chunks(padded(query), padded(key), padded(value)).transpose(1, 2)[inside]

    def make(generator: torch.Generator) -> Inputs:
        return {name: torch.randn((total, heads, d), generator=generator) for name in ("query", "key", "value")}

    product, elements = 2.0 * total * heads * d * CHUNK, total * heads * d
    return Case(
        family="linear_attention",
        name=name,
        shapes=f"{len(lengths)} sequences, {total} positions, H{heads} D{d}, causal",
        make=make,
        ours=ours,
        torch=theirs,
        forward=Cost(4 * product, 4 * elements),
        backward=Cost(9 * product, 8 * elements, 2 * (total // CHUNK) * heads * (d * d + d) * 4),
        gradients=("query", "key", "value"),
        tolerance=lambda dtype: Tolerance(),
        dtypes=("f32",),
        devices=("cpu",),
    )


CASES = [
    attention("causal_2048", (1, 8, 2048, 64), causal=True, dtypes=("f32", "bf16")),
    attention("causal_2048_masked", (1, 8, 2048, 64), causal=True, user=Rival("masked matrix", causal_masked)),
    attention("causal_8192", (1, 8, 8192, 64), causal=True, user=Rival("softmax attention", causal_softmax)),
    attention("causal_one_head_4096", (1, 1, 4096, 64), causal=True),
    attention("causal_short_256", (16, 8, 256, 32), causal=True),
    attention("causal_wide_1024", (1, 4, 1024, 128), causal=True),
    attention("all_keys_2048", (1, 8, 2048, 64), causal=False, dtypes=("f32", "bf16")),
    attention("all_keys_8192", (1, 8, 8192, 64), causal=False),
    attention("all_keys_short_128", (16, 8, 128, 32), causal=False),
    retention("retention_2048", (1, 8, 2048, 64)),
    packed("packed_8x256", (64, 1024, 128, 192, 320, 64, 128, 128), 8, 64),
    step("step_1", 1, 8, 64),
    step("step_16", 16, 8, 64),
    # a GPU's size
    attention("causal_4x16x4096", (4, 16, 4096, 64), causal=True, dtypes=("f32", "bf16"), devices=("cuda",)),
]
