"""Images made on the spot: rectangles, discs and triangles on noise, with their boxes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("rectangle", "disc", "triangle")


@dataclass(frozen=True)
class Scenes:
    """Images (N, 3, S, S); of each the kinds (n,) and the boxes (n, 4): centre x and y, width, height, in [0, 1]."""

    images: Tensor
    kinds: list[Tensor]
    boxes: list[Tensor]


def _inside(kind: int, x: Tensor, y: Tensor) -> Tensor:
    """Which points belong to the shape; x and y are -1 to 1 from side to side of its box."""
    box = (x.abs() <= 1) & (y.abs() <= 1)
    if kind == 1:
        return x.square() + y.square() <= 1
    if kind == 2:
        return box & (x.abs() <= (y + 1) / 2)
    return box


def scenes(count: int, generator: torch.Generator, size: int = 64, most: int = 2) -> Scenes:
    """``count`` images of 1 to ``most`` shapes of chance kinds, colours, places, sizes; the later hides the earlier."""
    rows, columns = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    images = 0.1 * torch.rand(count, 3, size, size, generator=generator)
    kinds, boxes = [], []
    for image in images:
        n = int(torch.randint(1, most + 1, (1,), generator=generator))
        own = torch.randint(len(KINDS), (n,), generator=generator)
        extent = 0.2 + 0.25 * torch.rand(n, 2, generator=generator)
        centre = extent / 2 + (1 - extent) * torch.rand(n, 2, generator=generator)
        if n == 2:  # side by side: one that is mostly hidden has no box to be found
            far = (centre[0] - centre[1]).abs() < extent.mean(0)
            if bool(far.all()):
                n, own, extent, centre = 1, own[:1], extent[:1], centre[:1]
        for kind, (width, height), (x, y) in zip(own.tolist(), extent.tolist(), centre.tolist(), strict=True):
            across = (columns / size - x) / (width / 2)
            down = (rows / size - y) / (height / 2)
            colour = 0.3 + 0.7 * torch.rand(3, 1, generator=generator)
            image[:, _inside(kind, across, down)] = colour
        kinds.append(own)
        boxes.append(torch.cat([centre, extent], 1))
    return Scenes(images, kinds, boxes)
