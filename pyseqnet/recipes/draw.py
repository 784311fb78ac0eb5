"""Pictures of the recipes. Imported late: matplotlib takes a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from pyseqnet.training import History

COLUMNS = 8
WIDTH = 10.5  # of a page, inches


def images(pictures: Tensor, titles: Sequence[str], path: Path, columns: int = COLUMNS) -> None:
    """Grey (N, H, W) or coloured (N, H, W, 3) pictures in a grid."""
    rows = max(1, -(-len(pictures) // columns))
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, WIDTH / columns * 1.2 * rows), layout="constrained", squeeze=False
    )
    for place in axes.flat:
        place.axis("off")
    for place, picture, title in zip(axes.flat, pictures, titles, strict=False):
        place.imshow(picture.numpy(), cmap="gray_r")
        place.set_title(title, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def curves(histories: Mapping[str, History], path: Path) -> None:
    """Training loss of several trainings over their steps."""
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for name, history in histories.items():
        axes.plot(history.at, history.loss, label=name)
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def matrix(weights: Tensor, rows: Sequence[str], columns: Sequence[str], path: Path, title: str = "") -> None:
    """Weights (len(rows), len(columns)), such as an attention map, with the names of rows and columns."""
    size = (0.3 * len(columns) + 2, 0.3 * len(rows) + 1.5)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    axes.imshow(weights.detach().float().numpy(), aspect="auto", cmap="Blues")
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def points(positions: Tensor, labels: Sequence[int], names: Sequence[str], path: Path) -> None:
    """Points (N, 2) of the plane, coloured by label."""
    figure, axes = plt.subplots(figsize=(5, 4.5), layout="constrained")
    known = torch.as_tensor(labels)
    for label, name in enumerate(names):
        chosen = positions[known == label].numpy()
        axes.scatter(chosen[:, 0], chosen[:, 1], s=9, label=name)
    axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
