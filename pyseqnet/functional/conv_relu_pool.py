"""Convolution, bias, ReLU and max-pooling as one operation: conv2d_relu_max_pool2d, conv1d_relu, conv2d_relu.

The convolution's output, by far the largest tensor of the block, is never kept: the backward pass needs one byte an
element of the pooled output (which pixel of its window won, or none), or, without pooling, the output itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    per_dimension,
    same_device,
)
from pyseqnet.functional.conv import (
    _INTEGERS,
    _allows_tf32,
    _conv_forward_fake,
    _empty_as,
    _read_geometry,
    _torch_conv1d,
    _torch_conv2d,
)
from pyseqnet.functional.conv import _reference as _conv_reference

_forward = torch.ops.pyseqnet.conv_relu_pool_forward.default
_backward = torch.ops.pyseqnet.conv_relu_pool_backward.default
_torch_relu = torch.relu
_torch_max_pool2d: Any = torch.nn.functional.max_pool2d
# After the convolution's integers come pool_h, pool_w, pool_stride_h, pool_stride_w.
_NO_POOL = (1, 1, 1, 1)
_ALL_INTEGERS = _INTEGERS + len(_NO_POOL)


def _reference(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[int, ...]) -> Tensor:
    """Plain torch, differentiable any number of times; batched input."""
    output = _torch_relu(_conv_reference(input, weight, bias, geometry[:_INTEGERS]))
    pool = geometry[_INTEGERS:]
    return output if pool == _NO_POOL else _torch_max_pool2d(output, pool[:2], pool[2:])


class _ConvReluPool(torch.autograd.Function):
    """Keeps the arguments and one byte an output element (without pooling, the output)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[int, ...]) -> Tensor:
        output, arg = _forward(input, weight, bias, *geometry, True, _allows_tf32(input))
        saved = output if geometry[_INTEGERS:] == _NO_POOL else arg
        ctx.save_for_backward(input, weight, bias, saved)
        ctx.geometry = geometry
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grads
        input, weight, bias, saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if creates_graph():
            input, weight, bias = aliases(input, weight, bias)
            output = _reference(input, weight, bias, ctx.geometry)
            wanted = [t for t, need in zip((input, weight, bias), needs, strict=True) if need]
            found = list(torch.autograd.grad(output, wanted, grad_output, create_graph=True))
            return *[found.pop(0) if need else None for need in needs], None
        gradients = _backward(grad_output, saved, input, weight, *ctx.geometry, *needs, _allows_tf32(input))
        return *[g if need else None for g, need in zip(gradients, needs, strict=True)], None


def _run(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    pool: tuple[int, ...],
) -> Tensor:
    if torch._C._is_any_autocast_enabled():
        dtype = autocast_dtype(input)
        if dtype is not None:
            input, weight = autocast_cast(input, dtype), autocast_cast(weight, dtype)
            bias = None if bias is None else autocast_cast(bias, dtype)
    geometry = _read_geometry(dims, weight, stride, padding, dilation, groups) + pool
    batched = input.dim() == dims + 2
    if not batched:
        if input.dim() != dims + 1:
            raise ValueError(f"input must have {dims + 1} or {dims + 2} dimensions, got {input.dim()}")
        input = input.unsqueeze(0)
    if needs_autograd(input, weight, bias):
        output: Tensor = _ConvReluPool.apply(input, weight, bias, geometry)
    else:
        output = _forward(input, weight, bias, *geometry, False, _allows_tf32(input))[0]
    return output if batched else output.squeeze(0)


def _checked(name: str, run: Callable[[], Tensor], reference: Callable[[], Tensor], tensors: Sequence[Any]) -> Tensor:
    if torch.compiler.is_compiling():
        return run()
    try:
        return run()
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        explain(error, name, tensors, reference)


def conv1d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution of sequences and ReLU in one operation.

    Equivalent to::

        torch.relu(torch.nn.functional.conv1d(input, weight, bias, stride, padding, dilation, groups))

    Args, Returns, Raises:
        As `conv1d`. For the backward pass the output is kept, no mask.

    Differentiable twice in eager mode; torch.compile sees one node.
    """
    arguments = (input, weight, bias, stride, padding, dilation, groups)
    return _checked(
        "conv1d_relu",
        lambda: _run(1, *arguments, _NO_POOL),
        lambda: conv1d_relu_reference(*arguments),
        (input, weight, bias),
    )


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution of images and ReLU in one operation.

    Equivalent to::

        torch.relu(torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups))

    Args, Returns, Raises:
        As `conv2d`. For the backward pass the output is kept, no mask.

    Differentiable twice in eager mode; torch.compile sees one node.
    """
    arguments = (input, weight, bias, stride, padding, dilation, groups)
    return _checked(
        "conv2d_relu",
        lambda: _run(2, *arguments, _NO_POOL),
        lambda: conv2d_relu_reference(*arguments),
        (input, weight, bias),
    )


def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    pool_size: int | Sequence[int] = 2,
    pool_stride: int | Sequence[int] | None = None,
) -> Tensor:
    """The block of a convolutional network in one operation: convolution, ReLU, max-pooling.

    Equivalent to::

        y = torch.relu(torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups))
        torch.nn.functional.max_pool2d(y, pool_size, pool_stride)

    Neither the convolution's output nor a mask is kept for the backward pass: one byte an element of the result says
    which pixel of its window won. On the CPU, windows that do not overlap and few input channels make a training step
    several times faster than the separate layers.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as `conv2d`.
        pool_size: the window, an int or a pair (vertical, horizontal).
        pool_stride: the step between windows; None for ``pool_size``.

    Returns:
        ``(N, K, U, V)`` or ``(K, U, V)``: the output of the convolution, each extent reduced to
        ``floor((P - pool_size) / pool_stride) + 1``; in the input's memory format.

    Raises:
        What torch raises for the same arguments in its separate functions; TypeError for a dtype outside the four.

    ReLU's gradient at 0 is 0, the first of equal maxima gets the gradient, NaN propagates: all as torch. Differentiable
    twice in eager mode; torch.compile sees one node. Deterministic, and on the CPU bitwise equal for any number of
    threads.

    >>> image, filters = torch.randn(8, 3, 32, 32), torch.randn(64, 3, 3, 3)
    >>> conv2d_relu_max_pool2d(image, filters, padding=1).shape
    torch.Size([8, 64, 16, 16])
    """
    arguments = (input, weight, bias, stride, padding, dilation, groups)

    def run() -> Tensor:
        window = per_dimension(pool_size, 2)
        step = window if pool_stride is None else per_dimension(pool_stride, 2)
        return _run(2, *arguments, (*window, *step))

    return _checked(
        "conv2d_relu_max_pool2d",
        run,
        lambda: conv2d_relu_max_pool2d_reference(*arguments, pool_size=pool_size, pool_stride=pool_stride),
        (input, weight, bias),
    )


def conv1d_relu_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """`conv1d_relu` in plain torch: its definition."""
    return _torch_relu(_torch_conv1d(input, weight, bias, stride, padding, dilation, groups))


def conv2d_relu_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """`conv2d_relu` in plain torch: its definition."""
    return _torch_relu(_torch_conv2d(input, weight, bias, stride, padding, dilation, groups))


def conv2d_relu_max_pool2d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    pool_size: int | Sequence[int] = 2,
    pool_stride: int | Sequence[int] | None = None,
) -> Tensor:
    """`conv2d_relu_max_pool2d` in plain torch: its definition."""
    output = conv2d_relu_reference(input, weight, bias, stride, padding, dilation, groups)
    return _torch_max_pool2d(output, pool_size, pool_stride)


@torch.library.register_fake("pyseqnet::conv_relu_pool_forward")
def _conv_relu_pool_forward_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    conv, pool, with_arg = rest[:_INTEGERS], rest[_INTEGERS:_ALL_INTEGERS], rest[_ALL_INTEGERS]
    pool_h, pool_w, stride_h, stride_w = pool
    output = _conv_forward_fake(input, weight, bias, *conv)
    width = (output.shape[-1] - pool_w) // stride_w + 1
    shape: tuple[int, ...] = (*output.shape[:2], width)
    if output.dim() == 4:
        shape = (*output.shape[:2], (output.shape[2] - pool_h) // stride_h + 1, width)
    output = _empty_as(input, shape, input)
    arg_dtype = torch.uint8 if pool_h * pool_w <= 255 else torch.int32
    pooled = tuple(pool) != _NO_POOL
    arg = torch.empty_like(output, dtype=arg_dtype) if with_arg and pooled else input.new_empty(0, dtype=arg_dtype)
    return output, arg


@torch.library.register_fake("pyseqnet::conv_relu_pool_backward")
def _conv_relu_pool_backward_fake(
    grad_output: Tensor, saved: Tensor, input: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_input, need_weight, need_bias = rest[_ALL_INTEGERS : _ALL_INTEGERS + 3]
    same_device("conv_relu_pool", grad_output, saved, input, weight)

    def nothing() -> Tensor:
        return grad_output.new_empty(0)

    gx = _empty_as(input, input.shape, input) if need_input else nothing()
    gw = _empty_as(weight, weight.shape, weight) if need_weight else nothing()
    gb = grad_output.new_empty(weight.shape[0]) if need_bias else nothing()
    return gx, gw, gb
