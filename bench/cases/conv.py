"""Convolution: dense, pointwise, strided, grouped, depthwise; one and two dimensions."""

from __future__ import annotations

import math
import os

import torch
import torch.nn.functional as torch_F

import pyseqnet.functional as F
from bench.case import Case, Cost, Inputs, Rival, Tolerance

# Winograd's accepted error; the same numbers as in the tests of the kernels.
WINOGRAD_RMS, WINOGRAD_MAXIMUM = 2e-6, 5e-6


def _output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def conv(
    name: str,
    batch: int,
    channels: int,
    size: tuple[int, ...],
    filters: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    channels_last: bool = False,
    dtypes: tuple[str, ...] = ("f32",),
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> Case:
    dims = len(size)
    x_shape = (batch, channels, *size)
    w_shape = (filters, channels // groups, *[kernel] * dims)
    y_shape = (batch, filters, *(_output_size(extent, kernel, stride, padding, dilation) for extent in size))
    x_count, w_count, y_count = math.prod(x_shape), math.prod(w_shape), math.prod(y_shape)
    flops = 2.0 * y_count * math.prod(w_shape[1:])
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}

    def make(generator: torch.Generator) -> Inputs:
        # The scale torch's own layers start with keeps outputs near 1 in every dtype.
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

    def tolerance(dtype: torch.dtype) -> Tolerance:
        may_be_winograd = kernel == 3 and dims == 2 and stride == dilation == groups == 1
        if dtype is torch.float32 and may_be_winograd and os.environ.get("PYSEQNET_WINOGRAD") != "0":
            return Tolerance(rms=WINOGRAD_RMS, maximum=WINOGRAD_MAXIMUM)
        return Tolerance()

    ours, theirs = (F.conv1d, torch_F.conv1d) if dims == 1 else (F.conv2d, torch_F.conv2d)
    user = None
    if dims == 2 and not channels_last:
        user = Rival("channels_last", lambda **inputs: theirs(**inputs, **options), to_channels_last)
    extents = "x".join(map(str, size))
    words = f"{batch}x{channels}x{extents} -> {filters}, k{kernel}"
    for key, value, default in (("s", stride, 1), ("p", padding, 0), ("d", dilation, 1), ("g", groups, 1)):
        words += f" {key}{value}" if value != default else ""
    return Case(
        family="conv",
        name=name,
        shapes=words,
        make=make,
        ours=lambda **inputs: ours(**inputs, **options),
        torch=lambda **inputs: theirs(**inputs, **options),
        forward=Cost(flops, x_count + w_count + filters + y_count),
        # input and weight gradient cost what forward costs; gy, x and w are read, gx, gw and gb written
        backward=Cost(2 * flops, y_count + 2 * (x_count + w_count) + filters),
        gradients=("input", "weight", "bias"),
        tolerance=tolerance,
        user=user,
        dtypes=dtypes,
        devices=devices,
    )


BOTH = ("f32", "bf16")

CASES = [
    # dense 3x3: the body of residual networks
    conv("dense_64_56", 4, 64, (56, 56), 64, 3, padding=1, dtypes=BOTH),
    conv("dense_256_14", 8, 256, (14, 14), 256, 3, padding=1, dtypes=BOTH),
    conv("dense_32_64_14", 64, 32, (14, 14), 64, 3, padding=1),
    conv("dense_64_56_channels_last", 4, 64, (56, 56), 64, 3, padding=1, channels_last=True, dtypes=BOTH),
    conv("dilated_64_28", 4, 64, (28, 28), 64, 3, padding=2, dilation=2),
    conv("stride2_128_28", 8, 128, (28, 28), 128, 3, stride=2, padding=1),
    # first layers: few channels in
    conv("first_1_32_k5", 64, 1, (28, 28), 32, 5, padding=2, dtypes=BOTH),
    conv("first_3_64_k3", 32, 3, (32, 32), 64, 3, padding=1, dtypes=BOTH),
    conv("first_3_64_k7_s2", 2, 3, (224, 224), 64, 7, stride=2, padding=3),
    # pointwise
    conv("pointwise_64_256", 4, 64, (56, 56), 256, 1, dtypes=BOTH),
    conv("pointwise_256_64_channels_last", 4, 256, (56, 56), 64, 1, channels_last=True),
    conv("pointwise_stride2_256_512", 4, 256, (28, 28), 512, 1, stride=2),
    # groups and depthwise
    conv("groups32_128", 4, 128, (28, 28), 128, 3, padding=1, groups=32),
    conv("depthwise_96_k7", 2, 96, (56, 56), 96, 7, padding=3, groups=96, dtypes=BOTH),
    conv("depthwise_144_k3", 4, 144, (56, 56), 144, 3, padding=1, groups=144),
    conv("depthwise_144_k3_s2", 4, 144, (56, 56), 144, 3, stride=2, padding=1, groups=144),
    conv("depthwise_96_k7_channels_last", 2, 96, (56, 56), 96, 7, padding=3, groups=96, channels_last=True),
    conv("depthwise1d_256_k31", 8, 256, (400,), 256, 31, padding=15, groups=256, dtypes=BOTH),
    conv("depthwise1d_512_k4_causal", 4, 512, (512,), 512, 4, padding=3, groups=512, dtypes=BOTH),
    conv("depthwise1d_256_k3_d4", 8, 256, (400,), 256, 3, padding=4, dilation=4, groups=256),
    # one image at a time, small maps
    conv("single_64_14", 1, 64, (14, 14), 64, 3, padding=1),
    conv("single_128_7", 1, 128, (7, 7), 128, 3, padding=1),
    conv("single_16_28", 1, 16, (28, 28), 32, 5, padding=2),
    # text
    conv("text1d_300_100_k5", 32, 300, (50,), 100, 5, dtypes=BOTH),
    conv("text1d_128_128_k3", 32, 128, (64,), 128, 3, padding=1),
    # a GPU's sizes: layers of ResNet-50
    *[
        conv(
            f"resnet50_{channels}_{filters}_k{kernel}_{size}",
            64,
            channels,
            (size, size),
            filters,
            kernel,
            stride=stride,
            padding=kernel // 2,
            channels_last=True,
            dtypes=("bf16",),
            devices=("cuda",),
        )
        for channels, filters, kernel, size, stride in (
            (3, 64, 7, 224, 2),
            (64, 64, 3, 56, 1),
            (64, 256, 1, 56, 1),
            (128, 128, 3, 28, 1),
            (256, 256, 3, 14, 1),
            (512, 512, 3, 7, 1),
            (128, 128, 3, 56, 2),
            (256, 512, 1, 56, 2),
        )
    ],
]
