"""The convolutional image classifier: blocks of convolution, ReLU and max-pooling, then one linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyseqnet import functional as F
from pyseqnet import nn


class ImageClassifier(torch.nn.Module):
    """Tells which of `classes` an image shows (LeCun et al., 1998).

    Each entry of `channels` is one block: a convolution with that many filters that keeps the image's size,
    ReLU, and max-pooling that divides height and width by `pool_size`, rounding down. What is left goes
    through one linear layer, with dropout before it if asked for.

    Shapes: input (N, in_channels, H, W) with (H, W) = image_size; output (N, classes), scores before softmax,
    as `torch.nn.CrossEntropyLoss` takes them. An unbatched (in_channels, H, W) gives (classes,).

    >>> model = ImageClassifier(in_channels=1, image_size=28, channels=(32, 64), classes=10)
    >>> model(torch.zeros(5, 1, 28, 28)).shape
    torch.Size([5, 10])

    >>> model = ImageClassifier(in_channels=3, image_size=(32, 48), channels=(16, 32, 64), classes=7)
    >>> model(torch.zeros(3, 32, 48)).shape
    torch.Size([7])
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int | tuple[int, int] = 28,
        channels: Sequence[int] = (32, 64),
        classes: int = 10,
        *,
        kernel_size: int = 3,
        pool_size: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if not channels:
            raise ValueError("channels is empty: a classifier needs at least one block")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that a block keeps the image's size; got {kernel_size}")
        blocks: list[torch.nn.Module] = []
        before = in_channels
        for filters in channels:
            blocks += [
                nn.Conv2d(before, filters, kernel_size, padding=kernel_size // 2),
                torch.nn.ReLU(),
                nn.MaxPool2d(pool_size),
            ]
            before, height, width = filters, height // pool_size, width // pool_size
        if height < 1 or width < 1:
            raise ValueError(
                f"image_size {image_size} is too small: {len(channels)} poolings by {pool_size} leave nothing"
            )
        self.features = torch.nn.Sequential(*blocks)
        self.dropout = torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(before * height * width, classes)

    def forward(self, input: Tensor) -> Tensor:
        scores: Tensor = self.head(self.dropout(self._features(input).flatten(-3)))
        return scores

    def _features(self, input: Tensor) -> Tensor:
        """`self.features`, each block as one operation that keeps no map larger than its output."""
        layers: list[Any] = list(self.features)
        blocks = [layers[i : i + 3] for i in range(0, len(layers), 3)]
        if _is_observed(self.features) or not all(_is_plain_block(block) for block in blocks):
            output: Tensor = self.features(input)  # somebody exchanged a layer, or listens to one
            return output
        for conv, _, pool in blocks:
            input = F.conv2d_relu_max_pool2d(
                input,
                conv.weight,
                conv.bias,
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.groups,
                pool_size=pool.kernel_size,
                pool_stride=pool.stride,
            )
        return input


def _is_observed(layer: torch.nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _is_plain_block(layers: list[Any]) -> bool:
    """Whether these are convolution, ReLU and pooling as the constructor makes them, observed by nobody."""
    if [type(layer) for layer in layers] != [nn.Conv2d, torch.nn.ReLU, nn.MaxPool2d]:
        return False
    conv, _, pool = layers
    plain_pool: bool = pool.padding == 0 and pool.dilation == 1 and not pool.ceil_mode and not pool.return_indices
    if conv.padding_mode != "zeros":
        return False
    return plain_pool and not any(_is_observed(layer) for layer in layers)
