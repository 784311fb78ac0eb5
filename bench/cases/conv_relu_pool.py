"""Convolution, bias, ReLU and max-pooling as one operation, against the separate layers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as torch_F

import pyseqnet.functional as F
from bench.case import Case, Cost, Inputs, Rival, Tolerance

# Winograd's accepted error; the same numbers as in the tests of the kernels.
WINOGRAD_RMS, WINOGRAD_MAXIMUM = 2e-6, 5e-6


def block(
    name: str,
    batch: int,
    channels: int,
    size: int,
    filters: int,
    kernel: int,
    *,
    pool: int = 2,
    channels_last: bool = False,
    dtypes: tuple[str, ...] = ("f32",),
) -> Case:
    padding = kernel // 2
    pooled = size // pool
    x_shape, w_shape = (batch, channels, size, size), (filters, channels, kernel, kernel)
    x_count, w_count, y_count = math.prod(x_shape), math.prod(w_shape), batch * filters * pooled * pooled
    flops = 2.0 * batch * filters * size * size * math.prod(w_shape[1:])

    def make(generator: torch.Generator) -> Inputs:
        inputs = {
            "input": torch.randn(x_shape, generator=generator),
            "weight": torch.randn(w_shape, generator=generator) / math.sqrt(math.prod(w_shape[1:])),
            "bias": torch.randn(filters, generator=generator),
        }
        return to_channels_last(inputs) if channels_last else inputs

    def to_channels_last(inputs: Inputs) -> Inputs:
        return {
            key: tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
            for key, tensor in inputs.items()
        }

    def ours(**inputs: torch.Tensor) -> torch.Tensor:
        if pool == 1:
            return F.conv2d_relu(**inputs, padding=padding)
        return F.conv2d_relu_max_pool2d(**inputs, padding=padding, pool_size=pool)

    def theirs(**inputs: torch.Tensor) -> torch.Tensor:
        output = torch_F.relu(torch_F.conv2d(**inputs, padding=padding))
        return output if pool == 1 else torch_F.max_pool2d(output, pool)

    def tolerance(dtype: torch.dtype) -> Tolerance:
        if dtype is torch.float32 and kernel == 3:
            return Tolerance(rms=WINOGRAD_RMS, maximum=WINOGRAD_MAXIMUM)
        return Tolerance()

    kept = y_count if pool > 1 else 0  # bytes of argmax
    words = f"{batch}x{channels}x{size}x{size} -> {filters}, k{kernel}, ReLU" + (f", pool {pool}" if pool > 1 else "")
    return Case(
        family="conv_relu_pool",
        name=name,
        shapes=words,
        make=make,
        ours=ours,
        torch=theirs,
        forward=Cost(flops, x_count + w_count + filters + y_count),
        # one pixel of a window has a gradient: of the dense products of both gradients, that part is useful
        backward=Cost(2 * flops / pool**2, y_count + 2 * (x_count + w_count) + filters, 2 * kept),
        gradients=("input", "weight", "bias"),
        tolerance=tolerance,
        user=None if channels_last else Rival("channels_last", theirs, to_channels_last),
        dtypes=dtypes,
    )


BOTH = ("f32", "bf16")

CASES = [
    block("1_32_k5_28", 64, 1, 28, 32, 5, dtypes=BOTH),
    block("3_64_k3_32", 32, 3, 32, 64, 3, dtypes=BOTH),
    block("32_64_k3_14", 64, 32, 14, 64, 3, dtypes=BOTH),
    block("64_64_k3_56", 4, 64, 56, 64, 3),
    block("16_32_k5_28", 32, 16, 28, 32, 5),
    block("3_64_k3_32_channels_last", 32, 3, 32, 64, 3, channels_last=True),
    block("3_32_k3_33_pool3", 32, 3, 33, 32, 3, pool=3),
    block("relu_1_32_k5_28", 64, 1, 28, 32, 5, pool=1),
    block("relu_3_64_k3_32", 32, 3, 32, 64, 3, pool=1),
    block("relu_32_64_k3_14", 64, 32, 14, 64, 3, pool=1),
    block("relu_64_256_k1_28", 4, 64, 28, 256, 1, pool=1),
]
