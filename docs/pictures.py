"""Draws the pictures of gallery.md from layers as they are: `python docs/pictures.py FOLDER`, or the docs build.

Each function below is one picture, named after its file, and returns a figure. Trainings are of seconds, with fixed
seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

import pyseqnet.functional as F
from pyseqnet import nn
from pyseqnet.masks import Causal, Global, Local, Strided

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PICTURES: dict[str, Callable[[], Any]] = {}
LENGTH, WIDTH = 32, 16


def picture(draw: Callable[[], Any]) -> Callable[[], Any]:
    PICTURES[draw.__name__] = draw
    return draw


def panels(images: dict[str, Tensor], xlabel: str = "", ylabel: str = "", **options: Any) -> Any:
    """Matrices side by side under their titles."""
    figure, axes = plt.subplots(1, len(images), figsize=(2.6 * len(images), 2.8), squeeze=False, layout="constrained")
    for axis, (title, image) in zip(axes[0], images.items(), strict=True):
        axis.imshow(image.detach(), **{"cmap": "viridis", "aspect": "auto", "interpolation": "nearest", **options})
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(xlabel, fontsize=8)
        axis.set_ylabel(ylabel, fontsize=8)
        axis.tick_params(labelsize=7)
    return figure


def influence(layer: Callable[[Tensor], Tensor], length: int = LENGTH, width: int = WIDTH) -> Tensor:
    """(L, L): how much output i changes with input j; (1, L, width) to (1, L, any)."""
    torch.manual_seed(0)
    x = torch.randn(1, length, width)
    jacobian = torch.autograd.functional.jacobian(lambda t: layer(t)[0].sum(-1), x)
    return jacobian.squeeze(1).norm(dim=-1)


def train(parameters: Any, loss: Callable[[], Tensor], steps: int, rate: float = 0.01) -> None:
    optimizer = torch.optim.Adam(parameters, rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def ring(size: int = 28) -> Tensor:
    """(size, size): a drawn ring with a stroke."""
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, size),) * 2, indexing="ij")
    drawn = ((x.square() + y.square()).sqrt() - 0.6).abs() < 0.12
    return (drawn | ((x - y).abs() < 0.1) & (x > 0)).float()


@picture
def convolution() -> Any:
    layer = nn.Conv2d(1, 2, 3, padding=1, bias=False)
    edge = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    layer.weight.data[:, 0] = torch.stack([edge, edge.t()])
    seen = torch.relu(layer(ring()[None, None]))
    pooled = nn.MaxPool2d(4)(seen)
    return panels(
        {"image": ring(), "vertical edges": seen[0, 0], "horizontal": seen[0, 1], "pooled 4 x 4": pooled[0, 0]}
    )


@picture
def locally_connected() -> Any:
    """Trained to tell where a patch is: positions come to differ, which a convolution cannot."""
    torch.manual_seed(0)
    local, shared = nn.LocallyConnected2d(1, 1, 3, 8, padding=1), nn.Conv2d(1, 1, 3, padding=1)
    ramp = torch.arange(8.0).expand(8, 8) / 8

    def error(layer: torch.nn.Module) -> Tensor:
        x = torch.rand(32, 1, 8, 8)
        return (layer(x) - x * ramp).square().mean()

    for layer in (local, shared):
        train(layer.parameters(), lambda layer=layer: error(layer), 300, 0.03)
    centre = local.weight[:, :, 0, 0, 1, 1]
    return panels({
        "wanted at each position": ramp, "locally connected: its weight": centre,
        "convolution: one weight": shared.weight[0, 0, 1, 1].expand(8, 8),
    }, vmin=-0.1, vmax=1)  # fmt: skip


def after_an_impulse(layer: torch.nn.Module) -> Tensor:
    x = torch.zeros(24, 1, 4)
    x[2] = 2
    return layer(x)[0][:, 0].t()


@picture
def elman_and_jordan() -> Any:
    torch.manual_seed(1)
    layers = {
        "Elman: units feed back": nn.RNN(4, 12),
        "Jordan: the output feeds back": nn.JordanRNN(4, 12, 12),
        "Jordan, decay 0.7": nn.JordanRNN(4, 12, 12, decay=0.7),
    }
    return panels({name: after_an_impulse(layer) for name, layer in layers.items()}, "step", "unit", cmap="coolwarm")


def remembering(layer: torch.nn.Module, steps: int = 250) -> Tensor:
    """Trains `layer` to hold the number that came with a mark, and returns an example (T, 1, 2)."""
    head = torch.nn.Linear(layer.hidden_size, 1)

    def example(batch: int, length: int = 20) -> tuple[Tensor, Tensor]:
        x = torch.rand(length, batch, 2).mul(2).sub(1)
        marks = torch.randint(2, length // 2, (batch,))
        x[..., 1] = (torch.arange(length)[:, None] == marks).float()
        return x, x[marks, torch.arange(batch), 0]

    def error() -> Tensor:
        x, wanted = example(32)
        return (head(layer(x)[0][-1]).squeeze(-1) - wanted).square().mean()

    train([*layer.parameters(), *head.parameters()], error, steps, 0.02)
    return example(1)[0]


@picture
def lstm_gates() -> Any:
    """The gates of a trained layer, from its own weights and states, beside its input."""
    torch.manual_seed(2)
    layer = nn.LSTM(2, 6)
    x = remembering(layer)
    h = torch.cat([torch.zeros(1, 1, 6), layer(x)[0][:-1]])
    sums = x @ layer.weight_ih_l0.t() + layer.bias_ih_l0 + h @ layer.weight_hh_l0.t() + layer.bias_hh_l0
    i, f, _, o = (part[:, 0].sigmoid().t() for part in sums.chunk(4, -1))
    return panels({"input: number, mark": x[:, 0].t(), "input gate": i, "forget gate": f, "output gate": o}, "step")


@picture
def gru_gates() -> Any:
    torch.manual_seed(2)
    layer = nn.GRU(2, 6)
    x = remembering(layer)
    h = torch.cat([torch.zeros(1, 1, 6), layer(x)[0][:-1]])
    ours, theirs = x @ layer.weight_ih_l0.t() + layer.bias_ih_l0, h @ layer.weight_hh_l0.t() + layer.bias_hh_l0
    r, z, _ = (a + b for a, b in zip(ours.chunk(3, -1), theirs.chunk(3, -1), strict=True))
    gates = {"reset gate": r.sigmoid()[:, 0].t(), "update gate (1: keep)": z.sigmoid()[:, 0].t()}
    return panels({"input: number, mark": x[:, 0].t(), **gates}, "step")


@picture
def alignment() -> Any:
    """Additive attention, trained to read a sequence backwards."""
    torch.manual_seed(0)
    places = positions(12)
    layer = nn.AdditiveAttention(WIDTH, WIDTH, 32)

    def error() -> Tensor:
        values = torch.randn(16, 12, 4)
        found, _ = layer(places.expand(16, -1, -1), places.expand(16, -1, -1), values)
        return (found - values.flip(1)).square().mean()

    _, before = layer(places, places)
    train(layer.parameters(), error, 400)
    _, after = layer(places, places)
    return panels({"before training": before[0], "trained to reverse": after[0]}, "position read", "position written")


def positions(length: int, width: int = WIDTH) -> Tensor:
    """(1, length, width): sines and cosines."""
    angle = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    return torch.stack([angle.sin(), angle.cos()], -1).reshape(1, length, width)


@picture
def location_aware() -> Any:
    """Each step reads on where the step before stopped: filters of the alignment, trained to move by one."""
    torch.manual_seed(0)
    layer = nn.LocationAwareAttention(4, 4, 32, channels=4, kernel_size=5)
    keys, nothing = torch.zeros(1, 16, 4), torch.zeros(1, 4)

    def walk() -> Tensor:
        state, rows = None, []
        for _ in range(12):
            _, weights, state = layer(nothing, keys, state=state)
            rows.append(weights.reshape(-1))
        return torch.stack(rows)

    wanted = torch.eye(16)[:12]
    marked = torch.zeros(1, 16, 4)
    marked[:, 0] = 1
    keys = marked  # the first position looks different, so that there is a beginning
    before = walk()
    train(layer.parameters(), lambda: -(walk().clamp(min=1e-9).log() * wanted).sum(1).mean(), 300, 0.02)
    return panels({"before training": before, "trained to move on": walk()}, "position read", "step")


@picture
def self_attention() -> Any:
    """The heads of a layer over positions alone."""
    torch.manual_seed(3)
    layer = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
    x = 3 * positions(LENGTH)
    weights = layer(x, x, x, average_attn_weights=False)[1][0]
    return panels({f"head {n}": head for n, head in enumerate(weights)}, "key", "query")


@picture
def receptive_fields() -> Any:
    """How much output i changes with input j."""
    torch.manual_seed(0)
    truncated = nn.TruncatedSelfAttention(WIDTH, 2, batch_first=True, left=6, right=2)
    windows = nn.LongformerSelfAttention(WIDTH, 2, batch_first=True, window=8, global_tokens=2)
    linear = nn.LinearAttention(WIDTH, 2, batch_first=True, causal=True)
    fading = nn.LinearAttention(WIDTH, 2, batch_first=True, causal=True, decay=0.8)
    return panels({
        "truncated": influence(lambda x: truncated(x, x, x)[0]),
        "window, global": influence(lambda x: windows(x, x, x, need_weights=False)[0]),
        "linear, causal": influence(lambda x: linear(x, x, x)), "with decay": influence(lambda x: fading(x, x, x)),
    }, "input", "output")  # fmt: skip


@picture
def graph() -> Any:
    """Self-attention over a ring of nodes with one chord: what a node sees after one layer and after two."""
    torch.manual_seed(0)
    here = torch.arange(12)
    edges = torch.stack([torch.cat([here, (here + 1) % 12]), torch.cat([(here + 1) % 12, here])])
    edges = torch.cat([edges, torch.tensor([[0, 6], [6, 0]])], 1)
    one, two = nn.GraphAttention(WIDTH, WIDTH), nn.GraphAttention(WIDTH, WIDTH)
    return panels({
        "one layer": influence(lambda x: one(x[0], edges)[None], 12),
        "two layers": influence(lambda x: two(torch.relu(one(x[0], edges)), edges)[None], 12),
    }, "node", "node that looks")  # fmt: skip


@picture
def image_attention() -> Any:
    """Where four pixels of a picture look, by a layer over its brightness and place."""
    torch.manual_seed(1)
    layer = nn.SelfAttention2d(16, spectral_norm=False)
    size = 16
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, size),) * 2, indexing="ij")
    image = torch.stack([3 * ring(size), x, y, *torch.zeros(13, size, size)])[None]
    weights = layer(image, need_weights=True)[1][0].reshape(size, size, size // 2, size // 2)  # keys are pooled
    pixels = {"on the ring": weights[8, 3], "inside": weights[8, 8], "corner": weights[1, 1]}
    return panels({"image": ring(size), **pixels})


@picture
def feature_maps() -> Any:
    """The maps of linear attention, and the attention that they give beside softmax."""
    figure = plt.figure(figsize=(10, 2.8), layout="constrained")
    curves, *axes = figure.subplots(1, 4)
    x = torch.linspace(-3, 3, 100)
    for name, y in {"elu + 1": torch.nn.functional.elu(x) + 1, "relu": x.relu(), "exp": x.exp().clamp(max=6)}.items():
        curves.plot(x, y, label=name)
    curves.legend(fontsize=8)
    curves.set_title("feature maps", fontsize=9)
    q = 2 * positions(LENGTH)[None]
    one_hot = torch.eye(LENGTH)[None, None]  # values that show the weights
    found = {"softmax": F.scaled_dot_product_attention(q, q, one_hot)}
    found |= {name: F.linear_attention(q, q, one_hot, feature_map=name) for name in ("elu", "exp")}
    for axis, (name, weights) in zip(axes, found.items(), strict=True):
        axis.imshow(weights[0, 0], cmap="viridis")
        axis.set_title(name, fontsize=9)
    return figure


@picture
def hash_buckets() -> Any:
    """Locality-sensitive hashing: who sees whom, for one round of hashes and for four."""
    from pyseqnet.nn import efficient

    found = {}
    for rounds in (1, 4):
        torch.manual_seed(0)
        layer = efficient.ReformerAttention(WIDTH, 1, batch_first=True, bucket_size=8, n_hashes=rounds).eval()
        found[f"{rounds} rounds of hashes"] = influence(lambda x, layer=layer: layer(x, x, x)[0]) > 1e-6
    return panels(found, "key", "query")


@picture
def ctc_posterior() -> Any:
    """Which label each step is, by all alignments together: what flows back from the loss."""
    torch.manual_seed(4)
    steps, labels = 24, torch.tensor([[1, 2, 2, 3]])
    logits = 0.5 * torch.randn(steps, 1, 4)
    for place, label in ((4, 1), (10, 2), (14, 2), (20, 3)):
        logits[place, 0, label] += 3
    logits.requires_grad_()
    loss = F.ctc_loss(logits, labels, (steps,), (4,), reduction="sum", from_logits=True)
    (grad,) = torch.autograd.grad(loss, logits)
    softmax = logits.softmax(-1)
    posterior = (softmax - grad)[:, 0].t()  # the gradient is softmax minus posterior
    return panels({"softmax of each step": softmax[:, 0].t(), "posterior, given 1 2 2 3": posterior}, "step", "label")


@picture
def crf_marginals() -> Any:
    """A chain whose transitions want to stay; the line is the best path."""
    torch.manual_seed(5)
    emissions, nothing = torch.randn(1, 24, 4), torch.zeros(4)
    stay = 2 * torch.eye(4)
    alone = emissions.softmax(-1)[0].t()
    together = F.crf_marginals(emissions, None, nothing, nothing, stay)[0].t()
    figure = panels({"each step by itself": alone, "marginals of the chain": together}, "step", "tag", vmin=0, vmax=1)
    (path,) = F.crf_decode(emissions, None, nothing, nothing, stay)
    figure.axes[1].plot(path, color="white")
    return figure


@picture
def patterns() -> Any:
    found = {
        "Causal": Causal(), "Local(4)": Local(4), "Strided(5)": Strided(5), "Global(2)": Global(2),
        "mixed": Causal() & (Local(4) | Strided(8) | Global(2)),
    }  # fmt: skip
    return panels({name: p.to_dense(LENGTH, LENGTH).float() for name, p in found.items()}, "key", "query", cmap="Greys")


def draw(folder: Path, names: list[str] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = torch.get_rng_state()
    for name in names or PICTURES:
        figure = PICTURES[name]()
        figure.savefig(folder / f"{name}.png", dpi=90)
        plt.close(figure)
    torch.set_rng_state(state)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="only these")
    options = parser.parse_args()
    draw(options.folder, options.names)
