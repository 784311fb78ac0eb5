"""The speed chart: one bar a row, how many times faster than torch eager, logarithmic."""

from __future__ import annotations

import pathlib

from bench.compare import load
from bench.curves import curves

COLOURS = {"FASTER": "#2f6f9f", "SAME": "#9aa5ad", "SLOWER": "#c8553d"}
BAR_INCHES = 0.24
MINOR_TICKS = (0.2, 0.5, 2, 5, 20, 50)


def chart(path: str | pathlib.Path, mode: str = "fwdbwd") -> pathlib.Path | None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path = pathlib.Path(path)
    results = load(path)
    rows = [row for row in results["rows"] if row["mode"] == mode]
    if not rows:
        return None
    rows.sort(key=lambda row: row["speedup"]["eager"])
    rows.sort(key=lambda row: row["family"], reverse=True)  # bars are drawn from the bottom up
    meta = results["meta"]
    speedups = [row["speedup"]["eager"] for row in rows]
    figure, axes = plt.subplots(figsize=(9, 1.6 + BAR_INCHES * len(rows)), layout="constrained")
    bars = axes.barh(
        range(len(rows)), [s - 1 for s in speedups], left=1, color=[COLOURS[row["verdict"]] for row in rows]
    )
    labels = [f"{s:.1f}x" if s >= 1.95 else f"{s:.2f}x" for s in speedups]
    axes.bar_label(bars, labels=labels, padding=3, fontsize=8)
    marks = []  # the best of the other baselines, where they were measured
    for position, row in enumerate(rows):
        others = [row["speedup"][label] for label in ("compile", "user") if label in row["speedup"]]
        if others:
            marks.append(min(others))
            axes.plot(marks[-1], position, "|", color="black", markersize=9, markeredgewidth=1.6)
    axes.plot([], [], "|", color="black", label="against the best of torch.compile and the user's choice")
    axes.axvline(1, color="0.4", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(min(0.8, *speedups, *marks) * 0.85, max(2.0, *speedups, *marks) * 1.35)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}x" if round(value, 3) in MINOR_TICKS else "")
    axes.set_yticks(range(len(rows)), [f"{row['family']} {row['name']} {row['dtype']}" for row in rows], fontsize=8)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    step = "forward and all gradients" if mode == "fwdbwd" else "forward"
    axes.set_title(
        f"Times faster than torch eager {meta['torch']}, {step}\n"
        f"{meta['device']}{', ' + meta['isa'] if meta['device_type'] == 'cpu' else ''}, "
        f"{meta['threads']} thread{'s' if meta['threads'] != 1 else ''}, {meta['date']}",
        fontsize=10,
        loc="left",
    )
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target


def plot(paths: list[str]) -> int:
    for path in paths:
        for target in (chart(path) or chart(path, "fwd"), curves(path)):
            if target is not None:
                print(f"written: {target}")
    return 0
