"""Locally connected layers: a convolution whose filters are not shared between positions.

Taigman, Yang, Ranzato, Wolf: DeepFace: closing the gap to human-level performance in face verification, 2014.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyseqnet.functional._common import per_dimension

_torch_unfold: Any = torch.nn.functional.unfold


def _columns(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: int | Sequence[int], padding: int | Sequence[int]
) -> Tensor:
    """What each position sees, (N, C*R*S, P*Q), after every check."""
    if weight.dim() != 6:
        raise ValueError(f"weight must have 6 dimensions (P, Q, K, C, R, S), got {weight.dim()}")
    if input.dim() != 4:
        raise ValueError(f"input must have 3 or 4 dimensions (N, C, H, W), got {input.dim()}")
    height, width, filters, channels, *kernel = weight.shape
    if input.shape[1] != channels:
        raise ValueError(f"input must have the weight's {channels} channels, got {input.shape[1]}")
    if bias is not None and bias.shape != (filters, height, width):
        raise ValueError(f"bias must have shape {(filters, height, width)}, got {tuple(bias.shape)}")
    strides, pads = per_dimension(stride, 2), per_dimension(padding, 2)
    if min(strides) < 1 or min(pads) < 0:
        raise ValueError(f"stride must be positive and padding not negative, got stride={stride}, padding={padding}")
    extents = [
        (size + 2 * pad - taps) // step + 1
        for size, pad, taps, step in zip(input.shape[2:], pads, kernel, strides, strict=True)
    ]
    if extents != [height, width]:
        raise ValueError(
            f"weight holds filters for {height} x {width} positions; an input of {input.shape[2]} x {input.shape[3]} "
            f"with stride={stride}, padding={padding} has {extents[0]} x {extents[1]}"
        )
    columns: Tensor = _torch_unfold(input, kernel, 1, pads, strides)
    return columns


def locally_connected2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
) -> Tensor:
    """Filter each position of an image with filters of its own: a convolution without shared parameters.

    Equivalent to::

        columns = torch.nn.functional.unfold(input, (R, S), 1, padding, stride).unflatten(-1, (P, Q))
        torch.einsum("nepq,pqke->nkpq", columns, weight.flatten(3)) + bias

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``; any floating-point dtype; CPU or CUDA.
        weight: ``(P, Q, K, C, R, S)``: K filters for each of the P x Q positions.
        bias: ``(K, P, Q)`` or None.
        stride, padding: as `conv2d`; an int or a pair, in pixels.

    Returns:
        ``(N, K, P, Q)`` or ``(K, P, Q)``.

    Raises:
        ValueError, with the argument's name, where shapes do not fit together.

    One matrix product a position, (N, C*R*S) by (C*R*S, K), computed by torch: every weight is used once an image, so
    reading them is what bounds it. Differentiable any number of times.

    Paper: Taigman et al., DeepFace, 2014.
    """
    batched = input.dim() != 3
    if not batched:
        input = input.unsqueeze(0)
    columns = _columns(input, weight, bias, stride, padding)
    height, width, filters = weight.shape[:3]
    by_position = columns.permute(2, 0, 1)  # (P*Q, N, C*R*S)
    output = torch.bmm(by_position, weight.reshape(height * width, filters, -1).transpose(1, 2))
    output = output.permute(1, 2, 0).contiguous().unflatten(2, (height, width))
    if bias is not None:
        output = output + bias
    return output if batched else output.squeeze(0)


def locally_connected2d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
) -> Tensor:
    """`locally_connected2d` by its definition: the sum over each position's patch."""
    if input.dim() == 3:
        return locally_connected2d_reference(input.unsqueeze(0), weight, bias, stride, padding).squeeze(0)
    columns = _columns(input, weight, bias, stride, padding).unflatten(-1, weight.shape[:2])
    output = torch.einsum("nepq,pqke->nkpq", columns, weight.flatten(3)).contiguous()
    return output if bias is None else output + bias
