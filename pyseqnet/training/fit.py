"""The training loop of the demo and the recipes: steps of an optimiser, looks at held-out data, a history of both."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyseqnet.training.checkpoint import (
    load_checkpoint,
    random_state,
    restore,
    restore_random_state,
    save_checkpoint,
    state_of,
)

LAST, BEST = "last.pt", "best.pt"
Loss = Callable[[], Tensor | tuple[Tensor, Mapping[str, float]]]


@dataclass
class History:
    """What a training looked like: one entry of each list a look at the held-out data.

    ``best_step``: where the score was best that the training was asked to choose by, else None.
    """

    at: list[int] = field(default_factory=list)  # steps done
    loss: list[float] = field(default_factory=list)  # mean since the entry before
    scores: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0  # of work, those before an interruption included
    best_step: int | None = None


def seconds_between_lines() -> float:
    """How often a progress bar is drawn: a log wants few lines."""
    return 0.1 if sys.stderr.isatty() else 10.0


@dataclass
class _Run:
    """All that changes during a training: what a checkpoint holds."""

    model: torch.nn.Module
    parts: Sequence[Any]  # optimizer, schedule, and what the caller named
    steps: int
    folder: Path | None
    sign: float = 1.0
    step: int = 0
    best: float | None = None
    best_weights: dict[str, Tensor] | None = None  # where no folder keeps them
    history: History = field(default_factory=History)
    sums: dict[str, float] = field(default_factory=dict)  # since the last look
    since: int = 0

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        self.since += 1

    def record(self, found: Mapping[str, float], best_by: str | None) -> str:
        """An entry of the history, in words too; the weights are kept if they are the best so far."""
        means = {name: total / self.since for name, total in self.sums.items()}
        self.sums, self.since = {}, 0
        self.history.at.append(self.step)
        self.history.loss.append(means.pop("loss"))
        scores = {**means, **{name: float(value) for name, value in found.items()}}
        for name, value in scores.items():
            self.history.scores.setdefault(name, []).append(value)
        if best_by is not None:
            self._compare(scores, best_by)
        return ", ".join(
            [f"loss {self.history.loss[-1]:.3f}", *(f"{name} {value:.4g}" for name, value in scores.items())]
        )

    def _compare(self, scores: Mapping[str, float], best_by: str) -> None:
        if best_by not in scores:
            raise ValueError(f"best_by: there is no {best_by!r} among the scores: {', '.join(scores) or 'none'}")
        value = self.sign * scores[best_by]
        if self.best is not None and not value > self.best:
            return
        self.best, self.history.best_step = value, self.step
        weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        if self.folder is None:
            self.best_weights = weights
        else:
            save_checkpoint(self.folder / BEST, weights)

    def take_best(self) -> None:
        weights = self.best_weights if self.folder is None else load_checkpoint(self.folder / BEST)
        if weights is not None:
            self.model.load_state_dict(weights)

    def save(self) -> None:
        if self.folder is None:
            return
        state = {
            "step": self.step, "steps": self.steps, "best": self.best, "sums": self.sums, "since": self.since,
            "history": asdict(self.history), "random": random_state(), "model": self.model.state_dict(),
            "parts": [state_of(part) for part in self.parts],
        }  # fmt: skip
        save_checkpoint(self.folder / LAST, state)

    def load(self) -> None:
        """Goes on where the checkpoint is, if there is one."""
        if self.folder is None or not (self.folder / LAST).exists():
            return
        path = self.folder / LAST
        state = load_checkpoint(path)
        try:
            if state["steps"] != self.steps:
                raise ValueError(f"it has {state['steps']} steps, not {self.steps}")
            self.model.load_state_dict(state["model"])
            for part, saved in zip(self.parts, state["parts"], strict=True):
                restore(part, saved)
        except (ValueError, RuntimeError, KeyError) as error:
            raise ValueError(f"{path} is of another training: {error}") from error
        self.step, self.best, self.sums, self.since = (state[name] for name in ("step", "best", "sums", "since"))
        self.history = History(**state["history"])
        restore_random_state(state["random"])


def fit(
    model: torch.nn.Module,
    loss: Loss,
    steps: int,
    *,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    cycle: bool = True,
    max_norm: float = 1.0,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: Any = None,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    looks: int = 10,
    best_by: str | None = None,
    higher_is_better: bool = True,
    folder: str | os.PathLike[str] | None = None,
    save_every: int | None = None,
    stateful: Sequence[Any] = (),
    name: str = "training",
    progress: bool = True,
) -> History:
    """Trains ``model`` in place for ``steps`` steps; the weights after the last one are the result, or the best.

    With a ``folder``, a training that was interrupted, or killed, goes on from its last checkpoint, and on the same
    machine to the same curve, bit for bit: weights, optimizer, schedule, all global random number generators, the means
    of the running interval and what ``stateful`` names are restored.

    Args:
        model: is in training mode during a step and in evaluation mode, without gradients, during a look.
        loss: draws the next batch and gives its loss, a scalar with a gradient; or ``(loss, numbers by name)``, whose
            means go to the scores.
        learning_rate, weight_decay: of AdamW, unless ``optimizer`` is given.
        cycle: the learning rate rises and falls once (`torch.optim.lr_scheduler.OneCycleLR`, Smith, Topin, 2018) with
            ``learning_rate`` as its peak. Otherwise it stays, or follows ``schedule``, which steps after each step.
        max_norm: of the gradient; longer ones are shortened. `math.inf` leaves them.
        evaluate: scores by name, from held-out data. They are only looked at, unless ``best_by`` names one.
        looks: how often, evenly spread, the last one at the end.
        best_by, higher_is_better: the weights of the look with the best score of this name are the result.
        folder: of the checkpoint ``last.pt``, and ``best.pt`` with ``best_by``; to start afresh, delete it.
        save_every: steps between checkpoints; by default one at each look.
        stateful: what else the loss depends on, in a fixed order: `batches`, `torch.Generator`, anything with
            ``state_dict``.
        name, progress: of the progress bar on standard error, and whether there is one.

    Raises:
        ValueError: ``steps`` or ``looks`` is below 1; the folder holds another training; ``best_by`` is no score.
        FloatingPointError: the loss is no longer finite.
    """
    from tqdm import tqdm

    if steps < 1 or looks < 1:
        raise ValueError(f"steps and looks must be at least 1; got {steps} and {looks}")
    chosen = optimizer or torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    if schedule is None and cycle:
        schedule = torch.optim.lr_scheduler.OneCycleLR(chosen, learning_rate, total_steps=steps)
    parts = [chosen, *([] if schedule is None else [schedule]), *stateful]
    run = _Run(model, parts, steps, None if folder is None else Path(folder), 1.0 if higher_is_better else -1.0)
    run.load()
    every = max(1, steps // looks)
    save_every = every if save_every is None else save_every
    before, start = run.history.seconds, time.perf_counter()
    with tqdm(
        range(run.step, steps), desc=name, unit="step", initial=run.step, total=steps,
        mininterval=seconds_between_lines(), disable=not progress,
    ) as bar:  # fmt: skip
        for _ in bar:
            model.train()
            chosen.zero_grad()
            result = loss()
            value, numbers = (result, {}) if isinstance(result, Tensor) else result
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            chosen.step()
            if schedule is not None:
                schedule.step()
            run.step += 1
            run.add({"loss": value.item(), **numbers})
            if not math.isfinite(run.sums["loss"]):
                raise FloatingPointError(f"{name}: the loss of step {run.step} is {value.item()}")
            last = run.step == steps
            if run.step % every == 0 or last:
                model.eval()
                with torch.no_grad():
                    found = {} if evaluate is None else evaluate()
                bar.set_postfix_str(run.record(found, best_by), refresh=False)
            run.history.seconds = before + time.perf_counter() - start
            if run.step % save_every == 0 or last:
                run.save()
    if best_by is not None:
        run.take_best()
    model.eval()
    return run.history
