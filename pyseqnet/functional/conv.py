"""Convolution (cross-correlation): conv1d, conv2d.

LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition, 1998.
Dumoulin, Visin: A guide to convolution arithmetic for deep learning, 2016.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyseqnet._compilers import constant_result
from pyseqnet.functional._common import (
    aliases,
    autocast_cast,
    autocast_dtype,
    creates_graph,
    explain,
    integer,
    needs_autograd,
    per_dimension,
    same_device,
)

_forward = torch.ops.pyseqnet.conv_forward.default
_backward = torch.ops.pyseqnet.conv_backward.default
# Bound at import: replacing torch.nn.functional's functions by ours later cannot make the reference recurse.
_torch_conv1d: Any = torch.conv1d
_torch_conv2d: Any = torch.conv2d
_torch_pad = torch.nn.functional.pad


class _Geometry(NamedTuple):
    """The integers of conv_forward, in its order. One dimension is an image of height 1."""

    stride_h: int
    stride_w: int
    pad_top: int
    pad_left: int
    pad_bottom: int
    pad_right: int
    dilation_h: int
    dilation_w: int
    groups: int


_INTEGERS = len(_Geometry._fields)


@constant_result
def _torch_allows_tf32() -> bool:
    return bool(torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32")


def _allows_tf32(input: Tensor) -> bool:
    """Whether torch's settings let this convolution multiply in TF32: `torch.backends.cudnn.allow_tf32`,
    `torch.backends.cudnn.conv.fp32_precision`. A compiled function keeps what held when it was traced."""
    return input.is_cuda and input.dtype is torch.float32 and _torch_allows_tf32()


def _read_padding_name(
    padding: str, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Padding before and after each dimension. 'same' puts the odd one after, as torch does."""
    if padding == "valid":
        zeros = (0,) * len(kernel)
        return zeros, zeros
    if padding != "same":
        raise ValueError(f"Invalid padding string: {padding!r}")
    if any(s != 1 for s in stride):
        raise ValueError("padding='same' is not supported for strided convolutions")
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)


def _read_geometry(
    dims: int,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[int, ...]:
    """The integers of `_Geometry` as a plain tuple: this runs on every call, and a named one costs 0.3 us."""
    if weight.dim() != dims + 2:
        raise ValueError(f"weight must have {dims + 2} dimensions, got {weight.dim()}")
    strides, dilations = per_dimension(stride, dims), per_dimension(dilation, dims)
    if type(groups) is not int:
        groups = integer(groups)
    if isinstance(padding, str):
        before, after = _read_padding_name(padding, weight.shape[2:], strides, dilations)
    else:
        before = after = per_dimension(padding, dims)
    if dims == 1:
        return (1, strides[0], 0, before[0], 0, after[0], 1, dilations[0], groups)
    return (*strides, *before, *after, *dilations, groups)


def _reference(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[int, ...]) -> Tensor:
    """Plain torch, differentiable any number of times; batched input."""
    g = _Geometry(*geometry)
    if g.pad_top != g.pad_bottom or g.pad_left != g.pad_right:
        amounts = (g.pad_left, g.pad_right) + ((g.pad_top, g.pad_bottom) if weight.dim() == 4 else ())
        input = _torch_pad(input, amounts)
        g = g._replace(pad_top=0, pad_left=0, pad_bottom=0, pad_right=0)
    if weight.dim() == 3:
        return _torch_conv1d(input, weight, bias, g.stride_w, g.pad_left, g.dilation_w, g.groups)
    return _torch_conv2d(
        input,
        weight,
        bias,
        (g.stride_h, g.stride_w),
        (g.pad_top, g.pad_left),
        (g.dilation_h, g.dilation_w),
        g.groups,
    )


class _Conv(torch.autograd.Function):
    """ctx in forward on purpose: setup_context costs 14 us a call."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.geometry = geometry
        return _forward(input, weight, bias, *geometry, _allows_tf32(input))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grads
        input, weight = ctx.saved_tensors
        needs = need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        if creates_graph():
            input, weight = aliases(input, weight)
            wanted = [t for t, need in ((input, need_input), (weight, need_weight)) if need]
            found: list[Tensor | None] = []
            if wanted:
                output = _reference(input, weight, None, ctx.geometry)
                found = list(torch.autograd.grad(output, wanted, grad_output, create_graph=True))
            grad_input = found.pop(0) if need_input else None
            grad_weight = found.pop(0) if need_weight else None
            grad_bias = grad_output.sum([0, *range(2, grad_output.dim())]) if need_bias else None
            return grad_input, grad_weight, grad_bias, None
        gx, gw, gb = _backward(grad_output, input, weight, *ctx.geometry, *needs, _allows_tf32(input))
        return gx if need_input else None, gw if need_weight else None, gb if need_bias else None, None


def _convolve(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> Tensor:
    if torch._C._is_any_autocast_enabled():
        dtype = autocast_dtype(input)
        if dtype is not None:
            input, weight = autocast_cast(input, dtype), autocast_cast(weight, dtype)
            bias = None if bias is None else autocast_cast(bias, dtype)
    geometry = _read_geometry(dims, weight, stride, padding, dilation, groups)
    batched = input.dim() == dims + 2
    if not batched:
        if input.dim() != dims + 1:
            raise ValueError(f"input must have {dims + 1} or {dims + 2} dimensions, got {input.dim()}")
        input = input.unsqueeze(0)
    if needs_autograd(input, weight, bias):
        output: Tensor = _Conv.apply(input, weight, bias, geometry)
    else:
        output = _forward(input, weight, bias, *geometry, _allows_tf32(input))
    return output if batched else output.squeeze(0)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve a batch of sequences with a bank of filters.

    Equivalent to::

        torch.nn.functional.conv1d(input, weight, bias, stride, padding, dilation, groups)

    Args:
        input: ``(N, C, W)`` or ``(C, W)``; float32, bfloat16, float16 or float64; CPU or CUDA.
        weight: ``(K, C/groups, S)``, the input's dtype and device.
        bias: ``(K)`` or None.
        stride, dilation: an int or a 1-tuple, in samples.
        padding: an int, a 1-tuple, ``"valid"`` (none) or ``"same"`` (stride 1 only; an odd one goes after).
        groups: ``C`` and ``K`` are split into this many independent parts.

    Returns:
        ``(N, K, Q)`` or ``(K, Q)``, ``Q = floor((W + padding before and after - dilation*(S-1) - 1) / stride) + 1``.

    Raises:
        What torch raises for the same arguments; TypeError for a dtype outside the four.

    Differentiable twice; torch.compile sees one node. Accumulates in float32 (float64 for float64), is deterministic,
    and on the CPU bitwise equal for any number of threads.

    Paper: LeCun et al., Gradient-based learning applied to document recognition, 1998.
    """
    if torch.compiler.is_compiling():
        return _convolve(1, input, weight, bias, stride, padding, dilation, groups)
    try:
        return _convolve(1, input, weight, bias, stride, padding, dilation, groups)
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        arguments = (input, weight, bias, stride, padding, dilation, groups)
        explain(error, "conv1d", arguments[:3], lambda: _torch_conv1d(*arguments))


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve a batch of images with a bank of filters.

    Equivalent to::

        torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``; float32, bfloat16, float16 or float64; CPU or CUDA. Contiguous or
            channels-last: the output comes in the input's memory format.
        weight: ``(K, C/groups, R, S)``, the input's dtype and device.
        bias: ``(K)`` or None.
        stride, dilation: an int or a pair (vertical, horizontal), in pixels.
        padding: an int, a pair, ``"valid"`` (none) or ``"same"`` (stride 1 only; an odd one goes below and right).
        groups: ``C`` and ``K`` are split into this many independent parts; ``groups == C`` is depthwise.

    Returns:
        ``(N, K, P, Q)`` or ``(K, P, Q)``, each extent ``floor((H + padding - dilation*(R-1) - 1) / stride) + 1``.

    Raises:
        What torch raises for the same arguments; TypeError for a dtype outside the four.

    Differentiable twice; torch.compile sees one node. Accumulates in float32 (float64 for float64), is deterministic,
    and on the CPU bitwise equal for any number of threads. 3x3 convolutions with many channels may run as Winograd
    F(4x4,3x3) on the CPU (rms error at most 2e-6 of the largest magnitude); ``PYSEQNET_WINOGRAD=0`` turns it off.

    Paper: LeCun et al., Gradient-based learning applied to document recognition, 1998.
    """
    if torch.compiler.is_compiling():
        return _convolve(2, input, weight, bias, stride, padding, dilation, groups)
    try:
        return _convolve(2, input, weight, bias, stride, padding, dilation, groups)
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        arguments = (input, weight, bias, stride, padding, dilation, groups)
        explain(error, "conv2d", arguments[:3], lambda: _torch_conv2d(*arguments))


def conv1d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """`conv1d` in plain torch: its definition, and what its double backward differentiates."""
    return _torch_conv1d(input, weight, bias, stride, padding, dilation, groups)


def conv2d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """`conv2d` in plain torch: its definition, and what its double backward differentiates."""
    return _torch_conv2d(input, weight, bias, stride, padding, dilation, groups)


def _empty_as(tensor: Tensor, shape: Sequence[int], format_of: Tensor) -> Tensor:
    """An empty tensor in the memory format that `format_of` suggests, as the C++ side allocates it."""
    if len(shape) == 4:
        suggested = torch._prims_common.suggest_memory_format(format_of)
        return tensor.new_empty(shape).to(memory_format=suggested)
    return tensor.new_empty(shape)


@torch.library.register_fake("pyseqnet::conv_forward")
def _conv_forward_fake(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    g = _Geometry(*rest[:_INTEGERS])
    same_device("conv", input, weight, bias)
    if input.shape[1] != weight.shape[1] * g.groups:
        raise RuntimeError(
            f"Given groups={g.groups}, weight of size {list(weight.shape)}, expected input{list(input.shape)} to have "
            f"{weight.shape[1] * g.groups} channels, but got {input.shape[1]} channels instead"
        )

    def extent(size: int, taps: int, pad: int, stride: int, dilation: int) -> int:
        return (size + pad - dilation * (taps - 1) - 1) // stride + 1

    width = extent(input.shape[-1], weight.shape[-1], g.pad_left + g.pad_right, g.stride_w, g.dilation_w)
    if input.dim() == 3:
        return input.new_empty((input.shape[0], weight.shape[0], width))
    height = extent(input.shape[2], weight.shape[2], g.pad_top + g.pad_bottom, g.stride_h, g.dilation_h)
    return _empty_as(input, (input.shape[0], weight.shape[0], height, width), input)


@torch.library.register_fake("pyseqnet::conv_backward")
def _conv_backward_fake(
    grad_output: Tensor, input: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_input, need_weight, need_bias = rest[_INTEGERS : _INTEGERS + 3]
    same_device("conv", grad_output, input, weight)

    def nothing() -> Tensor:
        return grad_output.new_empty(0)

    gx = _empty_as(input, input.shape, input) if need_input else nothing()
    gw = _empty_as(weight, weight.shape, weight) if need_weight else nothing()
    gb = grad_output.new_empty(weight.shape[0]) if need_bias else nothing()
    return gx, gw, gb
