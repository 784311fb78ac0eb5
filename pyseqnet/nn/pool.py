"""Max-pooling layers: torch's own, computed by our kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import MaxPool1d as _TorchMaxPool1d
from torch.nn import MaxPool2d as _TorchMaxPool2d

from pyseqnet import functional as F


class MaxPool1d(_TorchMaxPool1d):
    """Drop-in for `torch.nn.MaxPool1d`; see `pyseqnet.functional.max_pool1d`."""

    def forward(self, input: Tensor) -> Any:
        return F.max_pool1d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )


class MaxPool2d(_TorchMaxPool2d):
    """Drop-in for `torch.nn.MaxPool2d`; see `pyseqnet.functional.max_pool2d`."""

    def forward(self, input: Tensor) -> Any:
        return F.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )
