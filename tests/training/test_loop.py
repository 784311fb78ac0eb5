"""Checkpoints, the order of the data, and trainings that are killed."""

# ruff: noqa: NPY002  what is to be restored is the global generator

from __future__ import annotations

import doctest
import itertools
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import resumed
import torch

from pyseqnet.training import (
    batches,
    fit,
    load_checkpoint,
    order,
    random_state,
    restore_random_state,
    save_checkpoint,
)

pytest.importorskip("tqdm", reason="the loop needs the extra 'recipes'")
SCRIPT = Path(__file__).with_name("resumed.py")
ROOT = Path(__file__).parents[2]


def test_examples() -> None:
    results = doctest.testmod(order)
    assert results.attempted
    assert not results.failed


# --- killed -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_curve(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    wanted = resumed.train(tmp_path / "whole")
    folder, curve = tmp_path / "killed", tmp_path / "curve.json"
    seen = 0
    for kill in range(2):
        process = subprocess.Popen([sys.executable, SCRIPT, folder, curve, "0.02"], cwd=ROOT)
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and process.poll() is None:
                step = load_checkpoint(folder / "last.pt")["step"] if (folder / "last.pt").exists() else 0
                if step > seen:
                    break
                time.sleep(0.005)
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(random.Random(kill).random() * 0.1)  # in the midst of a step, or of writing
        finally:
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        seen = load_checkpoint(folder / "last.pt")["step"]
        assert 0 < seen < 60
        assert not curve.exists()
    subprocess.run([sys.executable, SCRIPT, folder, curve, "0"], cwd=ROOT, check=True)
    found = json.loads(curve.read_text())
    assert found == json.loads(json.dumps(wanted))  # every float, bit for bit
    assert len(found["at"]) == len(found["loss"]) == 9
    # The best weights are the result.
    test = found["scores"]["test"]
    assert found["best"] == found["at"][test.index(min(test))]
    # A training that has ended is not begun again.
    assert json.loads(json.dumps(resumed.train(folder))) == found


def test_what_is_half_written_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "a.pt"
    save_checkpoint(path, {"x": torch.arange(3)})
    whole = torch.save

    def half(state, file) -> None:
        whole(state, file)
        file.truncate(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"x": torch.arange(4)})
    assert load_checkpoint(path)["x"].tolist() == [0, 1, 2]
    monkeypatch.undo()
    save_checkpoint(path, {"x": torch.arange(5)})
    assert load_checkpoint(path)["x"].tolist() == [0, 1, 2, 3, 4]
    assert [p.name for p in path.parent.iterdir()] == ["a.pt"]


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        load_checkpoint(tmp_path / "evil.pt")


def test_every_generator_goes_back(tmp_path: Path) -> None:
    np.random.standard_normal()  # half of a pair is kept for the next call

    def draw() -> list[float]:
        return [
            torch.rand(()).item(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal(),
        ]  # fmt: skip

    save_checkpoint(tmp_path / "r.pt", random_state())
    first = draw()
    assert draw() != first
    restore_random_state(load_checkpoint(tmp_path / "r.pt"))
    assert draw() == first


# --- order ------------------------------------------------------------------------------------------------------


def epoch(draw: batches) -> list[list[int]]:
    return [draw().tolist() for _ in range(len(draw))]


def test_every_example_once_an_epoch_in_an_order_of_its_own() -> None:
    draw = batches(23, 5, seed=3)
    epochs = [epoch(draw) for _ in range(3)]
    flat = [list(itertools.chain(*one)) for one in epochs]
    assert all(sorted(one) == list(range(23)) for one in flat)
    assert len({tuple(one) for one in flat}) == 3
    assert [len(b) for b in epochs[0]] == [5, 5, 5, 5, 3]
    assert epoch(batches(23, 5, seed=3)) == epochs[0]
    assert epoch(batches(23, 5, seed=4)) != epochs[0]


def test_batches_by_length_waste_little_and_hold_what_fits() -> None:
    lengths = torch.randint(1, 100, (5000,)).tolist()
    for options in ({}, {"tokens": 800}):
        plan = epoch(batches(5000, 32, seed=0, lengths=lengths, **options))
        assert sorted(itertools.chain(*plan)) == list(range(5000))
        room = sum(len(b) * max(lengths[i] for i in b) for b in plan)
        assert room < 1.1 * sum(lengths)
        assert max(map(len, plan)) <= 32
        if options:
            assert max(len(b) * max(lengths[i] for i in b) for b in plan) <= 800
    long = batches(3, 2, seed=0, lengths=[1000, 1, 1], tokens=10)
    assert sorted(map(len, epoch(long))) == [1, 2]


@pytest.mark.parametrize("steps", [0, 4, 9])
def test_order_goes_on_where_it_was(steps: int) -> None:
    one, other = batches(11, 3, seed=1), batches(11, 3, seed=1)
    for _ in range(steps):
        one()
    state = one.state_dict()
    wanted = [one().tolist() for _ in range(9)]
    other()
    other.load_state_dict(state)
    assert [other().tolist() for _ in range(9)] == wanted
    with pytest.raises(ValueError, match=r"the checkpoint's batches are .*'seed': 1.*, these are .*'seed': 2"):
        batches(11, 3, seed=2).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3, 1), "count and size must be at least 1"),
        ((3, 3, 1, [1]), "lengths must be 3 numbers"),
        ((3, 3, 1, None, 9), "needs lengths"),
    ],
)
def test_orders_that_cannot_be(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(*arguments)


# --- the loop ---------------------------------------------------------------------------------------------------


def line():
    """y = 2 x, a model and its loss."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    x = torch.arange(6.0).unsqueeze(1)
    draw = batches(6, 2, seed=0)

    def loss() -> torch.Tensor:
        chosen = draw()
        return (model(x[chosen]) - 2 * x[chosen]).square().mean()

    return model, loss


def test_loss_is_the_mean_since_the_last_look() -> None:
    every = fit(*line(), 6, looks=6, progress=False)
    pairs = fit(*line(), 6, looks=3, progress=False)
    assert pairs.at == [2, 4, 6]
    assert pairs.loss == [(a + b) / 2 for a, b in zip(every.loss[::2], every.loss[1::2], strict=True)]


def test_gradients_are_clipped_before_the_step() -> None:
    model, loss = line()
    fit(model, loss, 1, max_norm=0.5, progress=False)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert norm == pytest.approx(0.5)


def test_looks_are_without_dropout_and_gradients() -> None:
    model, loss = line()
    states = []

    def evaluate() -> dict[str, float]:
        states.append((model.training, torch.is_grad_enabled()))
        return {}

    fit(model, loss, 4, looks=2, evaluate=evaluate, progress=False)
    assert states == [(False, False)] * 2
    assert not model.training


@pytest.mark.parametrize("kept", [False, True])
def test_the_best_weights_are_the_result(kept: bool, tmp_path: Path) -> None:
    model, loss = line()
    metrics, seen = iter([0.1, 0.9, 0.3]), []

    def evaluate() -> dict[str, float]:
        seen.append(model.weight.item())
        return {"m": next(metrics)}

    folder = tmp_path if kept else None
    history = fit(model, loss, 30, looks=3, evaluate=evaluate, best_by="m", folder=folder, progress=False)
    assert history.best_step == 20
    assert model.weight.item() == seen[1] != seen[2]
    with pytest.raises(ValueError, match="best_by: there is no 'bleu' among the scores: none"):
        fit(*line(), 3, best_by="bleu", progress=False)


def test_another_trainings_folder_is_refused(tmp_path: Path) -> None:
    fit(*line(), 4, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"of another training: it has 4 steps, not 5"):
        fit(*line(), 5, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"of another training: .*\n.*size mismatch"):
        fit(torch.nn.Linear(2, 1), line()[1], 4, folder=tmp_path, progress=False)


def test_progress_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    fit(*line(), 4, name="lines")
    assert "lines: 100%" in capfd.readouterr().err
