"""Convolution layers: torch's own, with the product computed by our kernels; and what is fused with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

# Bound at import: replacing torch.nn.Conv2d by ours later cannot make a class its own base.
from torch.nn import Conv1d as _TorchConv1d
from torch.nn import Conv2d as _TorchConv2d
from torch.nn.functional import pad as _torch_pad

from pyseqnet import functional as F
from pyseqnet.functional._common import per_dimension


def _apply(layer: Any, function: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`function` with the layer's arguments; ``padding_mode`` other than ``"zeros"`` pads with torch first."""
    padding = layer.padding
    if layer.padding_mode != "zeros":
        input = _torch_pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    return function(input, weight, bias, layer.stride, padding, layer.dilation, layer.groups)


class Conv1d(_TorchConv1d):
    """Drop-in for `torch.nn.Conv1d`: same constructor, parameters, ``state_dict``, errors and results.

    ``(N, C, W)`` or ``(C, W)`` to ``(N, K, Q)`` or ``(K, Q)``. See `pyseqnet.functional.conv1d`.
    ``padding_mode`` other than ``"zeros"`` pads with torch first.
    """

    _function: ClassVar[Callable[..., Tensor]] = staticmethod(F.conv1d)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _apply(self, self._function, input, weight, bias)


class Conv2d(_TorchConv2d):
    """Drop-in for `torch.nn.Conv2d`: same constructor, parameters, ``state_dict``, errors and results.

    ``(N, C, H, W)`` or ``(C, H, W)`` to ``(N, K, P, Q)`` or ``(K, P, Q)``. See `pyseqnet.functional.conv2d`.
    ``padding_mode`` other than ``"zeros"`` pads with torch first.
    """

    _function: ClassVar[Callable[..., Tensor]] = staticmethod(F.conv2d)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _apply(self, self._function, input, weight, bias)


class Conv1dReLU(Conv1d):
    """`Conv1d` and ReLU as one operation; constructor and ``state_dict`` of `torch.nn.Conv1d`.

    Equivalent to ``Sequential(Conv1d(...), ReLU())`` with the parameters' names unprefixed. See
    `pyseqnet.functional.conv1d_relu`.
    """

    _function = staticmethod(F.conv1d_relu)


class Conv2dReLU(Conv2d):
    """`Conv2d` and ReLU as one operation; constructor and ``state_dict`` of `torch.nn.Conv2d`.

    Equivalent to ``Sequential(Conv2d(...), ReLU())`` with the parameters' names unprefixed. See
    `pyseqnet.functional.conv2d_relu`.
    """

    _function = staticmethod(F.conv2d_relu)


class Conv2dReLUMaxPool2d(Conv2d):
    """`Conv2d`, ReLU and max-pooling as one operation; ``state_dict`` of `torch.nn.Conv2d`.

    Equivalent to ``Sequential(Conv2d(...), ReLU(), MaxPool2d(pool_size, pool_stride))`` with the parameters' names
    unprefixed: `torch.nn.Conv2d`'s constructor, and two keywords. See `pyseqnet.functional.conv2d_relu_max_pool2d`;
    `Sequential` does the same for layers that stand in a row.

    Args:
        pool_size: the window, an int or a pair (vertical, horizontal).
        pool_stride: the step between windows; None for ``pool_size``.

    >>> Conv2dReLUMaxPool2d(3, 64, 3, padding=1)(torch.zeros(8, 3, 32, 32)).shape
    torch.Size([8, 64, 16, 16])
    """

    def __init__(
        self,
        *args: Any,
        pool_size: int | Sequence[int] = 2,
        pool_stride: int | Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.pool_size = per_dimension(pool_size, 2)
        self.pool_stride = self.pool_size if pool_stride is None else per_dimension(pool_stride, 2)
        if min(*self.pool_size, *self.pool_stride) < 1:
            raise ValueError(
                f"pool_size and pool_stride must be positive, got pool_size={pool_size}, pool_stride={pool_stride}"
            )

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        def function(*arguments: Any) -> Tensor:
            return F.conv2d_relu_max_pool2d(*arguments, pool_size=self.pool_size, pool_stride=self.pool_stride)

        return _apply(self, function, input, weight, bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pool_size={self.pool_size}, pool_stride={self.pool_stride}"
