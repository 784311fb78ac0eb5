"""Linear attention in plain torch: its definition, and what double backward differentiates."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from pyseqnet.functional._common import accumulation_dtype
from pyseqnet.functional._linear_attention_call import (
    ELU,
    EXP,
    RELU,
    SOFTMAX,
    Call,
    FeatureMap,
    State,
    padding,
    prepare,
)


def _features(feature_map: int, x: Tensor) -> Tensor:
    if feature_map == ELU:
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    if feature_map == EXP:
        return x.exp()
    return x.relu() if feature_map == RELU else x


def _powers(call: Call) -> tuple[Tensor, Tensor]:
    """What a key weighs with a query, (B or 1, H, L, L), and the first state with it, (B or 1, H, L, 1)."""
    assert call.decay is not None
    length = call.query.shape[2]
    positions = torch.arange(length, device=call.query.device)
    fades = (positions + 1)[None]  # how often the state has faded when a query reads it
    if call.key_lengths is not None:
        fades = torch.minimum(fades, call.key_lengths[:, None])
    distance = fades[:, None, :, None] - 1 - positions
    decay = call.decay[:, None, None]
    pairs = (decay ** distance.clamp(min=0)).masked_fill(distance < 0, 0)
    return pairs, decay ** fades[:, None, :, None]


def plain(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The formula, differentiable any number of times; memory L*S where causal."""
    if call.starts is not None:
        return _plain_packed(call)
    query, key, value, state, normalizer = call.query, call.key, call.value, call.state, call.normalizer
    dtype = accumulation_dtype(query.dtype)
    if call.key_lengths is not None:
        beyond = padding(key, call.key_lengths)
        key, value = key.masked_fill(beyond, 0), value.masked_fill(beyond, 0)
    a, v = query.to(dtype) * call.scale, value.to(dtype)
    if call.feature_map == SOFTMAX:  # over the features of a query; over the keys
        f = key.to(dtype)
        if call.key_lengths is not None:
            f = f.masked_fill(beyond, torch.finfo(dtype).min)  # not -inf: without keys it would be 0/0
        a, f = a.softmax(3), f.softmax(2)
    else:
        a, f = _features(call.feature_map, a), _features(call.feature_map, key.to(dtype))
    if call.key_lengths is not None:
        f = f.masked_fill(beyond, 0)
    counted, begin = f, a
    if call.causal:
        scores = (a @ f.transpose(2, 3)).tril()
        if call.decay is not None:
            pairs, first = (p.to(dtype) for p in _powers(call))
            scores, begin = scores * pairs, a * first
            if key.shape[2]:
                counted = f * pairs[:, :, -1:].transpose(2, 3)
                if state is not None and normalizer is not None:
                    state, normalizer = state * first[:, :, -1:], normalizer * first[:, :, -1]
    last, last_z = counted.transpose(2, 3) @ v, counted.sum(2)
    if state is not None and normalizer is not None:
        last, last_z = last + state, last_z + normalizer
    if call.causal:
        out, total = scores @ v, scores.sum(3, keepdim=True)
        if call.state is not None and call.normalizer is not None:
            out, total = out + begin @ call.state, total + begin @ call.normalizer.unsqueeze(3)
    else:
        out, total = a @ last, a @ last_z.unsqueeze(3)
    if call.normalize:
        total = total + call.eps
        nothing = total == 0
        out = (out / total.masked_fill(nothing, 1)).masked_fill(nothing, 0)
    return out.to(query.dtype), last, last_z


def _plain_packed(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence by sequence."""
    assert call.starts is not None
    starts = call.starts.tolist()
    found = []
    for n, (begin, end) in enumerate(itertools.pairwise(starts)):
        rows = {name: getattr(call, name)[:, :, begin:end] for name in ("query", "key", "value")}
        if call.state is not None and call.normalizer is not None:
            rows |= {"state": call.state[n : n + 1], "normalizer": call.normalizer[n : n + 1]}
        found.append(plain(call._replace(starts=None, **rows)))
    if not found:
        (_, h, _, d), e = call.query.shape, call.value.shape[3]
        dtype = accumulation_dtype(call.query.dtype)
        empty = call.value.sum() * call.query.new_zeros(1, h, 0, e)
        return empty, call.query.new_zeros(0, h, d, e, dtype=dtype), call.query.new_zeros(0, h, d, dtype=dtype)
    outs, states, normalizers = zip(*found, strict=True)
    return torch.cat(outs, 2), torch.cat(states), torch.cat(normalizers)


def linear_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: FeatureMap = "elu",
    causal: bool = False,
    normalize: bool | None = None,
    decay: Any = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    scale: float | None = None,
    eps: float = 1e-6,
) -> Any:
    """`linear_attention` in plain torch: its definition, with the scores written out where it is causal."""
    call = prepare(
        query, key, value, feature_map, causal, normalize, decay, key_lengths, cu_seqlens, initial_state, return_state,
        scale, eps,
    )  # fmt: skip
    out, last, last_z = plain(call)
    if cu_seqlens is not None and query.dim() == 3:
        out = out.squeeze(0).transpose(0, 1)
    return (out, (last, last_z)) if return_state else out


def linear_attention_step_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State | None = None,
    *,
    feature_map: FeatureMap = "elu",
    normalize: bool | None = None,
    decay: Any = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, State]:
    """`linear_attention_step` in plain torch: `linear_attention_reference` of one position."""
    out, new = linear_attention_reference(
        query.unsqueeze(2),
        key.unsqueeze(2),
        value.unsqueeze(2),
        feature_map=feature_map,
        causal=True,
        normalize=normalize,
        decay=decay,
        initial_state=state,
        return_state=True,
        scale=scale,
        eps=eps,
    )
    return out.squeeze(2), new
