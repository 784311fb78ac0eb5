"""Time and memory of efficient attention against the length, and where it meets dense attention."""

from __future__ import annotations

import itertools
import math
import pathlib
from typing import Any

from bench.compare import load

FAMILY = "efficient"
COLOURS = {
    "dense": "#333333", "local": "#2f6f9f", "linear": "#c8553d", "linformer": "#5a9367", "performer": "#b08b2e",
    "lsh": "#7a5195",
}  # fmt: skip


def crossover(d: int, e: int) -> float:
    """Where (d + e) N^2 multiplications of dense attention are the 2 d e N of linear."""
    return 2 * d * e / (d + e)


def series(rows: list[dict[str, Any]], mode: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Rows of the family by mechanism and length; a name is mechanism_length."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["family"] == FAMILY and row["mode"] == mode and row["dtype"] == "f32":
            mechanism, length = row["name"].rsplit("_", 1)
            found.setdefault(mechanism, {})[int(length)] = row
    return found


def measured_crossover(a: dict[int, float], b: dict[int, float]) -> float | None:
    """The length from which on `b` costs less, between two measured ones on a doubly logarithmic line."""
    both = sorted(a.keys() & b.keys())
    if both and b[both[0]] < a[both[0]]:
        return None  # before the first
    for low, high in itertools.pairwise(both):
        if b[low] >= a[low] and b[high] < a[high]:
            before, behind = math.log(b[low] / a[low]), math.log(a[high] / b[high])
            return float(low * (high / low) ** (before / (before + behind)))
    return None


def costs(rows: dict[int, dict[str, Any]]) -> dict[int, float]:
    """Seconds by length."""
    return {n: row["times"]["ours"]["median"] for n, row in rows.items()}


def curves(path: str | pathlib.Path, mode: str = "fwdbwd", d: int = 32) -> pathlib.Path | None:
    """`<file>-efficient.png`: forward and all gradients; None where the file has no such rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path = pathlib.Path(path)
    results = load(path)
    found = series(results["rows"], mode)
    if not found:
        return None
    figure, (times, memory) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for mechanism, rows in found.items():
        lengths, colour = sorted(rows), COLOURS.get(mechanism)
        times.plot(lengths, [rows[n]["times"]["ours"]["median"] * 1e3 for n in lengths], "o-", color=colour,
                   label=mechanism)  # fmt: skip
        peaks = [rows[n].get("peak_bytes", {}).get("ours") for n in lengths]
        if all(peak is not None for peak in peaks):
            memory.plot(lengths, [max(peak, 1) / 2**20 for peak in peaks], "o-", color=colour, label=mechanism)
    times.set_ylabel("ms, forward and all gradients")
    memory.set_ylabel("MiB added at the peak")
    for axes in (times, memory):
        at = crossover(d, d)
        axes.axvline(at, color="0.5", linestyle=":")
        where = {"xycoords": ("data", "axes fraction"), "xytext": (3, -12), "textcoords": "offset points"}
        axes.annotate(f"N = 2dd'/(d+d') = {at:g}", (at, 1), fontsize=8, color="0.4", **where)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("positions")
        axes.spines[["top", "right"]].set_visible(False)
    for mechanism, rows in found.items():
        met = measured_crossover(costs(found.get("dense", {})), costs(rows))
        if met is not None:
            times.axvline(met, color=COLOURS.get(mechanism), linestyle="--", linewidth=0.8)
    times.legend(fontsize=8, frameon=False)
    meta = results["meta"]
    figure.suptitle(
        f"{meta['device']}, {meta['threads']} thread{'s' if meta['threads'] != 1 else ''}, {meta['date']}", fontsize=10
    )
    target = path.with_name(f"{path.stem}-{FAMILY}.png")
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target
