"""A small generative adversarial network for images, with or without self-attention in both of its halves.

Goodfellow et al., 2014; Zhang, Goodfellow, Metaxas, Odena: Self-attention generative adversarial networks, 2019.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.parametrizations import spectral_norm

from pyseqnet import nn

SLOPE = 0.1  # of the discriminator's leaky ReLU


def _block(before: int, after: int) -> list[torch.nn.Module]:
    """Twice as large, convolved, normalised."""
    return [
        torch.nn.Upsample(scale_factor=2),
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(after),
        torch.nn.ReLU(),
    ]


class ImageGenerator(torch.nn.Module):
    """Draws images from noise: a linear layer makes size/4 x size/4 of it, two blocks double that.

    With ``attention=True`` a `pyseqnet.nn.SelfAttention2d` stands behind the first block.

    Shapes: noise (N, noise); images (N, 1, size, size) in (-1, 1). `size` is a multiple of 4.

    >>> ImageGenerator(size=8)(torch.randn(2, 32)).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(self, size: int = 8, *, noise: int = 32, width: int = 64, attention: bool = True) -> None:
        super().__init__()
        if size % 4 or size <= 0:
            raise ValueError(f"size must be a multiple of 4, got {size}")
        self.noise = noise
        side = size // 4
        seed = [torch.nn.Linear(noise, width * side * side), torch.nn.Unflatten(1, (width, side, side))]
        self.attention = nn.SelfAttention2d(width) if attention else None
        look = [] if self.attention is None else [self.attention]
        last = [nn.Conv2d(width, 1, 3, padding=1), torch.nn.Tanh()]
        self.layers = torch.nn.Sequential(*seed, *_block(width, width), *look, *_block(width, width), *last)

    def forward(self, noise: Tensor) -> Tensor:
        images: Tensor = self.layers(noise)
        return images


class ImageDiscriminator(torch.nn.Module):
    """Scores how real images look (N, 1, size, size) -> (N,); all weights are divided by their spectral norm.

    >>> ImageDiscriminator(size=8)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2])
    """

    def __init__(self, size: int = 8, *, width: int = 64, attention: bool = True) -> None:
        super().__init__()
        if size % 4 or size <= 0:
            raise ValueError(f"size must be a multiple of 4, got {size}")

        def convolution(before: int, after: int, **options: Any) -> list[torch.nn.Module]:
            return [spectral_norm(nn.Conv2d(before, after, **options)), torch.nn.LeakyReLU(SLOPE)]

        self.layers = torch.nn.Sequential(
            *convolution(1, width, kernel_size=3, padding=1),
            *([nn.SelfAttention2d(width)] if attention else []),
            *convolution(width, width, kernel_size=4, stride=2, padding=1),
            *convolution(width, 2 * width, kernel_size=4, stride=2, padding=1),
            torch.nn.Flatten(),
            spectral_norm(torch.nn.Linear(2 * width * (size // 4) ** 2, 1)),
        )

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.layers(images)
        return scores.squeeze(1)
