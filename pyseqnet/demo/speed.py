"""Our kernels beside torch's: a training step of each, in turn, in this process, with the largest difference.

`python -m bench` in the source tree is the full measurement; this is what fits into a few seconds.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as torch_F
from torch import Tensor

import pyseqnet.functional as F
from pyseqnet import nn
from pyseqnet.models import ImageClassifier, SequenceTagger, SequenceTranslator

SECONDS_A_ROW = 0.5
FEWEST_ROUNDS, MOST_ROUNDS = 7, 200
WARM_UP_ROUNDS = 3
LINEAR_EPS = 1e-6  # added to the divisor of linear attention


@dataclass(frozen=True)
class Row:
    name: str
    ours: float  # median seconds of forward and all gradients
    torch: float
    error: float  # ours against float64, relative to the largest value, worst of result and gradients
    torch_error: float  # torch's own

    @property
    def speedup(self) -> float:
        return self.torch / self.ours


Operation = Callable[..., Tensor]


def _gradients(operation: Operation, leaves: list[Tensor], gradient: Tensor) -> list[Tensor]:
    output = operation(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(
        ((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
        for a, b in zip(found, exact, strict=True)
    )


def _medians(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """A B, B A, A B, ...: what disturbs one disturbs the other."""
    samples: tuple[list[float], list[float]] = ([], [])
    steps = [(first, samples[0]), (second, samples[1])]
    end = time.perf_counter() + SECONDS_A_ROW
    for number in range(WARM_UP_ROUNDS + MOST_ROUNDS):
        for step, kept in steps:
            start = time.perf_counter()
            step()
            if number >= WARM_UP_ROUNDS:
                kept.append(time.perf_counter() - start)
        steps.reverse()
        if number >= WARM_UP_ROUNDS + FEWEST_ROUNDS and time.perf_counter() > end:
            break
    return statistics.median(samples[0]), statistics.median(samples[1])


def _operation_row(
    name: str, ours: Operation, theirs: Operation, shapes: list[tuple[int, ...]], *, filters: bool = True
) -> Row:
    """`filters`: all but the first tensor are scaled as torch's layers start, so that outputs stay near 1."""
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(shape, generator=generator) / (math.sqrt(math.prod(shape[1:])) if i and filters else 1.0)
        for i, shape in enumerate(shapes)
    ]
    with torch.no_grad():
        gradient = torch.randn(theirs(*leaves).shape, generator=generator)
    exact = _gradients(theirs, [leaf.double().requires_grad_() for leaf in leaves], gradient.double())
    leaves = [leaf.requires_grad_() for leaf in leaves]
    our_time, their_time = _medians(
        lambda: _gradients(ours, leaves, gradient), lambda: _gradients(theirs, leaves, gradient)
    )
    return Row(
        name,
        our_time,
        their_time,
        _error(_gradients(ours, leaves, gradient), exact),
        _error(_gradients(theirs, leaves, gradient), exact),
    )


def _torch_twin(layer: torch.nn.Module) -> torch.nn.Module:
    """torch's layer with the same parameters."""
    twin: torch.nn.Module
    if isinstance(layer, nn.Conv2d):
        twin = torch.nn.Conv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size[0], padding=layer.kernel_size[0] // 2
        )
    elif isinstance(layer, nn.MaxPool2d):
        twin = torch.nn.MaxPool2d(layer.kernel_size)
    elif isinstance(layer, nn.LSTM):
        twin = torch.nn.LSTM(
            layer.input_size, layer.hidden_size, layer.num_layers, batch_first=True, bidirectional=layer.bidirectional
        )
    elif isinstance(layer, nn.MultiheadAttention):
        twin = torch.nn.MultiheadAttention(layer.embed_dim, layer.num_heads, batch_first=True)
    else:
        return layer
    twin.load_state_dict(layer.state_dict())
    return twin


def _on_torch(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in which torch's own layers compute what our kernels do in `model`."""
    copied = _torch_twin(copy.deepcopy(model))
    for name, child in copied.named_children():
        setattr(copied, name, _on_torch(child))
    return copied


def _first(result: Any) -> Tensor:
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


def _model_row(name: str, ours: torch.nn.Module, inputs: tuple[Tensor, ...], classes: int = 0) -> Row:
    """Of the cross entropy of random classes, or (0) of the mean square.

    The time is that of a training step; the error is that of the outputs. Gradients of a ReLU network jump where an
    activation is within rounding of zero, for torch as for us: they are compared operation by operation.
    """
    theirs = _on_torch(ours)
    with torch.no_grad():
        labels = torch.randint(0, max(1, classes), ours(*inputs)[..., 0].shape) if classes else None

    def step(model: torch.nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        output = _first(model(*inputs))
        if labels is None:
            loss = output.square().mean()
        else:
            loss = torch_F.cross_entropy(output.flatten(0, -2), labels.flatten())
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    our_time, their_time = _medians(lambda: step(ours, inputs), lambda: step(theirs, inputs))
    with torch.no_grad():
        found, reference = [_first(ours(*inputs))], [_first(theirs(*inputs))]
        exact = [_first(theirs.double()(*(t.double() if t.is_floating_point() else t for t in inputs)))]
    return Row(name, our_time, their_time, _error(found, exact), _error(reference, exact))


def _model_rows() -> list[Row]:
    torch.manual_seed(0)
    symbols = torch.randint(3, 60, (64, 30))
    return [
        _model_row(
            "digits model, 64 images 8x8", ImageClassifier(1, 8, (32, 64)), (torch.randn(64, 1, 8, 8),), classes=10
        ),
        _model_row(
            "the same for 28x28, 64 images", ImageClassifier(1, 28, (32, 64)), (torch.randn(64, 1, 28, 28),), classes=10
        ),
        _model_row("source model, 32 x 200 characters", SequenceTagger(129, 7), (torch.randint(0, 129, (32, 200)),), 7),
        _model_row(
            "dates model, 64 dates", SequenceTranslator(60, 14), (symbols, torch.randint(3, 14, (64, 11))), classes=14
        ),
        _model_row("LSTM 64 to 128, 32 x 100", nn.LSTM(64, 128, batch_first=True), (torch.randn(32, 100, 64),)),
    ]


def _linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What one writes in torch: elu(x) + 1 as the map, keys and values first."""
    q, k = torch_F.elu(query) + 1, torch_F.elu(key) + 1
    return (q @ (k.transpose(-1, -2) @ value)) / (q @ k.sum(-2).unsqueeze(-1) + LINEAR_EPS)


def _causal_linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What one writes in torch: the lower triangle of the whole product."""
    weights = ((torch_F.elu(query) + 1) @ (torch_F.elu(key) + 1).transpose(-1, -2)).tril()
    return (weights @ value) / (weights.sum(-1, keepdim=True) + LINEAR_EPS)


def measure() -> list[Row]:
    """Every row in float32, with torch's current number of threads."""

    def conv(name: str, x: tuple[int, ...], w: tuple[int, ...], **options: Any) -> Row:
        functions: tuple[Any, Any] = (F.conv1d, torch_F.conv1d) if len(x) == 3 else (F.conv2d, torch_F.conv2d)
        ours, theirs = functions
        return _operation_row(name, lambda a, b: ours(a, b, **options), lambda a, b: theirs(a, b, **options), [x, w])

    def pool(name: str, x: tuple[int, ...], window: int, stride: int, padding: int) -> Row:
        return _operation_row(
            name,
            lambda a: F.max_pool2d(a, window, stride, padding),
            lambda a: torch_F.max_pool2d(a, window, stride, padding),
            [x],
        )

    def attention(name: str, shape: tuple[int, ...], ours: Operation, theirs: Operation) -> Row:
        return _operation_row(name, ours, theirs, [shape] * 3, filters=False)

    ours, theirs = F.scaled_dot_product_attention, torch_F.scaled_dot_product_attention
    return [
        *_model_rows(),
        conv("conv 1 to 32, k5, 28x28", (64, 1, 28, 28), (32, 1, 5, 5), padding=2),
        conv("conv 64 to 64, k3, 56x56", (4, 64, 56, 56), (64, 64, 3, 3), padding=1),
        conv("depthwise conv 96, k7, 56x56", (2, 96, 56, 56), (96, 1, 7, 7), padding=3, groups=96),
        conv("depthwise conv1d 256, k31", (8, 256, 400), (256, 1, 31), padding=15, groups=256),
        pool("max-pool 2x2, 64 of 32x32", (32, 64, 32, 32), 2, 2, 0),
        pool("max-pool 3x3 stride 2, 112x112", (8, 64, 112, 112), 3, 2, 1),
        attention("attention, 4 x 8 heads, 256 x 64", (4, 8, 256, 64), ours, theirs),
        attention(
            "causal attention, 8 heads, 1024 x 64",
            (1, 8, 1024, 64),
            lambda q, k, v: ours(q, k, v, is_causal=True),
            lambda q, k, v: theirs(q, k, v, is_causal=True),
        ),
        attention(
            "linear attention, 8 heads, 1024 x 64",
            (1, 8, 1024, 64),
            lambda q, k, v: F.linear_attention(q, k, v, eps=LINEAR_EPS),
            _linear_attention,
        ),
        attention(
            "causal linear attention, the same",
            (1, 8, 1024, 64),
            lambda q, k, v: F.linear_attention(q, k, v, causal=True, eps=LINEAR_EPS),
            _causal_linear_attention,
        ),
    ]
