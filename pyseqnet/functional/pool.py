"""Max-pooling: max_pool1d, max_pool2d.

Yamaguchi, Sakamoto, Akabane, Fujimoto: A neural network for speaker-independent isolated word recognition, 1990.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyseqnet.functional._common import creates_graph, explain, needs_autograd, per_dimension, same_device
from pyseqnet.functional.conv import _empty_as

_forward = torch.ops.pyseqnet.max_pool_forward.default
_backward = torch.ops.pyseqnet.max_pool_backward.default
_indices = torch.ops.pyseqnet.max_pool_indices.default
_torch_max_pool1d: Any = torch.nn.functional.max_pool1d
_torch_max_pool2d: Any = torch.nn.functional.max_pool2d


class _Geometry(NamedTuple):
    """The integers of max_pool_forward, in its order. One dimension is an image of height 1."""

    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    ceil_mode: bool


def _read_geometry(
    dims: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    ceil_mode: bool,
) -> tuple[Any, ...]:
    """The integers of `_Geometry` as a plain tuple: this runs on every call, and a named one costs 0.3 us."""
    if type(ceil_mode) is not bool:
        raise TypeError(f"ceil_mode must be bool, not {type(ceil_mode).__name__}")
    kernel = per_dimension(kernel_size, dims)
    # torch's own functions pass an empty list for "as the kernel"
    is_default = stride is None or (isinstance(stride, (tuple, list)) and len(stride) == 0)
    strides = kernel if is_default else per_dimension(stride, dims)  # type: ignore[arg-type]
    pads, dilations = per_dimension(padding, dims), per_dimension(dilation, dims)
    if dims == 1:
        return (1, kernel[0], 1, strides[0], 0, pads[0], 1, dilations[0], ceil_mode)
    return (*kernel, *strides, *pads, *dilations, ceil_mode)


def _extent(size: int, taps: int, pad: int, stride: int, dilation: int, ceil_mode: bool) -> int:
    """Output extent; with ceil_mode the last window must start inside the image or its left padding."""
    room = size + 2 * pad - dilation * (taps - 1) - 1
    if not ceil_mode:
        return room // stride + 1
    extent = (room + stride - 1) // stride + 1
    return extent - 1 if (extent - 1) * stride >= size + pad else extent


class _MaxPool(torch.autograd.Function):
    """Keeps one byte an output element (the window-local argmax), not the input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, geometry: tuple[Any, ...], return_indices: bool) -> Any:
        output, arg = _forward(input, *geometry, True)
        ctx.save_for_backward(arg)
        ctx.geometry = geometry
        ctx.height = input.shape[2] if input.dim() == 4 else 1
        ctx.width = input.shape[-1]
        if not return_indices:
            return output
        indices = _indices(arg, ctx.height, ctx.width, *geometry)
        ctx.mark_non_differentiable(indices)
        return output, indices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_output = grads[0]
        (arg,) = ctx.saved_tensors
        if creates_graph():
            # Linear in grad_output: a scatter in plain torch, differentiable any number of times.
            indices = _indices(arg, ctx.height, ctx.width, *ctx.geometry)
            image = grad_output.shape[:2]
            flat = grad_output.new_zeros((*image, ctx.height * ctx.width))
            flat = flat.scatter_add(2, indices.reshape(*image, -1), grad_output.reshape(*image, -1))
            shape = (ctx.width,) if grad_output.dim() == 3 else (ctx.height, ctx.width)
            return flat.reshape(*image, *shape), None, None
        return _backward(grad_output, arg, ctx.height, ctx.width, *ctx.geometry), None, None


def _pool(dims: int, input: Tensor, geometry: tuple[Any, ...], return_indices: bool) -> Any:
    batched = input.dim() == dims + 2
    if not batched:
        if input.dim() != dims + 1:
            raise ValueError(f"input must have {dims + 1} or {dims + 2} dimensions, got {input.dim()}")
        input = input.unsqueeze(0)
    indices = None
    if needs_autograd(input):
        result = _MaxPool.apply(input, geometry, return_indices)
        output, indices = result if return_indices else (result, None)
    else:
        output, arg = _forward(input, *geometry, return_indices)
        if return_indices:
            height = input.shape[2] if dims == 2 else 1
            indices = _indices(arg, height, input.shape[-1], *geometry)
    if not batched:
        output = output.squeeze(0)
        indices = indices.squeeze(0) if indices is not None else None
    return (output, indices) if return_indices else output


def max_pool1d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The maximum of each window of a batch of sequences.

    Equivalent to::

        torch.nn.functional.max_pool1d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)

    Args:
        input: ``(N, C, W)`` or ``(C, W)``; float32, bfloat16, float16 or float64; CPU or CUDA.
        kernel_size: window length, an int or a 1-tuple.
        stride: step between windows; None for ``kernel_size``.
        padding: positions before and after that never win (minus infinity); at most half the window.
        dilation: step between the taps of a window.
        ceil_mode: keep a last window that only partly lies inside.
        return_indices: also return where each maximum was found.

    Returns:
        ``(N, C, Q)`` or ``(C, Q)``; with ``return_indices`` a pair of it and the int64 positions, same shape.

    Raises:
        What torch raises for the same arguments; TypeError for a dtype outside the four.

    NaN propagates; of equal maxima the first takes the gradient. Training keeps one byte an output element (torch:
    eight). Differentiable twice.

    Paper: Yamaguchi et al., A neural network for speaker-independent isolated word recognition, 1990.
    """

    def run() -> Any:
        geometry = _read_geometry(1, kernel_size, stride, padding, dilation, ceil_mode)
        return _pool(1, input, geometry, return_indices)

    if torch.compiler.is_compiling():
        return run()
    try:
        return run()
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        arguments = (input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        explain(error, "max_pool1d", (input,), lambda: _torch_max_pool1d(*arguments))


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The maximum of each window of a batch of images.

    Equivalent to::

        torch.nn.functional.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``; float32, bfloat16, float16 or float64; CPU or CUDA. Contiguous or
            channels-last: the output comes in the input's memory format.
        kernel_size: window extents, an int or a pair (vertical, horizontal), in pixels.
        stride: step between windows; None for ``kernel_size``.
        padding: rings around the image that never win (minus infinity); at most half the window.
        dilation: step between the taps of a window.
        ceil_mode: keep last windows that only partly lie inside.
        return_indices: also return where each maximum was found.

    Returns:
        ``(N, C, P, Q)`` or ``(C, P, Q)``; with ``return_indices`` a pair of it and the int64 positions ``h*W + w``.

    Raises:
        What torch raises for the same arguments; TypeError for a dtype outside the four.

    NaN propagates; of equal maxima the first takes the gradient. Training keeps one byte an output element (torch:
    eight). Differentiable twice.

    Paper: Yamaguchi et al., A neural network for speaker-independent isolated word recognition, 1990.
    """

    def run() -> Any:
        geometry = _read_geometry(2, kernel_size, stride, padding, dilation, ceil_mode)
        return _pool(2, input, geometry, return_indices)

    if torch.compiler.is_compiling():
        return run()
    try:
        return run()
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        arguments = (input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        explain(error, "max_pool2d", (input,), lambda: _torch_max_pool2d(*arguments))


def max_pool1d_reference(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """`max_pool1d` in plain torch: its definition."""
    return _torch_max_pool1d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool2d_reference(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """`max_pool2d` in plain torch: its definition."""
    return _torch_max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


@torch.library.register_fake("pyseqnet::max_pool_forward")
def _max_pool_forward_fake(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    g, with_arg = _Geometry(*rest[:9]), rest[9]
    arg_dtype = torch.uint8 if g.kernel_h * g.kernel_w <= 256 else torch.int32
    width = _extent(input.shape[-1], g.kernel_w, g.pad_w, g.stride_w, g.dilation_w, g.ceil_mode)
    shape: tuple[int, ...] = (input.shape[0], input.shape[1], width)
    if input.dim() == 4:
        height = _extent(input.shape[2], g.kernel_h, g.pad_h, g.stride_h, g.dilation_h, g.ceil_mode)
        shape = (input.shape[0], input.shape[1], height, width)
    output = _empty_as(input, shape, input)
    arg = torch.empty_like(output, dtype=arg_dtype) if with_arg else input.new_empty(0, dtype=arg_dtype)
    return output, arg


@torch.library.register_fake("pyseqnet::max_pool_backward")
def _max_pool_backward_fake(grad_output: Tensor, arg: Tensor, height: int, width: int, *geometry: Any) -> Tensor:
    same_device("max_pool", grad_output, arg)
    image = grad_output.shape[:2]
    shape = (*image, width) if grad_output.dim() == 3 else (*image, height, width)
    return _empty_as(grad_output, shape, arg)


@torch.library.register_fake("pyseqnet::max_pool_indices")
def _max_pool_indices_fake(arg: Tensor, height: int, width: int, *geometry: Any) -> Tensor:
    return torch.empty_like(arg, dtype=torch.int64)
