"""Images of one object each (MNIST, a subset of Fashion-MNIST, scikit-learn's digits), and their augmentation."""

from __future__ import annotations

import gzip
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyseqnet.data import find

MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FASHION = "https://github.com/zalandoresearch/fashion-mnist, 900 images cut from its sprite"
HELD_OUT = 0.25  # of the data sets that have no test set of their own


@dataclass(frozen=True)
class Images:
    """Images (N, 1, H, W) float32, standardised with the training images' mean and deviation; labels (N,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    @property
    def size(self) -> int:
        return self.train_images.shape[-1]


def _standardised(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: list[str]) -> Images:
    mean, deviation = train.mean(), train.std()
    return Images(
        (train.unsqueeze(1) - mean) / deviation,
        train_labels,
        (test.unsqueeze(1) - mean) / deviation,
        test_labels,
        tuple(classes),
    )


def _split(images: Tensor, labels: Tensor, classes: list[str], seed: int) -> Images:
    """Held-out images by chance, so that each class has the same share of both parts."""
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(np.arange(len(labels)), test_size=HELD_OUT, random_state=seed, stratify=labels)
    return _standardised(images[train], labels[train], images[test], labels[test], classes)


def _idx(name: str) -> Tensor:
    """The array of an IDX file (LeCun's format): a magic number, the sizes, the bytes."""
    data = gzip.decompress(find(f"mnist/{name}", MNIST + name).read_bytes())
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{name} is no IDX file of unsigned bytes")
    axes = data[3]
    sizes = np.frombuffer(data, ">i4", axes, 4)
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(sizes).copy())


def mnist() -> Images:
    """60 000 and 10 000 handwritten digits of 28x28 (LeCun et al., 1998)."""
    return _standardised(
        _idx("train-images-idx3-ubyte.gz") / 255,
        _idx("train-labels-idx1-ubyte.gz").long(),
        _idx("t10k-images-idx3-ubyte.gz") / 255,
        _idx("t10k-labels-idx1-ubyte.gz").long(),
        [str(digit) for digit in range(10)],
    )


def fashion(seed: int) -> Images:
    """900 images of clothing, 28x28, of Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017); a quarter is held out."""
    with np.load(find("fashion_mnist_900/fashion_mnist_900.npz", origin=FASHION), allow_pickle=False) as file:
        images, labels = torch.from_numpy(file["x"]) / 255, torch.from_numpy(file["y"]).long()
        classes = [str(name) for name in file["classes"]]
    return _split(images, labels, classes, seed)


def digits(seed: int) -> Images:
    """scikit-learn's 1797 handwritten digits of 8x8; a quarter is held out. They come with the library."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32) / 16
    return _split(images, torch.as_tensor(data.target).long(), [str(digit) for digit in range(10)], seed)


def first(data: Images, count: int) -> Images:
    """The first ``count`` images for training, a quarter as many for the test."""
    return Images(
        data.train_images[:count],
        data.train_labels[:count],
        data.test_images[: count // 4],
        data.test_labels[: count // 4],
        data.classes,
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


def turned_and_scaled(images: Tensor, degrees: Tensor | float, scale: Tensor | float) -> Tensor:
    """Each image (N, C, H, W) turned counter-clockwise by its angle and magnified by its scale, (N,) or one for all.

    Bilinear; what comes in from outside repeats the edge.
    """
    angle = torch.deg2rad(torch.as_tensor(degrees, dtype=images.dtype)).expand(len(images))
    factor = torch.as_tensor(scale, dtype=images.dtype).expand(len(images))
    cosine, sine, zero = angle.cos() / factor, angle.sin() / factor, torch.zeros_like(angle)
    maps = torch.stack([cosine, -sine, zero, sine, cosine, zero], 1).view(-1, 2, 3)
    grid = torch.nn.functional.affine_grid(maps, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
