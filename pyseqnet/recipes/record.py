"""The table of scores: which recipe reached what, with which seed, when, at which commit."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import pyseqnet
from pyseqnet.recipes import Score, Settings


def _commit() -> str:
    if named := os.environ.get("PYSEQNET_COMMIT"):
        return named
    try:
        root = Path(pyseqnet.__file__).parent
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def row(name: str, settings: Settings, scores: list[Score], seconds: float) -> dict[str, Any]:
    """All there is to say about one run, ready for JSON."""
    return {
        "recipe": name,
        "quick": settings.quick,
        "seed": settings.seed,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "scores": [{**asdict(score), "passed": score.passed} for score in scores],
    }


def keep(path: Path, new: dict[str, Any]) -> None:
    """Puts a row into the file of rows in place of the recipe's older one; the file is replaced as a whole."""
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = sorted([old for old in rows if old["recipe"] != new["recipe"]] + [new], key=lambda one: one["recipe"])
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(path.suffix + ".new")
    written.write_text(json.dumps(rows, indent=1) + "\n")
    written.replace(path)
