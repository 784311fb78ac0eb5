"""Self-attention on images: every pixel is a position.

Parmar et al.: Image Transformer, 2018. Zhang, Goodfellow, Metaxas, Odena: Self-attention generative adversarial
networks, 2019.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.utils.parametrizations import spectral_norm as _spectral_norm

from pyseqnet import functional as F
from pyseqnet.nn.attention import MultiheadAttention
from pyseqnet.nn.conv import Conv2d
from pyseqnet.nn.pool import MaxPool2d

KEY_REDUCTION, VALUE_REDUCTION = 8, 2  # of channels, as in the code of Zhang et al.
KEY_POOL = 2


def _check_image(input: Tensor, channels: int, least: int = 0) -> None:
    if input.dim() != 4 or input.shape[1] != channels or min(input.shape[2:]) < least:
        size = f"H, W >= {least}" if least else "any H, W"
        raise ValueError(f"input must be (N, {channels}, H, W) with {size}; got {tuple(input.shape)}")


def pixels(image: Tensor) -> Tensor:
    """``(N, C, H, W) -> (N, H*W, C)``: an image as the set of its pixels, row by row."""
    return image.flatten(2).transpose(1, 2)


class ImageSelfAttention(Module):
    """Multi-head self-attention over the H*W pixels of ``(N, C, H, W)``; the output has the input's shape.

    ``attention`` is a `MultiheadAttention` of ``channels`` features; its options come as keywords. There is nothing
    that tells where a pixel is: add positions before, or give a ``pattern``.

    >>> ImageSelfAttention(8, 2)(torch.zeros(1, 8, 5, 10)).shape
    torch.Size([1, 8, 5, 10])
    """

    def __init__(self, channels: int, num_heads: int = 1, **options: Any) -> None:
        super().__init__()
        if "batch_first" in options:
            raise TypeError("ImageSelfAttention is batch first, as images are")
        self.channels = channels
        self.attention = MultiheadAttention(channels, num_heads, batch_first=True, **options)

    def forward(self, input: Tensor) -> Tensor:
        _check_image(input, self.channels)
        x = pixels(input)
        output: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return output.transpose(1, 2).unflatten(2, input.shape[2:])


class SelfAttention2d(Module):
    """The block of self-attention GANs: ``x + gamma * attention(x)``, where ``gamma`` starts at 0 (the identity).

    Queries and keys have C/8 channels, values C/2, all by 1x1 convolutions without bias, as is the one back to C; keys
    and values are max-pooled 2x2; the products are not scaled.

    Args:
        channels: C, a multiple of 8.
        spectral_norm: whether the convolutions' weights are divided by their largest singular value, as in the paper.

    Shapes: ``(N, C, H, W)`` with H, W >= 2; the output has the input's. ``need_weights=True`` also returns the weights
    ``(N, H*W, (H//2)*(W//2))``.

    >>> block = SelfAttention2d(8)
    >>> x = torch.rand(2, 8, 6, 6)
    >>> torch.equal(block(x), x)
    True

    Paper: Zhang et al., 2019.
    """

    def __init__(self, channels: int, spectral_norm: bool = True, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if channels <= 0 or channels % KEY_REDUCTION:
            raise ValueError(f"channels must be a positive multiple of {KEY_REDUCTION}; got {channels}")
        self.channels = channels
        inner, middle = channels // KEY_REDUCTION, channels // VALUE_REDUCTION

        def convolution(inputs: int, outputs: int) -> Module:
            made = Conv2d(inputs, outputs, 1, bias=False, device=device, dtype=dtype)
            return _spectral_norm(made) if spectral_norm else made

        self.query, self.key = convolution(channels, inner), convolution(channels, inner)
        self.value, self.out = convolution(channels, middle), convolution(middle, channels)
        self.pool = MaxPool2d(KEY_POOL)
        self.gamma = Parameter(torch.zeros((), device=device, dtype=dtype))

    def forward(self, input: Tensor, need_weights: bool = False) -> Any:
        _check_image(input, self.channels, KEY_POOL)
        query = pixels(self.query(input)).unsqueeze(1)
        key, value = (pixels(self.pool(part(input))).unsqueeze(1) for part in (self.key, self.value))
        result: Any = F.scaled_dot_product_attention(query, key, value, scale=1.0, return_weights=need_weights)
        attended, weights = result if need_weights else (result, None)
        image = attended.squeeze(1).transpose(1, 2).unflatten(2, input.shape[2:])
        output: Tensor = input + self.gamma * self.out(image)
        return (output, weights.squeeze(1)) if weights is not None else output

    def extra_repr(self) -> str:
        return f"{self.channels}"
