"""A small training, run by test_loop.py as a process that is killed: ``resumed.py FOLDER CURVE SECONDS_A_STEP``."""

# ruff: noqa: NPY002  what is to be restored is the global generator

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch

from pyseqnet import nn
from pyseqnet.training import batches, fit


def train(folder: Path, pause: float = 0.0) -> dict[str, object]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    generator = torch.Generator().manual_seed(1)
    model = torch.nn.ModuleDict({
        "lstm": nn.LSTM(4, 8, batch_first=True), "dropout": torch.nn.Dropout(0.3), "head": torch.nn.Linear(8, 3),
    })  # fmt: skip
    x, y = torch.randn(50, 6, 4), torch.randint(0, 3, (50,))

    def scores(x: torch.Tensor) -> torch.Tensor:
        return model["head"](model["dropout"](model["lstm"](x)[0][:, -1]))

    draw = batches(50, 8, seed=5, lengths=[i % 7 for i in range(50)])

    def loss() -> tuple[torch.Tensor, dict[str, float]]:
        time.sleep(pause)
        chosen = draw()
        noise = 0.1 * torch.randn(len(chosen), 6, 4, generator=generator) + random.random() / 10 + np.random.rand() / 10
        found = scores(x[chosen] + noise)
        right = (found.argmax(1) == y[chosen]).double().mean().item()
        return torch.nn.functional.cross_entropy(found, y[chosen]), {"accuracy": right}

    def test() -> dict[str, float]:
        return {"test": torch.nn.functional.cross_entropy(scores(x), y).item()}

    history = fit(
        model, loss, 60, learning_rate=0.01, evaluate=test, looks=8, best_by="test", higher_is_better=False,
        folder=folder, save_every=3, stateful=[draw, generator], progress=False,
    )  # fmt: skip
    weights = {name: value.flatten().tolist() for name, value in model.state_dict().items()}
    return {
        "at": history.at,
        "loss": history.loss,
        "scores": history.scores,
        "best": history.best_step,
        "weights": weights,
    }


if __name__ == "__main__":
    result = train(Path(sys.argv[1]), float(sys.argv[3]))
    Path(sys.argv[2]).write_text(json.dumps(result))
