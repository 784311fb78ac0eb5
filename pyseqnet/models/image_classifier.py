"""The convolutional image classifier: blocks of convolution, ReLU and max-pooling, then one linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
        self.features = nn.Sequential(*blocks)  # runs each block as one operation
        self.dropout = torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(before * height * width, classes)

    def forward(self, input: Tensor) -> Tensor:
        scores: Tensor = self.head(self.dropout(self.features(input).flatten(-3)))
        return scores
