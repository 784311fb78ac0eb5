"""Our kernels beside torch's: a training step of each, in turn, in this process, with the largest difference.

`python -m bench` in the source tree is the full measurement; this is what fits into a few seconds.
"""

from __future__ import annotations

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
from pyseqnet.models import ImageClassifier

SECONDS_A_ROW = 0.6
FEWEST_ROUNDS, MOST_ROUNDS = 7, 200
WARM_UP_ROUNDS = 3


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


def _operation_row(name: str, ours: Operation, theirs: Operation, shapes: list[tuple[int, ...]]) -> Row:
    generator = torch.Generator().manual_seed(0)
    leaves = [
        # filters (all but the first tensor) are scaled as torch's layers start, so that outputs stay near 1
        torch.randn(shape, generator=generator) / (math.sqrt(math.prod(shape[1:])) if i else 1.0)
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


def _torch_twin(model: ImageClassifier) -> torch.nn.Sequential:
    """The same classifier of torch's own layers, with the same parameters."""
    layers: list[torch.nn.Module] = []
    for layer in model.features:
        if isinstance(layer, torch.nn.Conv2d):
            twin = torch.nn.Conv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size[0], padding=layer.kernel_size[0] // 2
            )
            twin.load_state_dict(layer.state_dict())
            layers.append(twin)
        elif isinstance(layer, torch.nn.MaxPool2d):
            layers.append(torch.nn.MaxPool2d(layer.kernel_size))
        else:
            layers.append(torch.nn.ReLU())
    head = torch.nn.Linear(model.head.in_features, model.head.out_features)
    head.load_state_dict(model.head.state_dict())
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), head)


def _model_row(name: str, batch: int, image_size: int, channels: tuple[int, ...]) -> Row:
    torch.manual_seed(0)
    ours = ImageClassifier(1, image_size, channels)
    theirs = _torch_twin(ours)
    images = torch.randn(batch, 1, image_size, image_size)
    labels = torch.randint(0, 10, (batch,))
    criterion = torch.nn.CrossEntropyLoss()

    def step(model: torch.nn.Module, input: Tensor) -> list[Tensor]:
        loss = criterion(model(input), labels)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    our_time, their_time = _medians(lambda: step(ours, images), lambda: step(theirs, images))
    found, reference = step(ours, images), step(theirs, images)
    exact = step(theirs.double(), images.double())
    return Row(name, our_time, their_time, _error(found, exact), _error(reference, exact))


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

    return [
        _model_row("this classifier, 64 images 8x8", 64, 8, (32, 64)),
        _model_row("the same for 28x28, 64 images", 64, 28, (32, 64)),
        conv("conv 1 to 32, k5, 28x28", (64, 1, 28, 28), (32, 1, 5, 5), padding=2),
        conv("conv 64 to 64, k3, 56x56", (4, 64, 56, 56), (64, 64, 3, 3), padding=1),
        conv("depthwise conv 96, k7, 56x56", (2, 96, 56, 56), (96, 1, 7, 7), padding=3, groups=96),
        conv("depthwise conv1d 256, k31", (8, 256, 400), (256, 1, 31), padding=15, groups=256),
        pool("max-pool 2x2, 64 of 32x32", (32, 64, 32, 32), 2, 2, 0),
        pool("max-pool 3x3 stride 2, 112x112", (8, 64, 112, 112), 3, 2, 1),
    ]
