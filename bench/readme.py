"""Writes the measured numbers from `bench/results/*.json`: no number is typed by hand.

The README gets a chart and a line a family; every row goes to `bench/results/README.md`.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics

from bench.compare import load
from bench.curves import curves
from bench.machine import RECIPES, RESULTS, ROOT, device_results
from bench.plot import chart

ABOUT = [
    "Times of ours, and how many times as long the others take in the same interleaved run. The user's choice is what",
    "somebody would try next, such as channels-last tensors. The ceiling is the time that the measured peaks of the",
    "machine allow, with operations counted as for direct convolution (Winograd's can pass 100 %). The error is the",
    "largest, relative to the largest value, against float64; a row whose error is out of bounds counts as wrong.",
]
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
RECIPES_BEGIN, RECIPES_END = "<!-- recipes:begin -->", "<!-- recipes:end -->"


def _ratio(row: dict, label: str) -> str:
    return f"{row['speedup'][label]:.1f}x" if label in row["speedup"] else ""


def table(results: dict) -> list[str]:
    lines = [
        "| case | shapes | dtype | ours, ms | eager | compile | user's choice | ceiling | error |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in results["rows"]:
        if row["mode"] != "fwdbwd":
            continue
        user = f"{_ratio(row, 'user')} {row['user']}" if row["user"] else ""
        name = f"{row['family']} {row['name']}"
        if row["fault"]:
            name += " **wrong result**"
        lines.append(
            f"| {name} | {row['shapes']} | {row['dtype']} | {row['times']['ours']['median'] * 1e3:.3f} "
            f"| {_ratio(row, 'eager')} | {_ratio(row, 'compile')} | {user} "
            f"| {row['ceiling']['fraction']:.0%} {row['ceiling']['bound']} | {row['error']:.0e} |"
        )
    return lines


def summary(results: dict) -> list[str]:
    """A line for each family and dtype: how the rows with gradients compare with torch eager."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in results["rows"]:
        if row["mode"] == "fwdbwd" and "eager" in row["speedup"]:
            groups.setdefault((row["family"], row["dtype"]), []).append(row)
    lines = [
        "| family | dtype | rows | median | slowest | fastest | torch is faster in | wrong |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for (family, dtype), rows in sorted(groups.items()):
        ratios = [row["speedup"]["eager"] for row in rows]
        slower = sum(row["verdict"] == "SLOWER" for row in rows)
        wrong = sum(bool(row["fault"]) for row in rows)
        lines.append(
            f"| {family} | {dtype} | {len(rows)} | {statistics.median(ratios):.1f}x | {min(ratios):.2f}x "
            f"| {max(ratios):.1f}x | {slower} | {wrong} |"
        )
    return lines


def heading(results: dict) -> list[str]:
    meta = results["meta"]
    where = str(meta["device"])
    if meta["device_type"] == "cpu":
        where += f" ({meta['isa']}), {meta['threads']} thread{'s' if meta['threads'] != 1 else ''}"
    modified = " with local changes" if meta["modified"] else ""
    few = ", few samples a row (--quick)" if meta.get("quick") else ""
    return [
        f"### {where}",
        "",
        f"torch {meta['torch']}, commit {meta['commit']}{modified}, {meta['date']}{few}; "
        f"measured ceilings: {meta['fp32_gflops']:.0f} GFLOP/s fp32, {meta['copy_gbps']:.0f} GB/s copy.",
        "",
    ]


def picture(path: pathlib.Path, folder: pathlib.Path) -> list[str]:
    return shown("Speed-up over torch eager", chart(path), folder)


def shown(words: str, found: pathlib.Path | None, folder: pathlib.Path) -> list[str]:
    return [f"![{words}]({os.path.relpath(found, folder)})", ""] if found else []


def recipes() -> list[str]:
    """The scores of full runs, a line each."""
    lines = ["| recipe | score | reached | goal | commit |", "|---|---|--:|--:|---|"]
    for row in json.loads(RECIPES.read_text()) if RECIPES.exists() else []:
        for score in row["scores"]:
            if score["always"]:
                continue  # that the loss falls is for quick runs
            goal = ""
            if score["goal"] is not None:
                missed = "" if score["passed"] else ", **missed**"
                goal = f"{'≥' if score['at_least'] else '≤'} {score['goal']:g}{missed}"
            lines.append(f"| {row['recipe']} | {score['name']} | {score['value']:.4g} | {goal} | {row['commit']} |")
    return lines


def _put(text: str, begin: str, lines: list[str], end: str) -> str:
    """The text with `lines` between the two marks."""
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"README.md lacks the lines {begin} and {end}")
    return before + "\n".join([begin, "", *lines, ""]) + end + after


def readme() -> int:
    path, all_rows = ROOT / "README.md", RESULTS / "README.md"
    files = device_results()
    short: list[str] = []
    full = ["# All benchmark rows: one training step of the operation (forward and gradients)", "", *ABOUT, ""]
    for file in files:
        results = load(file)
        short += [*heading(results), *picture(file, ROOT), *summary(results), ""]
        over_positions = shown("Time and memory over positions", curves(file), RESULTS)
        full += [*heading(results), *picture(file, RESULTS), *over_positions, *table(results), ""]
    if files:
        short += [f"Every row: [{all_rows.relative_to(ROOT)}]({all_rows.relative_to(ROOT)}).", ""]
        all_rows.write_text("\n".join(full))
    else:
        short += ["No results yet: `python -m bench run --json` writes them.", ""]
    text = _put(path.read_text(), BEGIN, short[:-1], END)
    path.write_text(_put(text, RECIPES_BEGIN, recipes(), RECIPES_END))
    print(f"written: {path.name} and {all_rows.relative_to(ROOT)}, {len(files)} result files")
    return 0
