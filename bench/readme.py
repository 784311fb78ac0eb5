"""Writes the README's measured numbers from `bench/results/*.json`: no number there is typed by hand."""

from __future__ import annotations

import pathlib

from bench.compare import load
from bench.machine import RESULTS, ROOT
from bench.plot import chart

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


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


def section(path: pathlib.Path) -> list[str]:
    results = load(path)
    meta = results["meta"]
    where = str(meta["device"])
    if meta["device_type"] == "cpu":
        where += f" ({meta['isa']}), {meta['threads']} thread{'s' if meta['threads'] != 1 else ''}"
    modified = " with local changes" if meta["modified"] else ""
    lines = [
        f"### {where}",
        "",
        f"torch {meta['torch']}, commit {meta['commit']}{modified}, {meta['date']}; "
        f"measured ceilings: {meta['fp32_gflops']:.0f} GFLOP/s fp32, {meta['copy_gbps']:.0f} GB/s copy.",
        "",
    ]
    picture = chart(path)
    if picture:
        lines += [f"![Speed-up over torch eager]({picture.relative_to(ROOT).as_posix()})", ""]
    lines += [
        "<details><summary>All rows: one training step of the operation (forward and gradients)</summary>",
        "",
    ]
    lines += [*table(results), "", "</details>", ""]
    return lines


def readme() -> int:
    path = ROOT / "README.md"
    text = path.read_text()
    files = sorted(RESULTS.glob("*.json"))
    lines = [BEGIN, ""]
    for file in files:
        lines += section(file)
    if not files:
        lines += ["No results yet: `python -m bench run --json` writes them.", ""]
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{path.name} lacks the lines {BEGIN} and {END}")
    path.write_text(before + "\n".join(lines) + END + after)
    print(f"written: {path.name}, {len(files)} result files")
    return 0
