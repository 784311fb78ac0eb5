"""Convolution, bias, ReLU and max-pooling as one operation, against the separate layers."""

from __future__ import annotations

import math
from collections.abc import Callable

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


def network(
    name: str, batch: int, channels: int, size: int, filters: tuple[int, int], kernel: int, *, classes: int = 10
) -> Case:
    """A whole small network's training step: convolution, ReLU, max-pooling twice, and a linear layer."""
    first, second = filters
    half, quarter = size // 2, size // 4
    shapes = {
        "weight1": (first, channels, kernel, kernel),
        "bias1": (first,),
        "weight2": (second, first, kernel, kernel),
        "bias2": (second,),
        "weight3": (classes, second * quarter * quarter),
        "bias3": (classes,),
    }
    counts = {key: math.prod(shape) for key, shape in shapes.items()}
    block1 = 2.0 * batch * size * size * counts["weight1"]
    block2 = 2.0 * batch * half * half * counts["weight2"]
    linear = 2.0 * batch * counts["weight3"]
    parameters, x_count = sum(counts.values()), batch * channels * size * size
    maps = batch * (first * half * half + second * quarter * quarter)

    def make(generator: torch.Generator) -> Inputs:
        inputs = {"input": torch.randn(batch, channels, size, size, generator=generator)}
        for key, shape in shapes.items():
            scale = math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 1.0
            inputs[key] = torch.randn(shape, generator=generator) / scale
        return inputs

    def forward(block: Callable[..., torch.Tensor], inputs: Inputs) -> torch.Tensor:
        x = block(inputs["input"], inputs["weight1"], inputs["bias1"])
        x = block(x, inputs["weight2"], inputs["bias2"])
        return torch_F.linear(x.flatten(1), inputs["weight3"], inputs["bias3"])

    def ours(**inputs: torch.Tensor) -> torch.Tensor:
        return forward(lambda *of: F.conv2d_relu_max_pool2d(*of, padding=kernel // 2), inputs)

    def theirs(**inputs: torch.Tensor) -> torch.Tensor:
        return forward(lambda *of: torch_F.max_pool2d(torch_F.conv2d(*of, padding=kernel // 2).relu(), 2), inputs)

    def channels_last(inputs: Inputs) -> Inputs:
        return {
            key: tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
            for key, tensor in inputs.items()
        }

    def tolerance(dtype: torch.dtype) -> Tolerance:
        # two layers: a winner that rounding exchanges moves a whole gradient
        return Tolerance(rms=1e-4, maximum=1e-2) if dtype is torch.float32 else Tolerance()

    return Case(
        family="conv_relu_pool",
        name=name,
        shapes=f"{batch}x{channels}x{size}x{size} -> {first} -> {second} -> {classes}, k{kernel}, ReLU, pool 2",
        make=make,
        ours=ours,
        torch=theirs,
        forward=Cost(block1 + block2 + linear, x_count + parameters + maps),
        # a quarter of the pixels has a gradient; images want none
        backward=Cost(block1 / 4 + block2 / 2 + 2 * linear, x_count + 2 * parameters + 2 * maps),
        gradients=tuple(shapes),
        tolerance=tolerance,
        user=Rival("channels_last", theirs, channels_last),
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
    network("network_1_32_64_k5_28", 64, 1, 28, (32, 64), 5),
    network("network_3_32_64_k3_32", 32, 3, 32, (32, 64), 3),
]
