"""Random feature maps, whose products estimate the exponential or the Gaussian kernel without bias."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

if TYPE_CHECKING:
    from typing_extensions import Self


def random_projection(
    num_features: int,
    head_dim: int,
    *,
    orthogonal: bool = True,
    generator: torch.Generator | None = None,
    device: Any = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(num_features, head_dim)`` rows, each a standard normal vector; ``orthogonal``: within every ``head_dim`` rows
    the directions are orthogonal, each still uniform, which leaves estimates unbiased and lowers their variance."""
    if num_features <= 0 or head_dim <= 0:
        raise ValueError(f"num_features and head_dim must be positive, got {num_features} and {head_dim}")

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, head_dim, generator=generator, device=device, dtype=torch.float64)

    rows = normal(num_features)
    if not orthogonal:
        return rows.to(dtype)
    blocks = []
    for _ in range(0, num_features, head_dim):
        q, r = torch.linalg.qr(normal(head_dim))
        blocks.append(q * r.diagonal().sign())  # uniform over rotations only with these signs
    directions = torch.cat(blocks)[:num_features]
    return (directions * rows.norm(dim=1, keepdim=True)).to(dtype)


class _RandomFeatures(Module):
    """A map ``(..., length, head_dim)`` -> ``(..., length, features)`` around a buffer ``projection``."""

    projection: Tensor

    def __init__(self, projection: Tensor, *, scale: float | None = None, orthogonal: bool = True) -> None:
        super().__init__()
        if projection.dim() not in (2, 3) or not projection.is_floating_point() or not projection.numel():
            raise ValueError(
                "projection must be floating point, (num_features, head_dim) or (heads, num_features, head_dim); got "
                f"{tuple(projection.shape)} {projection.dtype}"
            )
        self.register_buffer("projection", projection.detach())
        self.scale = projection.shape[-1] ** -0.25 if scale is None else float(scale)
        self.orthogonal = orthogonal

    @classmethod
    def draw(
        cls,
        head_dim: int,
        num_features: int,
        *,
        heads: int | None = None,
        orthogonal: bool = True,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Self:
        """A map with a projection drawn now; ``heads``: one for each head. Further options are the constructor's."""
        shape = (num_features, head_dim) if heads is None else (heads, num_features, head_dim)
        features = cls(torch.empty(shape, device=device, dtype=dtype), orthogonal=orthogonal, **options)
        return features.redraw(generator)

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> Self:
        """Another projection in place of this one; a model that trains does so now and then."""
        for matrix in self.projection if self.projection.dim() == 3 else (self.projection,):
            device = self.projection.device if generator is None else generator.device
            drawn = random_projection(*matrix.shape, orthogonal=self.orthogonal, generator=generator, device=device)
            matrix.copy_(drawn)
        return self

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input, scaled, in at least float32, and its products with the rows of the projection."""
        x = x.to(torch.promote_types(x.dtype, torch.float32)) * self.scale
        return x, x @ self.projection.to(x.dtype).transpose(-1, -2)

    def extra_repr(self) -> str:
        *heads, features, dim = self.projection.shape
        words = f"head_dim={dim}, num_features={features}, orthogonal={self.orthogonal}"
        return words + (f", heads={heads[0]}" if heads else "")


class PositiveRandomFeatures(_RandomFeatures):
    """Positive orthogonal random features (FAVOR+), a ``feature_map`` of linear attention.

    Equivalent to::

        x = scale * x
        exp(x @ projection.T - x.square().sum(-1, keepdim=True) / 2) / sqrt(num_features)

    Over random projections the product of two features is ``exp(scale**2 x . y)`` in the mean: with the scale that None
    stands for, ``head_dim ** -0.25``, what softmax attention exponentiates. The variance grows with that mean.

    Args:
        projection: ``(num_features, head_dim)`` of `random_projection`, or one for each head. A buffer, never trained.
        scale: multiplies the input.
        orthogonal: how `redraw` draws.

    ``PositiveRandomFeatures.draw(head_dim, num_features)`` draws a projection. In float32 and float64 linear attention
    takes `exponent` and leaves the exp to its kernel, in float32. A feature is at most ``exp(|w|^2 / 2)``, w the
    longest row of the projection.

    Paper: Choromanski et al., Rethinking attention with Performers, 2021.
    """

    def exponent(self, x: Tensor) -> Tensor:
        """The logarithm of the features, ``(..., length, num_features)``."""
        wide, projected = self._project(x)
        shift = wide.square().sum(-1, keepdim=True) / 2 + math.log(self.projection.shape[-2]) / 2
        return (projected - shift).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.exponent(wide).exp().to(x.dtype)


class RandomFourierFeatures(_RandomFeatures):
    """Random Fourier features, a ``feature_map`` of linear attention: ``2 num_features`` cosines and sines.

    Equivalent to::

        x = scale * x
        y = x @ projection.T
        features = cat([cos(y), sin(y)], -1) / sqrt(num_features)
        if kernel == "softmax":
            features = features * exp(x.square().sum(-1, keepdim=True) / 2)

    Over random projections the product of two features is ``exp(-scale**2 |x - y|^2 / 2)`` in the mean, for
    ``kernel="softmax"`` ``exp(scale**2 x . y)``. Estimates may be negative, and so may a sum of scores: attention
    divides by something safely positive where queries and keys are of one length (random feature attention).

    Args: as `PositiveRandomFeatures`; kernel: ``"gaussian"`` or ``"softmax"``.

    Papers: Rahimi and Recht, Random features for large-scale kernel machines, 2007; Peng et al., Random feature
    attention, 2021.
    """

    def __init__(
        self, projection: Tensor, *, scale: float | None = None, orthogonal: bool = True, kernel: str = "gaussian"
    ) -> None:
        super().__init__(projection, scale=scale, orthogonal=orthogonal)
        if kernel not in ("gaussian", "softmax"):
            raise ValueError(f"kernel must be 'gaussian' or 'softmax', got {kernel!r}")
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        wide, projected = self._project(x)
        features = torch.cat([projected.cos(), projected.sin()], -1) * self.projection.shape[-2] ** -0.5
        if self.kernel == "softmax":
            features = features * (wide.square().sum(-1, keepdim=True) / 2).exp()
        return features.to(x.dtype)
