"""Max-pooling: windows with and without overlap, padding, layouts, one and two dimensions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as torch_F
from torch import Tensor

import pyseqnet.functional as F
from bench.case import Case, Cost, Inputs, Rival, Tolerance


def pool(
    name: str,
    shape: tuple[int, ...],
    window: int,
    *,
    stride: int | None = None,
    padding: int = 0,
    dilation: int = 1,
    ceil_mode: bool = False,
    channels_last: bool = False,
    user: Rival | None = None,
    dtypes: tuple[str, ...] = ("f32",),
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> Case:
    dims = len(shape) - 2
    stride = window if stride is None else stride
    options = {"stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil_mode}
    ours, theirs = (F.max_pool1d, torch_F.max_pool1d) if dims == 1 else (F.max_pool2d, torch_F.max_pool2d)

    def make(generator: torch.Generator) -> Inputs:
        x = torch.randn(shape, generator=generator)
        return {"input": x.contiguous(memory_format=torch.channels_last) if channels_last else x}

    def to_channels_last(inputs: Inputs) -> Inputs:
        return {"input": inputs["input"].contiguous(memory_format=torch.channels_last)}

    if user is None and dims == 2 and not channels_last:
        user = Rival("channels_last", lambda input: theirs(input, window, **options), to_channels_last)
    x_count = math.prod(shape)
    y_count = theirs(torch.empty(shape, device="meta"), window, **options).numel()
    words = "x".join(map(str, shape)) + f", window {window}"
    for key, value, default in (("s", stride, window), ("p", padding, 0), ("d", dilation, 1)):
        words += f" {key}{value}" if value != default else ""
    words += " ceil" if ceil_mode else ""
    return Case(
        family="pool",
        name=name,
        shapes=words,
        make=make,
        ours=lambda input: ours(input, window, **options),
        torch=lambda input: theirs(input, window, **options),
        # comparisons count as operations; a step with gradients also writes and reads one byte of argmax
        forward=Cost(y_count * (window**dims - 1.0), x_count + y_count),
        backward=Cost(0.0, y_count + x_count, 2 * y_count),
        gradients=("input",),
        tolerance=lambda dtype: Tolerance(exact_forward=True),
        user=user,
        dtypes=dtypes,
        devices=devices,
    )


def _maximum_of_views(input: Tensor) -> Tensor:
    """A 2x2 pool without a pool: what is often written by hand."""
    n, c, h, w = input.shape
    return input.view(n, c, h // 2, 2, w // 2, 2).amax((3, 5))


BOTH = ("f32", "bf16")

CASES = [
    pool("2x2_64_32", (32, 64, 32, 32), 2, dtypes=BOTH),
    pool("2x2_64_32_by_hand", (32, 64, 32, 32), 2, user=Rival("amax of a view", _maximum_of_views)),
    pool("2x2_64_32_channels_last", (32, 64, 32, 32), 2, channels_last=True, dtypes=BOTH),
    pool("2x2_32_28_ceil", (64, 32, 27, 27), 2, ceil_mode=True),
    pool("3x3_s2_64_112", (8, 64, 112, 112), 3, stride=2, padding=1, dtypes=BOTH),
    pool(
        "3x3_s2_64_112_channels_last",
        (8, 64, 112, 112),
        3,
        stride=2,
        padding=1,
        channels_last=True,
        dtypes=BOTH,
    ),
    # a gradient of more than 32 MiB: memory that the C library maps afresh every time
    pool("3x3_s2_64_112_batch_16", (16, 64, 112, 112), 3, stride=2, padding=1),
    pool("3x3_s1_192_28", (4, 192, 28, 28), 3, stride=1, padding=1),
    pool("5x5_s1_256_20", (2, 256, 20, 20), 5, stride=1, padding=2),
    pool("3x3_dilated_64_28", (8, 64, 28, 28), 3, stride=1, dilation=2),
    pool("7x7_global_512", (16, 512, 7, 7), 7),
    pool("2x2_single_64_14", (1, 64, 14, 14), 2),
    pool("1d_k2_64_512", (64, 64, 512), 2, dtypes=BOTH),
    pool("1d_k3_s2_128_256", (32, 128, 256), 3, stride=2, padding=1),
    pool("1d_over_time_100_46", (32, 100, 46), 46),
    # a GPU's sizes
    pool("resnet50_stem_nchw", (64, 64, 112, 112), 3, stride=2, padding=1, dtypes=("bf16",), devices=("cuda",)),
    pool(
        "resnet50_stem",
        (64, 64, 112, 112),
        3,
        stride=2,
        padding=1,
        channels_last=True,
        dtypes=("bf16",),
        devices=("cuda",),
    ),
]
