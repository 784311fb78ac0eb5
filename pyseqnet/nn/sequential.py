"""A row of layers that runs neighbouring convolution, ReLU and max-pooling as one operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

# Bound at import: replacing torch.nn.Sequential by ours later cannot make the class its own base.
from torch.nn import Module as _TorchModule
from torch.nn import ReLU as _TorchReLU
from torch.nn import Sequential as _TorchSequential
from torch.nn.modules import module as _torch_module
from torch.nn.utils.parametrize import is_parametrized

from pyseqnet import functional as F
from pyseqnet.functional._common import per_dimension
from pyseqnet.nn.conv import Conv1d, Conv2d
from pyseqnet.nn.pool import MaxPool2d


def _is_exactly(layer: _TorchModule, kind: type) -> bool:
    """Of this class, no subclass with code of its own; parametrisation makes a class a layer, which counts."""
    found = type(layer)
    return found is kind or (found.__bases__ == (kind,) and is_parametrized(layer))


def _is_observed(layer: _TorchModule) -> bool:
    """Whether calling the layer does more than its class's forward: hooks, a forward of its own, compiled alone."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or layer._compiled_call_impl is not None
        or "forward" in layer.__dict__
    )


def _all_layers_are_observed() -> bool:
    return bool(
        _torch_module._global_forward_hooks
        or _torch_module._global_forward_pre_hooks
        or _torch_module._global_backward_hooks
        or _torch_module._global_backward_pre_hooks
    )


def _why_not_pool(pool: Any) -> str:
    """Why this max-pooling cannot be fused with a convolution; empty if it can."""
    if pool.return_indices:
        return "MaxPool2d returns indices"
    if pool.ceil_mode:
        return "MaxPool2d has ceil_mode"
    if per_dimension(pool.padding, 2) != (0, 0):
        return "MaxPool2d has padding"
    if per_dimension(pool.dilation, 2) != (1, 1):
        return "MaxPool2d has dilation"
    return "MaxPool2d is hooked or its call is replaced" if _is_observed(pool) else ""


def fused_run(layers: Sequence[Any], start: int) -> tuple[int, str]:
    """How many layers from `start` run as one operation (0: none), and why it is not more where one could expect it."""
    rest = len(layers) - start
    if rest < 2:
        return 0, ""
    conv, relu = layers[start], layers[start + 1]
    two_dimensional = _is_exactly(conv, Conv2d)
    if not (two_dimensional or _is_exactly(conv, Conv1d)) or not _is_exactly(relu, _TorchReLU):
        return 0, ""
    if conv.padding_mode != "zeros":
        return 0, f"padding_mode is {conv.padding_mode!r}"
    if _is_observed(conv):
        return 0, "the convolution is hooked (weight_norm of old is a hook, too) or its call is replaced"
    if _is_observed(relu):
        return 0, "ReLU is hooked or its call is replaced"
    if rest == 2 or not two_dimensional or not _is_exactly(layers[start + 2], MaxPool2d):
        return 2, ""
    reason = _why_not_pool(layers[start + 2])
    return (2, reason) if reason else (3, "")


def _run_fused(layers: Sequence[Any], input: Tensor) -> Tensor:
    conv = layers[0]
    arguments = (input, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    if len(layers) == 3:
        pool = layers[2]
        return F.conv2d_relu_max_pool2d(*arguments, pool_size=pool.kernel_size, pool_stride=pool.stride)
    return F.conv2d_relu(*arguments) if isinstance(conv, Conv2d) else F.conv1d_relu(*arguments)


class Sequential(_TorchSequential):
    """Drop-in for `torch.nn.Sequential` that fuses: same layers, names, ``state_dict``, results.

    Where `Conv2d`, `torch.nn.ReLU`, `MaxPool2d` (or `Conv1d` or `Conv2d` and `torch.nn.ReLU`) of this package follow
    one another, they run as one operation, and what lies between them is neither computed in full nor kept for the
    backward pass: `pyseqnet.functional.conv2d_relu_max_pool2d`, ``conv2d_relu``, ``conv1d_relu``.

    The layers stay what and where they are. One that is hooked, replaced or of another class runs by itself, decided at
    every call; so does one that is called by somebody else, or in a slice that cuts the row.

    >>> row = Sequential(Conv2d(3, 64, 3, padding=1), torch.nn.ReLU(), MaxPool2d(2))
    >>> row(torch.zeros(8, 3, 32, 32)).shape
    torch.Size([8, 64, 16, 16])
    >>> list(row.state_dict())
    ['0.weight', '0.bias']
    """

    def forward(self, input: Any) -> Any:
        layers = list(self)
        position, fuse = 0, not _all_layers_are_observed()
        while position < len(layers):
            length = fused_run(layers, position)[0] if fuse else 0
            if length:
                input = _run_fused(layers[position : position + length], input)
            else:
                input = layers[position](input)
            position += max(length, 1)
        return input
