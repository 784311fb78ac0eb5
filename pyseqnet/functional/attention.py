"""Masked softmax attention: scaled_dot_product_attention.

Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin: Attention is all you need, 2017.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyseqnet.functional._common import (
    aliases,
    autocast_cast,
    autocast_dtype,
    creates_graph,
    explain,
    needs_autograd,
    same_device,
)

_forward = torch.ops.pyseqnet.attention_forward.default
_weights = torch.ops.pyseqnet.attention_weights.default
_backward = torch.ops.pyseqnet.attention_backward.default
_torch_attention: Any = torch.nn.functional.scaled_dot_product_attention

_NOT_CAUSAL, _TOP_LEFT = 0, 1


class _Options(NamedTuple):
    """What is neither a tensor nor a wish about the results; the raw operations take them in this order."""

    causal: int
    scale: float
    dropout_p: float


class _Attention(torch.autograd.Function):
    """Keeps query, key, value, out and lse: linear in the number of queries and keys. The weights, where they are
    asked for, are computed again from lse."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        key_lengths: Tensor | None,
        seed: Tensor | None,
        options: tuple[int, float, float],
        return_weights: bool,
        return_lse: bool,
    ) -> Any:
        out, lse = _forward(query, key, value, mask, key_lengths, seed, *options)
        weights = _weights(query, key, lse, mask, key_lengths, seed, *options) if return_weights else None
        ctx.save_for_backward(query, key, value, mask, key_lengths, seed, out, lse, weights)
        ctx.options, ctx.returns = options, (return_weights, return_lse)
        ctx.set_materialize_grads(False)
        return _results(out, weights, lse, return_weights, return_lse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, mask, key_lengths, seed, out, lse, weights = ctx.saved_tensors
        return_weights, return_lse = ctx.returns
        grad_out = grads[0]
        grad_weights = grads[1] if return_weights else None
        grad_lse = grads[-1] if return_lse else None
        need_query, need_key, need_value, need_mask = ctx.needs_input_grad[:4]
        rest = (None,) * 5
        if grad_out is None and grad_weights is None and grad_lse is None:
            return None, None, None, None, *rest
        if creates_graph():
            needs = (need_query, need_key, need_value, need_mask)
            given = (grad_out, grad_weights, grad_lse)
            found = _differentiable_gradients((query, key, value, mask), needs, given, key_lengths, seed, ctx.options)
            return *found, *rest
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        gq, gk, gv, gm = _backward(
            grad_out, query, key, value, out, lse, mask, key_lengths, seed,
            weights if grad_weights is not None else None, grad_weights, grad_lse, *ctx.options,
            need_query, need_key or need_value, need_mask,
        )  # fmt: skip
        return (
            gq if need_query else None,
            gk if need_key else None,
            gv if need_value else None,
            gm if need_mask else None,
            *rest,
        )


def _differentiable_gradients(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    needs: Sequence[bool],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    key_lengths: Tensor | None,
    seed: Tensor | None,
    options: tuple[int, float, float],
) -> list[Tensor | None]:
    """The backward pass as a differentiable function of inputs and gradients: through the reference."""
    # A view for each: one tensor may come as query, key and value at once, and each place has a gradient of its own.
    views = aliases(*inputs)
    query, key, value, mask = views
    results = _reference(query, key, value, mask, key_lengths, seed, _Options(*options))
    outputs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
    wanted = [v for v, need in zip(views, needs, strict=True) if need and v is not None]
    found = list(
        torch.autograd.grad(
            [r for r, _ in outputs], wanted, [g for _, g in outputs], create_graph=True, allow_unused=True
        )
    )
    return [found.pop(0) if need else None for need in needs]


def _results(out: Tensor, weights: Tensor | None, lse: Tensor, return_weights: bool, return_lse: bool) -> Any:
    if return_weights:
        return (out, weights, lse) if return_lse else (out, weights)
    return (out, lse) if return_lse else out


def _keep_factors(shape: tuple[int, int, int, int], seed: Tensor, dropout_p: float) -> Tensor:
    """The kernels' dropout factors (kernels/common/random.h) in plain torch: 0 or 1 / (1 - p), shape (B, H, L, S)."""

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
    b, h, length, keys = shape
    rows = torch.arange(b * h * length, device=seed.device)
    row_key = mix64(mix64(seed + golden) + golden * (rows + 1)).unsqueeze(1)
    x = (torch.arange(keys, device=seed.device) + row_key) & low
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & low
    x = (((x ^ (x >> 15)) ^ shift(row_key, 32)) * 0x735A2D97) & low
    x = ((x ^ (x >> 15)) * 0x21F0AAAD) & low
    x = x ^ (x >> 16)
    threshold = min(int(dropout_p * 2**32 + 0.5), low)
    return (x >= threshold).reshape(shape).to(torch.float64) / (1 - dropout_p)


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    options: _Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, weights, lse) of four-dimensional tensors in plain torch, differentiable any number of times."""
    b, h, length, _ = query.shape
    keys = key.shape[2]
    if key.shape[1] != h:
        key, value = (t.repeat_interleave(h // t.shape[1], dim=1) for t in (key, value))
    i = torch.arange(length, device=query.device).unsqueeze(1)
    j = torch.arange(keys, device=query.device)
    visible = torch.ones(b, h, length, keys, dtype=torch.bool, device=query.device)
    if options.causal:
        visible = visible & (j <= i + (0 if options.causal == _TOP_LEFT else keys - length))
    if key_lengths is not None:
        visible = visible & (j < key_lengths.view(b, 1, 1, 1))
    added = None
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        visible = visible & (mask != -math.inf)
        added = torch.where(mask == -math.inf, 0.0, mask)
    row_sees, key_seen = visible.any(-1, keepdim=True), visible.any(-2).unsqueeze(-1)
    # What takes no part must not meet a product: 0 * NaN is NaN.
    query = torch.where(row_sees, query, 0.0)
    key, value = torch.where(key_seen, key, 0.0), torch.where(key_seen, value, 0.0)

    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    logits = (query.to(wide) * options.scale) @ key.to(wide).transpose(-1, -2)
    if added is not None:
        logits = logits + added
    logits = torch.where(visible, logits, -math.inf)
    logits = torch.where(row_sees, logits, 0.0)
    weights = torch.where(row_sees, torch.softmax(logits, -1), 0.0)
    lse = torch.where(row_sees.squeeze(-1), torch.logsumexp(logits, -1), -math.inf)
    if options.dropout_p > 0:
        assert seed is not None
        weights = weights * _keep_factors((b, h, length, keys), seed, options.dropout_p).to(wide)
    out = weights @ value.to(wide)
    return out.to(query.dtype), weights.to(query.dtype), lse


# A call as the raw operations take it: query, key, value, mask, key_lengths, options, and the leading extents of the
# results (None: they are four-dimensional already). A plain tuple: a named one costs 0.3 us a call.
_Call = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, tuple[int, float, float], tuple[int, ...] | None]


def _broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    result: list[int] = []
    for dim in range(-max(len(s) for s in shapes), 0):
        extents = [s[dim] for s in shapes if len(s) >= -dim]
        wide = [e for e in extents if e != 1]
        if any(e != wide[0] for e in wide):
            raise ValueError(f"query, key and value do not broadcast: {', '.join(str(tuple(s)) for s in shapes)}")
        result.append(wide[0] if wide else 1)
    return tuple(result)


def _four_dimensional(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Query, key and value as (batch, heads, positions, width), and the leading extents of the result."""
    if min(query.dim(), key.dim(), value.dim()) < (3 if enable_gqa else 2):
        raise ValueError("query, key and value need at least 2 dimensions (3 with enable_gqa)")
    q_lead, k_lead, v_lead = query.shape[:-2], key.shape[:-2], value.shape[:-2]
    if enable_gqa:
        heads = q_lead[-1]
        if k_lead[-1] == 0 or v_lead[-1] == 0 or heads % k_lead[-1] or heads % v_lead[-1]:
            raise ValueError("the number of query heads must be a multiple of those of key and value")
        if k_lead[-1] != v_lead[-1]:
            key = key.repeat_interleave(heads // k_lead[-1], dim=-3)
            value = value.repeat_interleave(heads // v_lead[-1], dim=-3)
        batch = _broadcast(q_lead[:-1], k_lead[:-1], v_lead[:-1])
        leading, kv_heads = (*batch, heads), key.shape[-3]
    else:
        leading = _broadcast(q_lead, k_lead, v_lead)
        batch, heads = (leading[:-1], leading[-1]) if len(leading) > 1 else (leading, 1)
        # One key head for all query heads need not be repeated.
        shared = all(len(lead) == 0 or lead[-1] == 1 for lead in (k_lead, v_lead)) and len(leading) > 1
        kv_heads = 1 if shared else heads
    total = math.prod(batch)

    def view(t: Tensor, h: int) -> Tensor:
        inner = (h,) if len(leading) > len(batch) else ()
        return t.expand(*batch, *inner, *t.shape[-2:]).reshape(total, h, *t.shape[-2:])

    return view(query, heads), view(key, kv_heads), view(value, kv_heads), leading


def _four_dimensional_mask(
    mask: Tensor, leading: tuple[int, ...], shape: tuple[int, int, int, int], gqa: bool
) -> Tensor:
    """The mask as (batch or 1, heads or 1, queries or 1, keys or 1): broadcast dimensions stay of extent 1."""
    full = (*leading, *shape[2:])
    if mask.dim() < 2 or mask.dim() > len(full):
        raise ValueError(f"attn_mask has {mask.dim()} dimensions, {tuple(full)} is what it must broadcast to")
    if any(m not in (1, f) for m, f in zip(reversed(mask.shape), reversed(full), strict=False)):
        raise ValueError(f"attn_mask of shape {tuple(mask.shape)} does not broadcast to {tuple(full)}")
    mask = mask.reshape((1,) * (len(full) - mask.dim()) + tuple(mask.shape))
    if len(leading) == 0:
        return mask.reshape(1, 1, *mask.shape)
    if len(leading) == 1:
        return mask.unsqueeze(0 if gqa else 1)
    if len(leading) == 2:
        return mask
    batch = tuple(mask.shape[: len(leading) - 1])
    if any(extent != 1 for extent in batch):
        mask = mask.expand(*leading[:-1], *mask.shape[-3:])
        batch = leading[:-1]
    return mask.reshape(math.prod(batch), *mask.shape[-3:])


def _read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    key_lengths: Tensor | None,
) -> _Call:
    if type(is_causal) is not bool or type(enable_gqa) is not bool:
        raise TypeError("is_causal and enable_gqa must be bool")
    if torch._C._is_any_autocast_enabled():
        dtype = autocast_dtype(query)
        if dtype is not None:
            query, key, value = (autocast_cast(t, dtype) for t in (query, key, value))
            mask = None if mask is None else autocast_cast(mask, dtype)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")
    leading: tuple[int, ...] | None = None
    q, k = query.shape, key.shape
    if not (
        len(q) == len(k) == value.dim() == 4
        and q[0] == k[0] == value.shape[0]
        and k[1] == value.shape[1]
        and (q[1] == k[1] or (k[1] > 0 and q[1] % k[1] == 0 and (enable_gqa or k[1] == 1)))
    ):
        query, key, value, leading = _four_dimensional(query, key, value, enable_gqa)
        q, k = query.shape, key.shape
    b, h, length, width = q
    keys = k[2]
    if k[3] != width:
        raise ValueError(f"query has head dimension {width}, key {k[3]}")
    if value.shape[2] != keys:
        raise ValueError(f"key has {keys} positions, value {value.shape[2]}")
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"attn_mask must be a tensor, got {type(mask).__name__}")
        if mask.dtype not in (torch.bool, torch.float32, query.dtype):
            raise ValueError(f"attn_mask must be bool, float32 or {query.dtype}, got {mask.dtype}")
        if mask.device != query.device:
            raise ValueError(f"attn_mask is on {mask.device}, query on {query.device}")
        lead = (b, h) if leading is None else leading
        mask = _four_dimensional_mask(mask, lead, (b, h, length, keys), enable_gqa)
    if key_lengths is not None:
        key_lengths = _read_lengths(key_lengths, b, query.device)
    factor = 1.0 / math.sqrt(width) if scale is None and width else 1.0 if scale is None else float(scale)
    return query, key, value, mask, key_lengths, (int(is_causal), factor, float(dropout_p)), leading


def _read_lengths(key_lengths: Tensor, batch: int, device: torch.device) -> Tensor:
    if not isinstance(key_lengths, Tensor):
        raise TypeError(f"key_lengths must be a tensor of integers, got {type(key_lengths).__name__}")
    if key_lengths.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"key_lengths must be int64 or int32, got {key_lengths.dtype}")
    if key_lengths.dim() != 1 or key_lengths.shape[0] != batch:
        raise ValueError(
            f"key_lengths must have shape ({batch},), one length a batch entry, got {tuple(key_lengths.shape)}"
        )
    if key_lengths.device != device:
        raise ValueError(f"key_lengths must be on the query's device {device}, got {key_lengths.device}")
    return key_lengths.to(torch.int64)


def _attend(call: _Call, return_weights: bool, return_lse: bool, reference: bool) -> Any:
    query, key, value, mask, key_lengths, options, leading = call
    dropout_p = options[2]
    seed = None
    if 0 < dropout_p < 1:
        seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=query.device)
    elif dropout_p == 1:
        options = (*options[:2], 0.0)  # everything is dropped, below
    weights = None
    if reference or query.shape[3] == 0 or value.shape[3] == 0:
        out, weights, lse = _reference(query, key, value, mask, key_lengths, seed, _Options(*options))
    elif needs_autograd(query, key, value) or (mask is not None and needs_autograd(mask)):
        if torch.compiler.is_compiling():  # dynamo refuses one tensor in two places of an autograd.Function
            key, value = key.view_as(key), value.view_as(value)
        result = _Attention.apply(query, key, value, mask, key_lengths, seed, options, return_weights, return_lse)
        results = result if isinstance(result, tuple) else (result,)
        out, lse = results[0], results[-1]
        weights = results[1] if return_weights else None
    else:
        out, lse = _forward(query, key, value, mask, key_lengths, seed, *options)
        if return_weights:
            weights = _weights(query, key, lse, mask, key_lengths, seed, *options)
    if dropout_p == 1:
        out = out * 0.0
        weights = None if weights is None else weights * 0.0
    if leading is not None:
        out = out.reshape(*leading, *out.shape[2:])
        weights = weights.reshape(*leading, *weights.shape[2:]) if weights is not None and return_weights else None
        lse = lse.reshape(*leading, query.shape[2]) if return_lse else lse
    return _results(out, weights, lse, return_weights, return_lse)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_lengths: Tensor | None = None,
    return_weights: bool = False,
    return_lse: bool = False,
) -> Any:
    """Each query's mean of the values, weighted by the softmax of its scaled products with the keys.

    Equivalent to::

        torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale,
                                                         enable_gqa=enable_gqa)

    but for the bits of dropout; memory is linear in the number of queries and keys, forward and backward.

    Args:
        query: ``(..., H, L, D)``; float32, bfloat16, float16 or float64; CPU or CUDA. Leading dimensions broadcast.
        key: ``(..., H, S, D)``.
        value: ``(..., H, S, E)``.
        attn_mask: broadcastable to ``(..., H, L, S)``, never materialised at that size. Bool: True takes part. Float
            (float32 or the query's dtype): added to the logits; -inf masks; differentiable.
        dropout_p: probability of dropping a weight, from torch's generator; give 0.0 outside training.
        is_causal: query ``i`` sees keys ``j <= i`` (top-left). May come with a mask or lengths.
        scale: of the products; None for ``1 / sqrt(D)``.
        enable_gqa: key and value may have fewer heads, each shared by as many consecutive query heads.
        key_lengths: ``(B,)`` int64 on the query's device, ``B`` the product of the leading dimensions before the heads
            (of all of them for three-dimensional input): of batch entry ``b`` only the first ``key_lengths[b]`` keys
            take part. Whatever lies beyond, NaN too, touches neither results nor gradients.
        return_weights: also return the weights ``(..., H, L, S)``, after dropout. Differentiable.
        return_lse: also return the log-sum-exp of each row's logits (natural logarithm) ``(..., H, L)``, float32
            (float64 for float64). Differentiable.

    Returns:
        ``(..., H, L, E)``, or a tuple of it and the weights, the log-sum-exp, or both in this order.

    Raises:
        What torch raises for the same arguments; ValueError or TypeError for ``key_lengths``; TypeError for a dtype
        outside the four.

    A query that sees no key gives 0, log-sum-exp -inf and gradients 0. Keys that no query sees never leak, even if they
    hold NaN. Differentiable twice; torch.compile sees one node. Accumulates in float32 (float64 for float64), is
    deterministic, and on the CPU bitwise equal for any number of threads; under ``is_causal`` a later key changes no
    bit of an earlier output.

    Paper: Vaswani et al., Attention is all you need, 2017. Tiling: Dao et al., FlashAttention, 2022.
    """

    def run() -> Any:
        call = _read(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, key_lengths)
        return _attend(call, return_weights, return_lse, reference=False)

    if torch.compiler.is_compiling():
        return run()
    try:
        return run()
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        arguments = (query, key, value, attn_mask, dropout_p, is_causal)
        options = {"scale": scale, "enable_gqa": enable_gqa}
        tensors = (query, key, value)
        explain(error, "scaled_dot_product_attention", tensors, lambda: _torch_attention(*arguments, **options))


def scaled_dot_product_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_lengths: Tensor | None = None,
    return_weights: bool = False,
    return_lse: bool = False,
) -> Any:
    """`scaled_dot_product_attention` in plain torch: its definition, and what its double backward differentiates.

    Draws the same dropout from the same generator. Memory is quadratic.
    """
    call = _read(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, key_lengths)
    return _attend(call, return_weights, return_lse, reference=True)


def _heads_like(tensor: Tensor) -> Tensor:
    """As csrc/attention.cpp lays out gradients: heads inside positions where the input has them so."""
    b, h, n, width = tensor.shape
    if tensor.stride(1) < tensor.stride(2):
        return tensor.new_empty((b, n, h, width)).transpose(1, 2)
    return tensor.new_empty((b, h, n, width))


def _statistic_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@torch.library.register_fake("pyseqnet::attention_forward")
def _attention_forward_fake(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, key_lengths: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    same_device("attention", query, key, value, mask, key_lengths)
    b, h, length, _ = query.shape
    out = query.new_empty((b, length, h, value.shape[3])).transpose(1, 2)
    return out, query.new_empty((b, h, length), dtype=_statistic_dtype(query))


@torch.library.register_fake("pyseqnet::attention_weights")
def _attention_weights_fake(
    query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None, key_lengths: Tensor | None, *rest: Any
) -> Tensor:
    same_device("attention", query, key, lse, mask, key_lengths)
    return query.new_empty((*query.shape[:3], key.shape[2]))


@torch.library.register_fake("pyseqnet::attention_backward")
def _attention_backward_fake(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_query, need_key_value, need_mask = rest[-3:]
    same_device("attention", grad_out, query, key, value, out, lse, mask)

    def nothing() -> Tensor:
        return query.new_empty(0)

    gq = _heads_like(query) if need_query else nothing()
    gk = _heads_like(key) if need_key_value else nothing()
    gv = _heads_like(value) if need_key_value else nothing()
    gm = mask.new_empty(mask.shape) if need_mask and mask is not None else nothing()
    return gq, gk, gv, gm
