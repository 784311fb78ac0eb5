"""Masked softmax attention: scaled_dot_product_attention.

Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin: Attention is all you need, 2017.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyseqnet.functional._attention_call import NO_EXTRAS, NOTHING, Call, Given, read
from pyseqnet.functional._attention_reference import Extras, Options, attention_reference
from pyseqnet.functional._common import (
    aliases,
    creates_graph,
    explain,
    needs_autograd,
    same_device,
)
from pyseqnet.masks import Pattern

_forward = torch.ops.pyseqnet.attention_forward.default
_plain = torch.ops.pyseqnet.attention_plain.default
_weights = torch.ops.pyseqnet.attention_weights.default
_backward = torch.ops.pyseqnet.attention_backward.default
_torch_attention: Any = torch.nn.functional.scaled_dot_product_attention


class _Attention(torch.autograd.Function):
    """Keeps query, key, value, out and lse: linear in the number of queries and keys. The weights, where they are
    asked for, are computed again from lse."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        slopes: Tensor | None,
        key_lengths: Tensor | None,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        seed: Tensor | None,
        options: tuple[int, float, float, float, int, int],
        return_weights: bool,
        return_lse: bool,
        *pattern: Tensor,
    ) -> Any:
        extras = (mask, bias, slopes, key_lengths, cu_q, cu_k, pattern, seed)
        out, lse = _forward(query, key, value, *extras, *options)
        weights = _weights(query, key, lse, *extras, *options) if return_weights else None
        saved = (query, key, value, bias, mask, slopes, key_lengths, cu_q, cu_k, seed, out, lse, weights)
        ctx.save_for_backward(*saved, *pattern)
        ctx.options, ctx.returns = options, (return_weights, return_lse)
        ctx.set_materialize_grads(False)
        return _results(out, weights, lse, return_weights, return_lse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, bias, mask, slopes, key_lengths, cu_q, cu_k, seed, out, lse, weights, *pattern = (
            ctx.saved_tensors
        )
        extras = (mask, bias, slopes, key_lengths, cu_q, cu_k, pattern, seed)
        return_weights, return_lse = ctx.returns
        grad_out = grads[0]
        grad_weights = grads[1] if return_weights else None
        grad_lse = grads[-1] if return_lse else None
        need_query, need_key, need_value, need_bias = ctx.needs_input_grad[:4]
        rest = (None,) * (9 + len(pattern))
        if grad_out is None and grad_weights is None and grad_lse is None:
            return None, None, None, None, *rest
        if creates_graph():
            needs = (need_query, need_key, need_value, need_bias)
            given = (grad_out, grad_weights, grad_lse)
            found = _differentiable_gradients((query, key, value, bias), needs, given, Extras(*extras), ctx.options)
            return *found, *rest
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        gq, gk, gv, gb = _backward(
            grad_out, query, key, value, out, lse, *extras, weights if grad_weights is not None else None,
            grad_weights, grad_lse, *ctx.options, need_query, need_key or need_value, need_bias,
        )  # fmt: skip
        return (
            gq if need_query else None,
            gk if need_key else None,
            gv if need_value else None,
            gb if need_bias else None,
            *rest,
        )


class _PlainAttention(torch.autograd.Function):
    """`_Attention` with nothing beside query, key and value: each argument fewer saves a small call half a
    microsecond."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Tensor:
        out, lse = _plain(query, key, value, causal, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.options = (int(causal), scale, 0.0, 0.0, 0, 0)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        needs = (*ctx.needs_input_grad[:3], False)
        if creates_graph():
            given = (grad_out, None, None)
            found = _differentiable_gradients((query, key, value, None), needs, given, Extras(*NO_EXTRAS), ctx.options)
            return *found[:3], None, None
        gq, gk, gv, _ = _backward(
            grad_out, query, key, value, out, lse, *NO_EXTRAS, None, None, None, *ctx.options,
            needs[0], needs[1] or needs[2], False,
        )  # fmt: skip
        return gq if needs[0] else None, gk if needs[1] else None, gv if needs[2] else None, None, None


def _plain_call(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Tensor | None:
    """Four dimensions, one width and as many key heads as query heads, which is what layers have; None: not so."""
    q, k = query.shape, key.shape
    if len(k) != 4 or k != value.shape or not k[3] or torch._C._is_any_autocast_enabled():
        return None
    if q != k and (len(q) != 4 or q[0] != k[0] or q[1] != k[1] or q[3] != k[3]):
        return None
    factor = 1.0 / math.sqrt(k[3]) if scale is None else float(scale)
    if needs_autograd(query, key, value):
        recorded: Tensor = _PlainAttention.apply(query, key, value, causal, factor)
        return recorded
    out: Tensor = _plain(query, key, value, causal, factor)[0]
    return out


def _differentiable_gradients(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    needs: Sequence[bool],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    extras: Extras,
    options: tuple[int, float, float, float, int, int],
) -> list[Tensor | None]:
    """The backward pass as a differentiable function of inputs and gradients: through the reference."""
    # A view for each: one tensor may come as query, key and value at once, and each place has a gradient of its own.
    views = aliases(*inputs)
    query, key, value, bias = views
    results = attention_reference(query, key, value, extras._replace(bias=bias), Options(*options))
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


def _attend(call: Call, return_weights: bool, return_lse: bool, reference: bool) -> Any:
    query, key, value, extras, options, leading, packed = call
    dropout_p = options[3]
    if 0 < dropout_p < 1:
        seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=query.device)
        extras = (*extras[:-1], seed)
    elif dropout_p == 1:
        options = (*options[:3], 0.0, *options[4:])  # everything is dropped, below
    bias = extras[1]
    weights = None
    if reference or query.shape[3] == 0 or value.shape[3] == 0:
        out, weights, lse = attention_reference(query, key, value, Extras(*extras), Options(*options))
    elif needs_autograd(query, key, value) or (bias is not None and needs_autograd(bias)):
        if torch.compiler.is_compiling():  # dynamo refuses one tensor in two places of an autograd.Function
            key, value = key.view_as(key), value.view_as(value)
        mask, bias, slopes, key_lengths, cu_q, cu_k, pattern, seed = extras
        result = _Attention.apply(
            query, key, value, bias, mask, slopes, key_lengths, cu_q, cu_k, seed, options, return_weights, return_lse,
            *pattern,
        )  # fmt: skip
        results = result if isinstance(result, tuple) else (result,)
        out, lse = results[0], results[-1]
        weights = results[1] if return_weights else None
    else:
        out, lse = _forward(query, key, value, *extras, *options)
        if return_weights:
            weights = _weights(query, key, lse, *extras, *options)
    if dropout_p == 1:
        out = out * 0.0
        weights = None if weights is None else weights * 0.0
    if leading is not None:
        out = out.reshape(*leading, *out.shape[2:])
        weights = weights.reshape(*leading, *weights.shape[2:]) if weights is not None and return_weights else None
        lse = lse.reshape(*leading, query.shape[2]) if return_lse else lse
    elif packed == 3:
        out, lse = out.squeeze(0).transpose(0, 1), lse.squeeze(0)
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
    pattern: Pattern | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    return_weights: bool = False,
    return_lse: bool = False,
) -> Any:
    """Each query's mean of the values, weighted by the softmax of its scaled products with the keys.

    Equivalent to::

        logits = query @ key.transpose(-1, -2) * scale
        logits = softcap * tanh(logits / softcap)                               # with a softcap
        logits = logits + bias - slopes * (i + S - L - j).abs()                 # what there is of them
        logits = logits.masked_fill(~(attn_mask & pattern.to_dense(L, S) & ...), -inf)
        return dropout(softmax(logits, -1)) @ value

    with memory linear in the number of queries and keys, forward and backward; with torch's arguments alone it is
    `torch.nn.functional.scaled_dot_product_attention` but for the bits of dropout.

    Args:
        query: ``(..., H, L, D)``; float32, bfloat16, float16 or float64; CPU or CUDA. Leading dimensions broadcast.
        key: ``(..., H, S, D)``.
        value: ``(..., H, S, E)``.
        attn_mask: broadcastable to ``(..., H, L, S)``, never materialised at that size. Bool: True takes part. Float
            (float32 or the query's dtype): added to the logits; -inf masks; differentiable.
        dropout_p: probability of dropping a weight, from torch's generator; give 0.0 outside training.
        is_causal: query ``i`` sees keys ``j <= i`` (top-left). May come with any other mask.
        scale: of the products; None for ``1 / sqrt(D)``.
        enable_gqa: key and value may have fewer heads, each shared by as many consecutive query heads.
        pattern: which keys each query sees, from `pyseqnet.masks`. What it hides costs no time.
        key_lengths: ``(B,)`` int64 on the query's device, ``B`` the product of the leading dimensions before the heads
            (of all of them for three-dimensional input): of batch entry ``b`` only the first ``key_lengths[b]`` keys
            take part. Whatever lies beyond, NaN too, touches neither results nor gradients.
        cu_seqlens_q: ``(B + 1,)`` int32 on the query's device: the query holds ``B`` sequences one behind the other,
            sequence ``b`` its positions ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]``. The query is then
            ``(total_q, H, D)``, as flash_attn_varlen_func has it, or ``(1, H, total_q, D)``; key ``(total_k, H, D)``
            and value ``(total_k, H, E)`` likewise. Each sequence attends to itself only. Masks, bias and pattern count
            positions from its beginning and are as large as the longest (asked for on CUDA, that waits for the device).
        cu_seqlens_k: ``(B + 1,)``, of key and value. The first element is 0, the last all positions.
        bias: broadcastable to ``(..., H, L, S)``, float32 or the query's dtype: added to the logits, -inf masks.
            Differentiable, at the size it was given. May come beside an ``attn_mask``.
        alibi_slopes: ``(H,)`` or ``(B, H)``: adds ``-slope * |i + S - L - j|`` (ALiBi; the last query stands at the
            last key, as flash-attention has it), or ``-slope * |i - j|`` under ``is_causal`` and ``Causal()``, whose
            first query stands at the first key. No gradient.
        softcap: products become ``softcap * tanh(products / softcap)`` before anything is added.
        return_weights: also return the weights ``(..., H, L, S)``, after dropout. Differentiable. Of packed sequences
            ``(B, H, longest, longest)``, zero beyond each one's end.
        return_lse: also return the log-sum-exp of each row's logits (natural logarithm) ``(..., H, L)``, float32
            (float64 for float64). Differentiable. Of packed sequences ``(H, total_q)``.

    Returns:
        ``(..., H, L, E)``, or a tuple of it and the weights, the log-sum-exp, or both in this order.

    Raises:
        What torch raises for the same arguments; ValueError or TypeError for the others; TypeError for a dtype outside
        the four.

    A query that sees no key gives 0, log-sum-exp -inf and gradients 0. Keys that no query sees never leak, even if they
    hold NaN. Differentiable twice; torch.compile sees one node. Accumulates in float32 (float64 for float64), is
    deterministic, and on the CPU bitwise equal for any number of threads; under ``is_causal`` a later key changes no
    bit of an earlier output.

    Papers: Vaswani et al., Attention is all you need, 2017. Tiling: Dao et al., FlashAttention, 2022. Patterns: Child
    et al., Sparse Transformers, 2019; Beltagy et al., Longformer, 2020. ALiBi: Press et al., 2022. Soft-capping:
    Gemma Team, Gemma 2, 2024.
    """

    def run() -> Any:
        call = read(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, given, return_weights)
        return _attend(call, return_weights, return_lse, reference=False)

    given = _given(pattern, key_lengths, cu_seqlens_q, cu_seqlens_k, bias, alibi_slopes, softcap)
    if torch.compiler.is_compiling():
        return run()
    try:
        plain = given is NOTHING and attn_mask is None and dropout_p == 0 and not (return_weights or return_lse)
        if plain and type(is_causal) is bool and type(enable_gqa) is bool:
            out = _plain_call(query, key, value, is_causal, scale)
            if out is not None:
                return out
        return run()
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        if cu_seqlens_q is not None or cu_seqlens_k is not None:  # torch has no packed sequences
            raise
        arguments = (query, key, value, attn_mask, dropout_p, is_causal)
        options = {"scale": scale, "enable_gqa": enable_gqa}
        tensors = (query, key, value)
        explain(error, "scaled_dot_product_attention", tensors, lambda: _torch_attention(*arguments, **options))


def _given(*arguments: Any) -> Given:
    for argument in arguments:
        if argument is not None:
            return Given(*arguments)
    return NOTHING


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
    pattern: Pattern | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    return_weights: bool = False,
    return_lse: bool = False,
) -> Any:
    """`scaled_dot_product_attention` in plain torch: its definition, and what its double backward differentiates.

    Draws the same dropout from the same generator. Memory is quadratic.
    """
    given = _given(pattern, key_lengths, cu_seqlens_q, cu_seqlens_k, bias, alibi_slopes, softcap)
    call = read(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, given, return_weights)
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
def _attention_forward_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _same_device(query, key, value, *rest)
    b, h, length, _ = query.shape
    out = query.new_empty((b, length, h, value.shape[3])).transpose(1, 2)
    return out, query.new_empty((b, h, length), dtype=_statistic_dtype(query))


@torch.library.register_fake("pyseqnet::attention_plain")
def _attention_plain_fake(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return _attention_forward_fake(query, key, value)


@torch.library.register_fake("pyseqnet::attention_weights")
def _attention_weights_fake(query: Tensor, key: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    _same_device(query, key, lse, *rest)
    cu_q = rest[4]
    if cu_q is not None:
        max_q, max_k = rest[-2:]
        return query.new_empty((cu_q.shape[0] - 1, query.shape[1], max_q, max_k))
    return query.new_empty((*query.shape[:3], key.shape[2]))


@torch.library.register_fake("pyseqnet::attention_backward")
def _attention_backward_fake(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_query, need_key_value, need_bias = rest[-3:]
    bias = rest[1]
    _same_device(grad_out, query, key, value, out, lse, *rest)

    def nothing() -> Tensor:
        return query.new_empty(0)

    gq = _heads_like(query) if need_query else nothing()
    gk = _heads_like(key) if need_key_value else nothing()
    gv = _heads_like(value) if need_key_value else nothing()
    gb = bias.new_empty(bias.shape) if need_bias and bias is not None else nothing()
    return gq, gk, gv, gb


def _same_device(*arguments: Any) -> None:
    same_device("attention", *(a for a in arguments if isinstance(a, Tensor)))
