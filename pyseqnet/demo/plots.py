"""The pictures of the report."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from pyseqnet.demo.speed import Row
from pyseqnet.training import History

LOWEST_ACCURACY = 80.0  # the first epochs are off the chart: the end is what is to be seen
BLUE, ORANGE, GREY = "#2f6f9f", "#d9822b", "#9aa5ad"
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "savefig.dpi": 130,
}


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    figure.savefig(path)
    plt.close(figure)


def learning_curve(history: History, goal: float, path: Path, training_label: str, test_label: str = "test") -> None:
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        left.plot(history.at, history.loss, color=BLUE)
        left.set(title="Training loss", xlabel="step", yscale="log")
        right.plot(history.at, [100 * a for a in history.scores["training"]], color=GREY, label=training_label)
        right.plot(history.at, [100 * a for a in history.scores["test"]], color=BLUE, label=test_label)
        right.axhline(100 * goal, color=ORANGE, linewidth=1, linestyle="--", label=f"goal {goal:.0%}")
        right.set(title="Accuracy, %", xlabel="step", ylim=(LOWEST_ACCURACY, 100.3))
        right.legend(frameon=False, loc="lower right")
        _save(figure, path)


def confusion_matrix(
    labels: torch.Tensor, predicted: torch.Tensor, names: Sequence[str], title: str, path: Path
) -> None:
    """Rows are the truth; counts, and a colour for the share of the row."""
    size = len(names)
    counts = torch.bincount(labels * size + predicted, minlength=size * size).view(size, size).numpy()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    with plt.rc_context({**STYLE, "axes.spines.top": True, "axes.spines.right": True}):
        figure, axes = plt.subplots(figsize=(5.2, 5), layout="constrained")
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            if count:  # empty cells make the mistakes stand out
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
        slanted: dict[str, Any] = {"rotation": 45, "ha": "right"} if max(map(len, names)) > 2 else {}
        axes.set_xticks(range(size), names, **slanted)
        axes.set_yticks(range(size), names)
        axes.set(title=title, xlabel="predicted", ylabel="truth")
        _save(figure, path)


def cross_attention(weights: torch.Tensor, source: str, target: list[str], path: Path) -> None:
    """weights (T, S): a row for each written symbol, what it looked at."""
    with plt.rc_context({**STYLE, "axes.spines.top": True, "axes.spines.right": True}):
        figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
        shown = axes.imshow(weights.numpy(), cmap="Blues", vmin=0, aspect="auto")
        axes.set_xticks(range(len(source)), ["\u2423" if c.isspace() else c for c in source])
        axes.set_yticks(range(len(target)), target)
        axes.set(title="Where the decoder looks while it writes, mean of the heads", xlabel="read", ylabel="written")
        figure.colorbar(shown, ax=axes, pad=0.01)
        _save(figure, path)


def first_layer_filters(weight: torch.Tensor, path: Path) -> None:
    """weight (K, 1, R, S): one small picture a filter, blue negative, red positive, one scale for all."""
    filters = weight.detach()[:, 0].numpy()
    columns = min(8, len(filters))
    rows = math.ceil(len(filters) / columns)
    scale = float(np.abs(filters).max())
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(0.8 * columns, 0.85 * rows + 0.5), squeeze=False, layout="constrained"
        )
        for ax in axes.flat:
            ax.set_axis_off()
        for ax, picture in zip(axes.flat, filters, strict=False):
            ax.imshow(picture, cmap="RdBu_r", vmin=-scale, vmax=scale)
        figure.suptitle(f"The {len(filters)} filters of the first layer, red positive, blue negative", fontsize=11)
        _save(figure, path)


def kernel_speed(rows: list[Row], threads: int, path: Path) -> None:
    """Bars of time relative to torch, so that a row of microseconds can stand beside one of milliseconds."""
    rows = rows[::-1]  # bars are drawn from the bottom up
    positions = np.arange(len(rows))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 0.55 * len(rows) + 1.3), layout="constrained")
        theirs = axes.barh(positions + 0.2, np.ones(len(rows)), 0.38, color=GREY, label=f"torch {torch.__version__}")
        ours = axes.barh(positions - 0.2, [r.ours / r.torch for r in rows], 0.38, color=BLUE, label="pyseqnet")
        axes.bar_label(
            theirs, [f"{1e3 * r.torch:.3g} ms, error {r.torch_error:.0e}" for r in rows], padding=4, fontsize=8
        )
        axes.bar_label(
            ours,
            [f"{1e3 * r.ours:.3g} ms, error {r.error:.0e}, speed {r.speedup:.1f}x" for r in rows],
            padding=4,
            fontsize=8,
        )
        axes.set_yticks(positions, [r.name for r in rows])
        axes.set_xlim(0, 1.35 * max(1.0, *(r.ours / r.torch for r in rows)))
        pinned = f"{threads} thread{'s' if threads != 1 else ''}"
        axes.set_title(f"Time of one training step relative to torch, float32, {pinned}; shorter is better")
        figure.legend(frameon=False, loc="outside lower right", ncols=2)
        _save(figure, path)
