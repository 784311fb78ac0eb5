"""The field of a paper from its words and its citations: graph attention on Cora.

Veličković, Cucurull, Casanova, Romero, Liò, Bengio: Graph attention networks, 2018.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, dropout, elu

from pyseqnet.data import cora
from pyseqnet.nn import GraphAttention
from pyseqnet.recipes import Score, Settings
from pyseqnet.training import fit

HEADS, WIDTH, DROPOUT = 8, 8, 0.6  # the paper's
STEPS, QUICK_STEPS = 400, 20


class GraphNetwork(torch.nn.Module):
    """Two layers of graph attention: several heads side by side, then one head for each class's score."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.first = GraphAttention(features, WIDTH, HEADS, dropout=DROPOUT)
        self.second = GraphAttention(HEADS * WIDTH, classes, 1, concat=False, dropout=DROPOUT)

    def hidden(self, nodes: Tensor, edges: Tensor) -> Tensor:
        return elu(self.first(dropout(nodes, DROPOUT, self.training), edges))

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        scores: Tensor = self.second(dropout(self.hidden(nodes, edges), DROPOUT, self.training), edges)
        return scores


def run(settings: Settings) -> list[Score]:
    from sklearn.decomposition import PCA

    from pyseqnet.recipes import draw

    data = cora.graph()
    model = GraphNetwork(data.nodes.shape[1], data.classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, weight_decay=5e-4)
    best = {"validation": -1.0}
    kept: dict[str, Tensor] = {}

    def loss() -> Tensor:
        return cross_entropy(model(data.nodes, data.edges)[data.train], data.labels[data.train])

    def evaluate() -> dict[str, float]:
        right = model(data.nodes, data.edges).argmax(1) == data.labels
        found = {
            "validation": right[data.validation].double().mean().item(),
            "test": right[data.test].double().mean().item(),
        }
        if found["validation"] > best["validation"]:  # as the paper: the weights that are best on the validation nodes
            best.update(found)
            kept.update(copy.deepcopy(model.state_dict()))
        return found

    steps = settings.steps(STEPS, QUICK_STEPS)
    history = fit(
        model,
        loss,
        steps,
        optimizer=optimizer,
        cycle=False,
        evaluate=evaluate,
        looks=steps // 4,
        name="graph attention",
        progress=settings.progress,
    )
    model.load_state_dict(kept)
    with torch.no_grad():
        hidden = model.hidden(data.nodes, data.edges)[data.test]
    plane = torch.from_numpy(PCA(2, random_state=settings.seed).fit_transform(hidden.numpy()))
    names = [f"field {number}" for number in range(data.classes)]
    draw.points(plane, data.labels[data.test].tolist(), names, settings.out / "papers.png")
    return [Score("accuracy on 1000 test papers, %", 100 * best["test"], 81.0), Score.fall("graph attention", history)]
