"""A small vision Transformer: an image as a sequence of patches.

Dosovitskiy et al.: An image is worth 16x16 words: Transformers for image recognition at scale, 2021.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyseqnet import nn

CLASS_DEVIATION = 0.02  # of the class token at the start, as of the learned positions


class VisionTransformer(torch.nn.Module):
    """Images (N, C, H, W) to scores (N, classes): patches, a class token, learned positions, Transformer layers.

    ``forward`` classifies; `encode` gives the normalised positions (N, 1 + patches, d_model), the class token first.

    Args:
        classes: how many scores.
        image_size: H and W, or one number for both; multiples of ``patch_size``.
        patch_size: side of the square patches.
        channels: C.
        layers: what else the layers take, as keywords of `nn.TransformerEncoderLayer` (``attention``, ``pattern``,
            ``norm``, ...).

    >>> model = VisionTransformer(10, image_size=28, patch_size=7, channels=1)
    >>> model(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        classes: int,
        *,
        image_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        channels: int = 3,
        d_model: int = 64,
        nhead: int = 4,
        num_layers: int = 4,
        dim_feedforward: int = 256,
        dropout: float = 0.0,
        layers: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if patch_size <= 0 or height <= 0 or width <= 0 or height % patch_size or width % patch_size:
            raise ValueError(f"image_size must be multiples of patch_size {patch_size}; got {(height, width)}")
        self.image_size = (height, width)
        self.patches = nn.Conv2d(channels, d_model, patch_size, patch_size)
        self.token = torch.nn.Parameter(torch.empty(1, 1, d_model))
        count = (height // patch_size) * (width // patch_size)
        self.positions = nn.LearnedPositions(1 + count, d_model, dropout, batch_first=True)
        layer = nn.TransformerEncoderLayer(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            torch.nn.functional.gelu,
            batch_first=True,
            norm_first=True,
            **({} if layers is None else layers),
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(d_model), enable_nested_tensor=False)
        self.head = torch.nn.Linear(d_model, classes)
        torch.nn.init.normal_(self.token, std=CLASS_DEVIATION)

    def encode(self, image: Tensor) -> Tensor:
        if image.dim() != 4 or tuple(image.shape[2:]) != self.image_size:
            height, width = self.image_size
            raise ValueError(f"image must be (N, C, {height}, {width}); got {tuple(image.shape)}")
        patches = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(image.shape[0], -1, -1), patches], 1)
        encoded: Tensor = self.encoder(self.positions(x))
        return encoded

    def forward(self, image: Tensor) -> Tensor:
        scores: Tensor = self.head(self.encode(image)[:, 0])
        return scores
