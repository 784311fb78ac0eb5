"""Additive attention.

Bahdanau, Cho, Bengio: Neural machine translation by jointly learning to align and translate, 2015.
"""

from __future__ import annotations

from typing import Any

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

_forward = torch.ops.pyseqnet.additive_attention_forward.default
_weights = torch.ops.pyseqnet.additive_attention_weights.default
_backward = torch.ops.pyseqnet.additive_attention_backward.default


class _Additive(torch.autograd.Function):
    """Keeps the inputs, the output and the log-sum-exp: linear in the number of queries and keys."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        key_lengths: Tensor | None,
        return_weights: bool,
    ) -> Any:
        out, lse = _forward(query, key, value, weight, bias, key_lengths)
        weights = _weights(query, key, weight, lse, bias, key_lengths) if return_weights else None
        ctx.save_for_backward(query, key, value, weight, bias, key_lengths, out, lse, weights)
        ctx.set_materialize_grads(False)
        return (out, weights) if return_weights else out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_weights: Tensor | None = None) -> tuple[Tensor | None, ...]:
        query, key, value, weight, bias, key_lengths, out, lse, weights = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        if grad_out is None and grad_weights is None:
            return (None,) * 7
        if creates_graph():
            inputs = (query, key, value, weight, bias)
            return (*_differentiable_gradients(inputs, needs, grad_out, grad_weights, key_lengths), None, None)
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        need_scores = needs[0] or needs[1] or needs[3] or needs[4]
        found = _backward(
            grad_out, query, key, value, weight, out, lse, bias, key_lengths,
            weights if grad_weights is not None else None, grad_weights, need_scores, needs[2],
        )  # fmt: skip
        return (*(grad if need else None for grad, need in zip(found, needs, strict=True)), None, None)


def _differentiable_gradients(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    needs: tuple[bool, ...],
    grad_out: Tensor | None,
    grad_weights: Tensor | None,
    key_lengths: Tensor | None,
) -> list[Tensor | None]:
    """The backward pass as a differentiable function of inputs and gradients: through the reference."""
    views = aliases(*inputs)
    query, key, value, weight, bias = views
    results = _reference(query, key, value, weight, bias, key_lengths)
    outputs = [(r, g) for r, g in zip(results, (grad_out, grad_weights), strict=True) if g is not None]
    wanted = [v for v, need in zip(views, needs, strict=True) if need]
    found = list(
        torch.autograd.grad(
            [r for r, _ in outputs], wanted, [g for _, g in outputs], create_graph=True, allow_unused=True
        )
    )
    return [found.pop(0) if need else None for need in needs]


def _reference(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, key_lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, weights) in plain torch, differentiable any number of times."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys = key.shape[1]
    visible = torch.ones(key.shape[:2], dtype=torch.bool, device=key.device)
    if key_lengths is not None:
        visible = torch.arange(keys, device=key.device) < key_lengths.unsqueeze(1)
    # What takes no part must not meet a product: 0 * NaN is NaN.
    key, value = (torch.where(visible.unsqueeze(2), t.to(wide), 0.0) for t in (key, value))
    total = query.to(wide).unsqueeze(2) + key.unsqueeze(1)
    if bias is not None:
        total = total + bias.to(wide)
    scores = torch.tanh(total) @ weight.to(wide)
    row_sees = visible.any(1)[:, None, None]
    scores = torch.where(visible.unsqueeze(1), scores, -torch.inf)
    weights = torch.where(row_sees, torch.softmax(torch.where(row_sees, scores, 0.0), -1), 0.0)
    return (weights @ value).to(query.dtype), weights.to(query.dtype)


_Call = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def _read(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, key_lengths: Tensor | None, bias: Tensor | None
) -> _Call:
    given: tuple[Any, ...] = (query, key, value, weight) if bias is None else (query, key, value, weight, bias)
    names = ("query", "key", "value", "weight", "bias")
    for name, tensor in zip(names, given, strict=False):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if torch._C._is_any_autocast_enabled():
        dtype = autocast_dtype(query)
        if dtype is not None:
            given = tuple(autocast_cast(t, dtype) for t in given)
    query, key, value, weight, *rest = given
    bias = rest[0] if rest else None
    for name, tensor in zip(names[1:], given[1:], strict=False):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have the query's dtype {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on the query's device {query.device}, got {tensor.device}")
    for name, tensor in zip(names[:3], given[:3], strict=True):
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have 3 dimensions (batch, positions, width), got {tuple(tensor.shape)}")
    batch, _, width = query.shape
    if key.shape[0] != batch or key.shape[2] != width:
        raise ValueError(f"key must have shape ({batch}, S, {width}) as query has, got {tuple(key.shape)}")
    if value.shape[0] != batch or value.shape[1] != key.shape[1]:
        raise ValueError(f"value must have shape ({batch}, {key.shape[1]}, E) as key has, got {tuple(value.shape)}")
    for name, tensor in zip(names[3:], given[3:], strict=False):
        if tuple(tensor.shape) != (width,):
            raise ValueError(f"{name} must have shape ({width},), got {tuple(tensor.shape)}")
    if key_lengths is not None:
        if not isinstance(key_lengths, Tensor):
            raise TypeError(f"key_lengths must be a tensor of integers, got {type(key_lengths).__name__}")
        if key_lengths.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"key_lengths must be int64 or int32, got {key_lengths.dtype}")
        if tuple(key_lengths.shape) != (batch,):
            raise ValueError(
                f"key_lengths must have shape ({batch},), one length a batch entry, got {tuple(key_lengths.shape)}"
            )
        if key_lengths.device != query.device:
            raise ValueError(f"key_lengths must be on the query's device {query.device}, got {key_lengths.device}")
        key_lengths = key_lengths.to(torch.int64)
    return query, key, value, weight, bias, key_lengths


def _attend(call: _Call, return_weights: bool) -> Any:
    query, key, value, weight, bias, key_lengths = call
    if query.shape[2] == 0 or value.shape[2] == 0:  # nothing to compute that the reference does not
        out, weights = _reference(*call)
        return (out, weights) if return_weights else out
    if needs_autograd(query, key, value) or needs_autograd(weight, bias):
        if torch.compiler.is_compiling():  # dynamo refuses one tensor in two places of an autograd.Function
            key, value = key.view_as(key), value.view_as(value)
            bias = bias if bias is None else bias.view_as(bias)
        return _Additive.apply(query, key, value, weight, bias, key_lengths, return_weights)
    out, lse = _forward(query, key, value, weight, bias, key_lengths)
    return (out, _weights(query, key, weight, lse, bias, key_lengths)) if return_weights else out


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    key_lengths: Tensor | None = None,
    bias: Tensor | None = None,
    return_weights: bool = False,
) -> Any:
    """Each query's mean of the values, weighted by the softmax of ``weight . tanh(query + key + bias)``.

    Equivalent to::

        scores = torch.tanh(query[:, :, None] + key[:, None] + bias) @ weight       # (B, L, S)
        weights = torch.softmax(scores, -1)
        out = weights @ value

    without the ``(B, L, S, D)`` tensor: memory is linear in the number of queries and keys, forward and backward.
    The projections of query and key are the caller's (`pyseqnet.nn.AdditiveAttention` has them).

    Args:
        query: ``(B, L, D)``; float32, bfloat16, float16 or float64; CPU or CUDA.
        key: ``(B, S, D)``.
        value: ``(B, S, E)``.
        weight: ``(D,)``.
        key_lengths: ``(B,)`` int64 on the query's device: of batch entry ``b`` only the first ``key_lengths[b]`` keys
            take part. Whatever lies beyond, NaN too, touches neither results nor gradients.
        bias: ``(D,)``.
        return_weights: also return the weights ``(B, L, S)``. Differentiable.

    Returns:
        ``(B, L, E)``, or a tuple of it and the weights. A query that sees no key gives 0, and gradients 0.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Differentiable twice; torch.compile sees one node. Accumulates in float32 (float64 for float64), is deterministic,
    and on the CPU bitwise equal for any number of threads.

    Paper: Bahdanau, Cho and Bengio, Neural machine translation by jointly learning to align and translate, 2015.
    """

    def run() -> Any:
        return _attend(_read(query, key, value, weight, key_lengths, bias), return_weights)

    if torch.compiler.is_compiling():
        return run()
    try:
        return run()
    except (ValueError, TypeError, NotImplementedError) as error:
        explain(error, "additive_attention", (query, key, value, weight, bias), lambda: None)


def additive_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    key_lengths: Tensor | None = None,
    bias: Tensor | None = None,
    return_weights: bool = False,
) -> Any:
    """`additive_attention` in plain torch: its definition, and what its double backward differentiates.

    Memory is that of ``(B, L, S, D)``.
    """
    out, weights = _reference(*_read(query, key, value, weight, key_lengths, bias))
    return (out, weights) if return_weights else out


@torch.library.register_fake("pyseqnet::additive_attention_forward")
def _forward_fake(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, *rest: Tensor | None) -> Any:
    same_device("additive_attention", query, key, value, weight, *rest)
    b, length, _ = query.shape
    statistic = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((b, length, value.shape[2])), query.new_empty((b, length), dtype=statistic)


@torch.library.register_fake("pyseqnet::additive_attention_weights")
def _weights_fake(query: Tensor, key: Tensor, weight: Tensor, lse: Tensor, *rest: Tensor | None) -> Tensor:
    same_device("additive_attention", query, key, weight, lse, *rest)
    return query.new_empty((*query.shape[:2], key.shape[1]))


@torch.library.register_fake("pyseqnet::additive_attention_backward")
def _backward_fake(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    need_scores, need_value = rest[-2:]
    same_device("additive_attention", grad_out, query, key, value, weight, *rest[:-2])

    def like(tensor: Tensor, needed: bool) -> Tensor:
        return query.new_empty(tensor.shape if needed else (0,))

    scores = [like(t, need_scores) for t in (query, key, weight, weight)]
    return scores[0], scores[1], like(value, need_value), scores[2], scores[3]
