"""Which move takes the most stones? A policy network of Go without pooling, beside the same with pooling.

Silver et al., Mastering the game of Go with deep neural networks and tree search, 2016. The games are played on the
spot, by chance, on boards of 9x9; 48 planes show the last 16 positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet.data import go
from pyseqnet.models import GoPolicy
from pyseqnet.recipes import Score, Settings
from pyseqnet.training import History, batches, fit

TRAINING, QUICK_TRAINING, TESTED, QUICK_TESTED = 20000, 256, 2000, 64
FILTERS, LAYERS = 48, 6
BATCH = 64
EPOCHS = 6
LEARNING_RATE = 2e-3
SHOWN = 8


def train(
    name: str, model: torch.nn.Module, data: go.Positions, test: go.Positions, settings: Settings
) -> tuple[float, History]:
    """The share of the test positions whose move is found, and the curve."""
    draw = batches(len(data.moves), BATCH, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    points = torch.arange(go.SIZE * go.SIZE).view(go.SIZE, go.SIZE)

    def loss() -> Tensor:
        chosen = draw()
        turns, mirrored = (
            torch.randint(0, 4, (1,), generator=generator).item(),
            torch.rand(1, generator=generator) < 0.5,
        )
        planes, where = (torch.rot90(part, int(turns), (-2, -1)) for part in (data.planes[chosen], points))
        if mirrored:
            planes, where = planes.flip(-1), where.flip(-1)
        moves = where.flatten().argsort()[data.moves[chosen]]  # where the point has gone
        return torch.nn.functional.cross_entropy(model(planes.contiguous()), moves)

    def accuracy() -> float:
        found = torch.cat([model(part).argmax(1) for part in test.planes.split(500)])
        return (found == test.moves).double().mean().item()

    history = fit(
        model,
        loss,
        settings.steps(EPOCHS * len(draw), 20),
        learning_rate=LEARNING_RATE,
        evaluate=lambda: {"accuracy": accuracy()},
        name=name,
        progress=settings.progress,
    )
    return history.scores["accuracy"][-1], history


def run(settings: Settings) -> list[Score]:
    from pyseqnet.recipes import draw

    data = go.positions(settings.steps(TRAINING, QUICK_TRAINING), 2 * settings.seed)
    test = go.positions(settings.steps(TESTED, QUICK_TESTED), 2 * settings.seed + 1)
    torch.manual_seed(settings.seed)
    policy = GoPolicy(go.PLANES, FILTERS, LAYERS, go.SIZE)
    torch.manual_seed(settings.seed)
    pooled = GoPolicy(go.PLANES, FILTERS, LAYERS, go.SIZE, pool=2)  # as many weights
    right, history = train("no pooling", policy, data, test, settings)
    right_pooled, history_pooled = train("pooling", pooled, data, test, settings)
    draw.curves({"no pooling": history, "pooling": history_pooled}, settings.out / "learning_curves.png")
    with torch.no_grad():
        chances = policy(test.planes[:SHOWN]).softmax(1).view(-1, go.SIZE, go.SIZE)
    boards = test.planes[:SHOWN, 0] - test.planes[:SHOWN, 1]
    shown = torch.stack([(1 - boards) / 2, (1 - boards) / 2, (1 - boards) / 2], 3)
    shown[..., 1:] *= (1 - chances).unsqueeze(3)  # red where the network plays
    draw.images(shown, [f"{chance.max():.2f}" for chance in chances], settings.out / "moves.png", columns=4)
    likeliest = torch.bincount(data.moves).argmax()
    return [
        Score("accuracy without pooling, %", 100 * right, 90.0),
        Score("accuracy with pooling, %", 100 * right_pooled),
        Score("accuracy of the commonest move, %", 100 * (test.moves == likeliest).double().mean().item()),
        Score("points gained by not pooling", 100 * (right - right_pooled), 0.0),
        Score.fall("no pooling", history),
    ]
