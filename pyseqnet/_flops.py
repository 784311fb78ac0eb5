"""What `torch.utils.flop_counter.FlopCounterMode` counts for our operations.

As torch counts: multiplications and additions of products only, and every pair of query and key whatever a mask or a
pattern hides. Operations without products (pooling, CTC, CRF) count nothing, as torch's.

Importing torch's module imports triton where that is installed, so the formulas join when somebody else imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_COUNTER = "torch.utils.flop_counter"
_GEOMETRY = 9  # integers of a convolution: csrc/ops.cpp


def _readable(tensor: Tensor | None) -> bool:
    return tensor is not None and not isinstance(tensor, FakeTensor) and not tensor.is_meta


# --- convolution --------------------------------------------------------------------------------------------------


def _conv_output(input: Tensor, weight: Tensor, geometry: Sequence[int]) -> list[int]:
    """The extents of a convolution's output, two-dimensional or of one dimension."""
    stride, before, after, dilation = geometry[0:2], geometry[2:4], geometry[4:6], geometry[6:8]
    spatial = [
        (extent + b + a - d * (taps - 1) - 1) // s + 1
        for extent, taps, s, b, a, d in zip(
            reversed(input.shape[2:]), reversed(weight.shape[2:]), reversed(stride), reversed(before),
            reversed(after), reversed(dilation), strict=False,
        )
    ]  # fmt: skip
    return [input.shape[0], weight.shape[0], *reversed(spatial)]


def _conv(counter: Any, input: Tensor, weight: Tensor, geometry: Sequence[int]) -> int:
    return counter.conv_flop_count(input.shape, weight.shape, _conv_output(input, weight, geometry))


def _conv_backward(counter: Any, input: Tensor, weight: Tensor, geometry: Sequence[int], needs: Sequence[bool]) -> int:
    grad = _conv_output(input, weight, geometry)
    nothing = (None,) * 4
    shapes = (input.shape, weight.shape)
    return counter.conv_backward_flop(
        grad, *shapes, *nothing, False, None, geometry[8], needs, out_val=[list(shape) for shape in shapes]
    )


# --- attention ----------------------------------------------------------------------------------------------------


def _attention_products(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, narrow: int, wide: int
) -> int:
    """`narrow` products of the pairs with the heads' width, `wide` with that of the values."""
    batch, heads, length, width = query.shape
    pairs = batch * length * key.shape[2]
    if cu_q is not None and cu_k is not None:
        if _readable(cu_q) and _readable(cu_k):
            pairs = int((cu_q.diff().long() * cu_k.diff().long()).sum())
        else:  # as torch: sequences of one length
            pairs = pairs // max(cu_q.shape[0] - 1, 1)
    return 2 * heads * pairs * (narrow * width + wide * value.shape[3])


def _additive(query: Tensor, key: Tensor, value: Tensor, narrow: int, wide: int) -> int:
    batch, length, width = query.shape
    return 2 * batch * length * key.shape[1] * (narrow * width + wide * value.shape[2])


def _linear(query: Tensor, key: Tensor, value: Tensor, times: int) -> int:
    """The state is written once a key and read once a query."""
    batch, heads, length, width = query.shape
    return 2 * times * batch * heads * (length + key.shape[2]) * width * value.shape[3]


# --- recurrent networks -------------------------------------------------------------------------------------------


def _rows(input: Tensor, lengths: Tensor | None) -> int:
    """Steps of all sequences together."""
    if input.dim() == 2:
        return input.shape[0]
    return int(lengths.sum()) if lengths is not None and _readable(lengths) else input.shape[0] * input.shape[1]


def _recurrent(input: Tensor, weights: Sequence[Tensor], lengths: Tensor | None) -> int:
    return 2 * _rows(input, lengths) * sum(w.numel() for w in weights if w.dim() == 2)


def _recurrent_backward(
    input: Tensor, weights: Sequence[Tensor], lengths: Tensor | None, batch: int, needs: Sequence[bool], directions: int
) -> int:
    need_input, need_state, need_weights = needs
    rows = _rows(input, lengths)
    step = len(weights) // directions
    per_direction = [list(weights[k * step : (k + 1) * step]) for k in range(directions)]
    total = 0
    for ours in per_direction:
        matrices = [w.numel() for w in ours if w.dim() == 2]
        first, recurrent, others = matrices[0], matrices[1], sum(matrices[2:])
        total += need_weights * rows * sum(matrices)
        total += need_input * rows * first
        total += (rows if need_state else rows - batch) * recurrent  # nobody asks the first step for its start's
        total += rows * others
    return 2 * total


def register(counter: ModuleType) -> None:
    """Add our formulas to torch's."""
    ops = torch.ops.pyseqnet
    tell = counter.register_flop_formula

    def conv_forward(input: Tensor, weight: Tensor, bias: Any, *rest: Any, **_: Any) -> int:
        return _conv(counter, input, weight, rest[:_GEOMETRY])

    def conv_backward(grad: Any, input: Tensor, weight: Tensor, *rest: Any, **_: Any) -> int:
        return _conv_backward(counter, input, weight, rest[:_GEOMETRY], rest[_GEOMETRY : _GEOMETRY + 3])

    def fused_backward(grad: Any, saved: Any, input: Tensor, weight: Tensor, *rest: Any, **_: Any) -> int:
        return _conv_backward(counter, input, weight, rest[:_GEOMETRY], rest[_GEOMETRY + 4 : _GEOMETRY + 7])

    tell([ops.conv_forward, ops.conv_relu_pool_forward], get_raw=True)(conv_forward)
    tell(ops.conv_backward, get_raw=True)(conv_backward)
    tell(ops.conv_relu_pool_backward, get_raw=True)(fused_backward)

    # rest of attention_forward: mask, bias, slopes, key_lengths, cu_seqlens_q, cu_seqlens_k, ...
    @tell(ops.attention_forward, get_raw=True)
    def attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **_: Any) -> int:
        return _attention_products(query, key, value, rest[4], rest[5], 1, 1)

    @tell(ops.attention_plain, get_raw=True)
    def attention_plain(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **_: Any) -> int:
        return _attention_products(query, key, value, None, None, 1, 1)

    @tell(ops.attention_weights, get_raw=True)
    def attention_weights(query: Tensor, key: Tensor, lse: Tensor, *rest: Any, **_: Any) -> int:
        return _attention_products(query, key, key, rest[4], rest[5], 1, 0)

    @tell(ops.attention_backward, get_raw=True)
    def attention_backward(
        grad: Any, query: Tensor, key: Tensor, value: Tensor, out: Any, lse: Any, *rest: Any, **_: Any
    ) -> int:
        return _attention_products(query, key, value, rest[4], rest[5], 3, 2)  # as torch counts every backward

    @tell(ops.additive_attention_forward, get_raw=True)
    def additive(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **_: Any) -> int:
        return _additive(query, key, value, 1, 1)

    @tell(ops.additive_attention_weights, get_raw=True)
    def additive_weights(query: Tensor, key: Tensor, *rest: Any, **_: Any) -> int:
        return _additive(query, key, key, 1, 0)

    @tell(ops.additive_attention_backward, get_raw=True)
    def additive_backward(grad: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **_: Any) -> int:
        return _additive(query, key, value, 2, 2)

    @tell(ops.linear_attention_forward, get_raw=True)
    def linear(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **_: Any) -> int:
        return _linear(query, key, value, 1)

    @tell(ops.linear_attention_backward, get_raw=True)
    def linear_backward(
        grad: Any, grad_state: Any, grad_normalizer: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> int:
        return _linear(query, key, value, 2)

    @tell([ops.linear_attention_step, ops.linear_attention_step_], get_raw=True)
    def linear_step(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **_: Any) -> int:
        return _linear(query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2), 1)

    @tell(ops.recurrent_forward, get_raw=True)
    def recurrent(
        input: Tensor, h0: Any, c0: Any, weights: Sequence[Tensor], lengths: Tensor | None, *rest: Any, **_: Any
    ) -> int:
        return _recurrent(input, weights, lengths)

    # rest of recurrent_backward: batch_sizes, cell, directions, has_biases, batch_first, need_*
    @tell(ops.recurrent_backward, get_raw=True)
    def recurrent_backward(
        grad_output: Any, grad_h: Any, grad_c: Any, input: Tensor, result: Any, h0: Tensor | None, c0: Any,
        weights: Sequence[Tensor], gates: Any, cells: Any, lengths: Tensor | None, *rest: Any, **_: Any,
    ) -> int:  # fmt: skip
        batch_sizes, _cell, directions, _has_biases, batch_first, need_input, need_h0, _need_c0, need_weights = rest[:9]
        if batch_sizes is not None:
            batch = h0.shape[1] if h0 is not None else input.shape[0]
        else:
            batch = input.shape[0 if batch_first else 1]
        needs = (need_input, need_h0, need_weights)
        return _recurrent_backward(input, weights, lengths, batch, needs, directions)

    @tell(ops.recurrent_step, get_raw=True)
    def recurrent_step(input: Tensor, h: Any, c: Any, w_ih: Tensor, w_hh: Tensor, *rest: Any, **_: Any) -> int:
        return 2 * prod(input.shape[:-1]) * (w_ih.numel() + w_hh.numel())


class _WhenImported(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torch's counter as everybody does, and calls `register` once it is there."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        register(module)


def register_when_imported() -> None:
    if _COUNTER in sys.modules:
        register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
