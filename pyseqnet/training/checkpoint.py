"""Checkpoints that are whole or not there, and the state of every random number generator.

`fit` uses them; a training loop of one's own can, too.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch


def save_checkpoint(path: str | os.PathLike[str], state: Any) -> None:
    """Writes `state` so that at any moment `path` holds the old checkpoint or the new one, never a part.

    It is written to a temporary file beside it, forced to the disk, and renamed, which POSIX does at once. A process
    that is killed leaves at most that temporary file, which the next one overwrites.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)


def load_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> Any:
    """What `save_checkpoint` wrote: tensors and plain values only, no code is run (``weights_only=True``)."""
    return torch.load(path, map_location=map_location, weights_only=True)


def random_state() -> dict[str, Any]:
    """The state of torch's, CUDA's, numpy's and Python's global generators, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  the global one, which others may use
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else [],
        "numpy": [str(kind), [int(key) for key in keys], *[float(x) if isinstance(x, float) else int(x) for x in rest]],
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Sets all that `random_state` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    version, words, spare = state["python"]
    random.setstate((version, tuple(words), spare))


def state_of(part: Any) -> Any:
    """Of a `torch.Generator`, or of anything with ``state_dict``."""
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def restore(part: Any, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state)
    else:
        part.load_state_dict(state)
