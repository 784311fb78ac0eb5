"""Convolution layers: torch's own, with the product computed by our kernels."""

from __future__ import annotations

from torch import Tensor

# Bound at import: replacing torch.nn.Conv2d by ours later cannot make a class its own base.
from torch.nn import Conv1d as _TorchConv1d
from torch.nn import Conv2d as _TorchConv2d
from torch.nn.functional import pad as _torch_pad

from pyseqnet import functional as F


class Conv1d(_TorchConv1d):
    """Drop-in for `torch.nn.Conv1d`: same constructor, parameters, ``state_dict``, errors and results.

    ``(N, C, W)`` or ``(C, W)`` to ``(N, K, Q)`` or ``(K, Q)``. See `pyseqnet.functional.conv1d`.
    ``padding_mode`` other than ``"zeros"`` pads with torch first.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            input = _torch_pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return F.conv1d(input, weight, bias, self.stride, 0, self.dilation, self.groups)
        return F.conv1d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class Conv2d(_TorchConv2d):
    """Drop-in for `torch.nn.Conv2d`: same constructor, parameters, ``state_dict``, errors and results.

    ``(N, C, H, W)`` or ``(C, H, W)`` to ``(N, K, P, Q)`` or ``(K, P, Q)``. See `pyseqnet.functional.conv2d`.
    ``padding_mode`` other than ``"zeros"`` pads with torch first.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            input = _torch_pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return F.conv2d(input, weight, bias, self.stride, 0, self.dilation, self.groups)
        return F.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
