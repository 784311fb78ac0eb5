"""Copying: a neural Turing machine writes what it hears into its memory and reads it out, beside an LSTM without one.

Graves, Wayne, Danihelka: Neural Turing machines, 2014. The sequences are drawn on the spot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyseqnet import nn
from pyseqnet.models import NeuralTuringMachine
from pyseqnet.recipes import Score, Settings
from pyseqnet.training import History, fit

BITS = 8
LONGEST = 10  # vectors of a sequence in the training
LONGER = (20, 40)  # reported: no sequence as long was seen
BATCH = 16
STEPS, QUICK_STEPS = 4000, 30
LEARNING_RATE = 1e-3  # three times as much, or more at once: the memory stays unused
TESTED = 200  # sequences a length
NTM, LSTM = "Turing machine", "LSTM"


class Baseline(torch.nn.Module):
    """An LSTM of about as many weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BITS + 1, 112, batch_first=True)
        self.head = torch.nn.Linear(112, BITS)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.head(self.lstm(input)[0])
        return output


def sequences(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What is heard, (count, 2 length + 1, BITS + 1): vectors, the sign to repeat them, silence; the vectors."""
    bits = torch.randint(0, 2, (count, length, BITS), generator=generator).float()
    heard = torch.zeros(count, 2 * length + 1, BITS + 1)
    heard[:, :length, :BITS] = bits
    heard[:, length, BITS] = 1
    return heard, bits


def wrong_bits(model: Any, length: int, settings: Settings) -> float:
    """The share of bits that are copied wrongly; guessing gives 0.5."""
    heard, bits = sequences(settings.steps(TESTED, 20), length, torch.Generator().manual_seed(settings.seed + 1))
    return ((model(heard)[:, length + 1 :] > 0) != bits.bool()).double().mean().item()


def train(name: str, settings: Settings) -> tuple[Any, History]:
    torch.manual_seed(settings.seed)
    model = NeuralTuringMachine(BITS + 1, BITS) if name == NTM else Baseline()
    generator = torch.Generator().manual_seed(settings.seed)

    def loss() -> Tensor:
        length = int(torch.randint(1, (3 if settings.quick else LONGEST) + 1, (1,), generator=generator))
        heard, bits = sequences(BATCH, length, generator)
        return torch.nn.functional.binary_cross_entropy_with_logits(model(heard)[:, length + 1 :], bits)

    history = fit(
        model,
        loss,
        settings.steps(STEPS, QUICK_STEPS),
        learning_rate=LEARNING_RATE,
        cycle=False,
        max_norm=10.0,
        evaluate=lambda: {"wrong": wrong_bits(model, LONGEST, settings)},
        looks=settings.steps(10, 3),
        name=name,
        progress=settings.progress,
    )
    return model, history


def run(settings: Settings) -> list[Score]:
    from pyseqnet.recipes import draw

    trained = {name: train(name, settings) for name in (NTM, LSTM)}
    scores = []
    with torch.no_grad():
        for name, (model, _) in trained.items():
            for length in (LONGEST, *LONGER):
                goal = 1.0 if name == NTM and length == LONGEST else None
                wrong = 100 * wrong_bits(model, length, settings)
                scores.append(Score(f"wrong bits, {length} vectors, {name}, %", wrong, goal, at_least=False))
        heard, _ = sequences(1, LONGEST, torch.Generator().manual_seed(settings.seed))
        _, weights = trained[NTM][0](heard, need_weights=True)
    for kind, one in zip(("written", "read"), weights, strict=True):
        steps = [str(step) for step in range(one.shape[1])]
        rows = [str(row) for row in range(one.shape[2])]
        draw.matrix(one[0].t(), rows, steps, settings.out / f"{kind}.png", f"rows {kind} over time")
    draw.curves({name: history for name, (_, history) in trained.items()}, settings.out / "learning_curves.png")
    return [*scores, Score.fall(NTM, trained[NTM][1])]
