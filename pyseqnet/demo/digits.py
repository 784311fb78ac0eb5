"""scikit-learn's handwritten digits: 1797 images of 8x8 pixels, grey values 0 to 16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IMAGE_SIZE = 8
CLASSES = 10
TEST_SHARE = 0.25
GREY_LEVELS = 16.0


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8), standardised with the training images' mean and deviation; labels (N,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(seed: int) -> Digits:
    """The digits, split so that every class has the same share in both parts."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        data.images, data.target, test_size=TEST_SHARE, random_state=seed, stratify=data.target
    )
    train = torch.as_tensor(train_x, dtype=torch.float32).unsqueeze(1) / GREY_LEVELS
    test = torch.as_tensor(test_x, dtype=torch.float32).unsqueeze(1) / GREY_LEVELS
    mean, deviation = train.mean(), train.std()
    return Digits(
        (train - mean) / deviation,
        torch.as_tensor(train_y),
        (test - mean) / deviation,
        torch.as_tensor(test_y),
    )


def shifted(images: Tensor, generator: torch.Generator, most: int = 1) -> Tensor:
    """Each image (N, C, H, W) moved by up to `most` pixels in both axes; the edge is repeated.

    A convolution answers a shifted digit with a shifted map; the linear layer behind it has to be shown.
    """
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, [most] * 4, mode="replicate")
    offset = torch.randint(0, 2 * most + 1, (2, n, 1), generator=generator)
    rows = offset[0] + torch.arange(height)
    columns = offset[1] + torch.arange(width)
    batch = torch.arange(n)[:, None, None]
    # indexing with a slice between index tensors puts the channels last
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def rotated(images: Tensor, degrees: Tensor) -> Tensor:
    """Each image (N, C, H, W) turned by its angle (N,), counter-clockwise, bilinearly; the edge is repeated.

    No layer of a convolutional network recognises what is turned or scaled: it has to see it in training.
    """
    angle = torch.deg2rad(degrees)
    cosine, sine, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turns = torch.stack([cosine, -sine, zero, sine, cosine, zero], 1).view(-1, 2, 3)
    grid = torch.nn.functional.affine_grid(turns, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
