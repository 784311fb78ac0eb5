"""The training loop of the recipes: steps of an optimiser, looks at held-out data, a history of both."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class History:
    """What a training looked like: one entry of each list a look at the held-out data."""

    at: list[int] = field(default_factory=list)  # steps done
    loss: list[float] = field(default_factory=list)  # mean since the entry before
    scores: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0


def seconds_between_lines() -> float:
    """How often a progress bar is drawn: a log wants few lines."""
    return 0.1 if sys.stderr.isatty() else 10.0


def fit(
    model: torch.nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    *,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    cycle: bool = True,
    max_norm: float = 1.0,
    optimizer: torch.optim.Optimizer | None = None,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    looks: int = 10,
    name: str = "training",
    progress: bool = True,
) -> History:
    """Trains ``model`` in place for ``steps`` steps; the weights after the last one are the result.

    Args:
        model: is in training mode during a step and in evaluation mode, without gradients, during a look.
        loss: draws the next batch and gives its loss, a scalar with a gradient.
        learning_rate, weight_decay: of AdamW, unless ``optimizer`` is given.
        cycle: the learning rate rises and falls once (`torch.optim.lr_scheduler.OneCycleLR`, Smith, Topin, 2018) with
            ``learning_rate`` as its peak. Otherwise it stays.
        max_norm: of the gradient; longer ones are shortened.
        evaluate: scores by name, from held-out data. They are only looked at.
        looks: how often, evenly spread, the last one at the end.
        name, progress: of the progress bar on standard error, and whether there is one.

    Raises:
        ValueError: ``steps`` or ``looks`` is below 1.
        FloatingPointError: the loss is no longer finite.
    """
    from tqdm import tqdm

    if steps < 1 or looks < 1:
        raise ValueError(f"steps and looks must be at least 1; got {steps} and {looks}")
    chosen = optimizer or torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(chosen, learning_rate, total_steps=steps) if cycle else None
    history = History()
    every = max(1, steps // looks)
    total, since = 0.0, 0
    start = time.perf_counter()
    with tqdm(
        range(1, steps + 1), desc=name, unit="step", mininterval=seconds_between_lines(), disable=not progress
    ) as bar:
        for step in bar:
            model.train()
            chosen.zero_grad()
            value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            chosen.step()
            if schedule is not None:
                schedule.step()
            total, since = total + value.item(), since + 1
            if not math.isfinite(total):
                raise FloatingPointError(f"{name}: the loss of step {step} is {value.item()}")
            if step % every and step != steps:
                continue
            history.at.append(step)
            history.loss.append(total / since)
            total, since = 0.0, 0
            line = f"loss {history.loss[-1]:.3f}"
            if evaluate is not None:
                model.eval()
                with torch.no_grad():
                    found = evaluate()
                for key, score in found.items():
                    history.scores.setdefault(key, []).append(score)
                    line += f", {key} {score:.4g}"
            bar.set_postfix_str(line, refresh=False)
    model.eval()
    history.seconds = time.perf_counter() - start
    return history


def batches(count: int, size: int, seed: int) -> Callable[[], Tensor]:
    """Draws the indices of batches of ``size``, the last of an epoch maybe smaller: every element once an epoch."""
    if count < 1 or size < 1:
        raise ValueError(f"count and size must be at least 1; got {count} and {size}")
    generator = torch.Generator().manual_seed(seed)
    waiting: list[Tensor] = []

    def following() -> Tensor:
        if not waiting:
            waiting.extend(reversed(torch.randperm(count, generator=generator).split(size)))
        return waiting.pop()

    return following
