"""bench/results/fuzz.md from logs of tests/fuzz.py.

python tests/fuzz_summary.py LOG... [--crash WORDS]... > bench/results/fuzz.md
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fuzz_problems import DTYPES, FUNCTIONS


def table(title: str, counts: dict[str, int]) -> list[str]:
    return ["", f"| {title} | problems |", "|---|---|", *(f"| {name} | {number} |" for name, number in counts.items())]


def summary(batches: list[dict], crashes: Sequence[str] = ()) -> str:
    """`crashes`: what a log cannot tell, processes that died."""
    total: Counter[str] = Counter()
    for batch in batches:
        total.update(batch["counts"])
    misses = [batch for batch in batches if batch["miss"]]
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    commits = Counter[str]()
    for batch in batches:
        commits[batch["commit"]] += batch["counts"].get("passed", 0)
    kernels = {name: number for name, number in sorted(total.items()) if ":" in name}
    lines = [
        "# Random problems",
        "",
        "Written by `tests/fuzz_summary.py` from the logs of `make fuzz`. A problem counts once it has passed, forward",
        "and backward, against the float64 reference; refused ones, whose pinned kernel is not for them, do not.",
        "",
        f"{total['passed']} problems passed in {len(batches)} batches, {total['refused']} were refused, {len(misses)}",
        "batches ended in a miss. Bounds and kernels may differ from commit to commit: "
        + ", ".join(f"{c} ({n} problems)" for c, n in commits.items())
        + ".",
        *table("function", {name: total[name] for name in sorted(FUNCTIONS)}),
        *table("dtype", {name: total[name] for name in dtypes}),
        *table("kernel", {"own choice": total["own choice"], **kernels}),
        "",
        "Misses, each mended or explained by a test in `tests/test_fuzz.py`:",
        "",
        *(f"- seed {b['seed']} at {b['commit']}: {b['miss'].splitlines()[0]}" for b in misses),
        *([] if misses else ["- none"]),
        "",
        "Processes that died:",
        "",
        *([f"- {crash}" for crash in crashes] or ["- none"]),
        "",
        "Seeds: " + " ".join(str(batch["seed"]) for batch in batches),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("--crash", action="append", default=[])
    given = parser.parse_args()
    print(
        summary([json.loads(line) for log in given.logs for line in log.read_text().splitlines()], given.crash), end=""
    )
