"""The locally connected layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyseqnet import functional as F
from pyseqnet.functional._common import per_dimension


class LocallyConnected2d(torch.nn.Module):
    """A convolution whose filters are not shared: each position of the output has its own (Taigman et al., 2014).

    ``(N, C, H, W)`` or ``(C, H, W)`` to ``(N, K, P, Q)`` or ``(K, P, Q)``, with (H, W) = `input_size`. Parameters:
    ``weight`` (P, Q, K, C, R, S) and ``bias`` (K, P, Q). See `pyseqnet.functional.locally_connected2d`.

    Where features belong to places (an aligned face) this fits better than `Conv2d`; it costs P*Q times the parameters
    and gives up that a shifted input gives a shifted output.

    >>> layer = LocallyConnected2d(3, 64, 3, input_size=100, padding=1, bias=False)
    >>> sum(p.numel() for p in layer.parameters())
    17280000
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        input_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.input_size = per_dimension(kernel_size, 2), per_dimension(input_size, 2)
        self.stride, self.padding = per_dimension(stride, 2), per_dimension(padding, 2)
        if min(in_channels, out_channels, *self.kernel_size, *self.stride) < 1 or min(self.padding) < 0:
            raise ValueError(
                "in_channels, out_channels, kernel_size and stride must be positive and padding not negative; got "
                f"{in_channels}, {out_channels}, {kernel_size}, {stride} and {padding}"
            )
        self.output_size = tuple(
            (size + 2 * pad - taps) // step + 1
            for size, pad, taps, step in zip(self.input_size, self.padding, self.kernel_size, self.stride, strict=True)
        )
        if min(self.output_size) < 1:
            raise ValueError(f"kernel_size {kernel_size} is larger than the padded input_size {input_size}")
        shape = (*self.output_size, out_channels, in_channels, *self.kernel_size)
        self.weight = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias: torch.nn.Parameter | None = None
        if bias:
            self.bias = torch.nn.Parameter(torch.empty(out_channels, *self.output_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `torch.nn.Conv2d`: uniform, within one over the square root of the number of inputs of a neuron."""
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        return F.locally_connected2d(input, self.weight, self.bias, self.stride, self.padding)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, input_size={self.input_size}, "
            f"stride={self.stride}, padding={self.padding}, bias={self.bias is not None}"
        )
