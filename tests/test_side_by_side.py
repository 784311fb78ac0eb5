"""Whole networks trained beside torch: same initialisation, same data, the same losses step by step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import pyseqnet

STEPS = 30


class Residual(torch.nn.Module):
    """He et al., Deep residual learning for image recognition, 2016: the basic block."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(channels, filters, 3, stride, 1, bias=False),
            torch.nn.BatchNorm2d(filters),
            torch.nn.ReLU(inplace=True),
            torch.nn.Conv2d(filters, filters, 3, 1, 1, bias=False),
            torch.nn.BatchNorm2d(filters),
        )
        self.skip = torch.nn.Sequential()
        if stride != 1 or channels != filters:
            self.skip.append(torch.nn.Conv2d(channels, filters, 1, stride, bias=False))
            self.skip.append(torch.nn.BatchNorm2d(filters))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 7, 2, 3),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(3, 2, 1),
        Residual(16, 16, 1),
        Residual(16, 32, 2),
        Residual(32, 32, 1),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(32, 5),
    )


class Conformer(torch.nn.Module):
    """Gulati et al., Conformer: convolution-augmented Transformer for speech recognition, 2020: one block."""

    def __init__(self, width: int = 32, heads: int = 4, kernel: int = 15) -> None:
        super().__init__()

        def feed_forward() -> torch.nn.Module:
            return torch.nn.Sequential(
                torch.nn.LayerNorm(width), torch.nn.Linear(width, 64), torch.nn.SiLU(), torch.nn.Linear(64, width)
            )

        self.first, self.last = feed_forward(), feed_forward()
        self.before_attention = torch.nn.LayerNorm(width)
        self.attention = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        self.before_convolution = torch.nn.LayerNorm(width)
        self.convolution = torch.nn.Sequential(
            torch.nn.Conv1d(width, 2 * width, 1),
            torch.nn.GLU(1),
            torch.nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width),
            torch.nn.BatchNorm1d(width),
            torch.nn.SiLU(),
            torch.nn.Conv1d(width, width, 1),
        )
        self.norm = torch.nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x) / 2
        y = self.before_attention(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.convolution(self.before_convolution(x).transpose(1, 2)).transpose(1, 2)
        return self.norm(x + self.last(x) / 2)


def conformer() -> torch.nn.Module:
    return torch.nn.Sequential(Conformer(), torch.nn.Linear(32, 5))


def image_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.randint(5, (16,), generator=generator)
    images = 0.5 * torch.randn(16, 3, 32, 32, generator=generator)
    for image, label in zip(images, labels, strict=True):  # a stripe whose place is the class
        image[:, :, 6 * int(label) : 6 * int(label) + 4] += 1
    return images, labels


def frame_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.randint(5, (8, 12), generator=generator).repeat_interleave(4, 1)
    frames = torch.randn(8, 48, 32, generator=generator)
    return frames + 2 * torch.nn.functional.one_hot(labels, 32), labels


@pytest.mark.parametrize(("build", "batch"), [(resnet, image_batch), (conformer, frame_batch)])
def test_losses_are_torchs(build, batch) -> None:
    torch.manual_seed(1)
    theirs = build()
    ours = copy.deepcopy(theirs)
    report = pyseqnet.convert(ours)
    assert len(report.replaced) >= 8
    curves = []
    for model in (ours, theirs):
        generator = torch.Generator().manual_seed(2)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        losses = []
        for _ in range(STEPS):
            inputs, labels = batch(generator)
            loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, -2), labels.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    torch.testing.assert_close(curves[0][:10], curves[1][:10], rtol=1e-3, atol=1e-4)
    # rounding differences grow along the way, and stay small beside what was learned
    assert curves[1][-5:].mean() < 0.7 * curves[1][0]
    torch.testing.assert_close(curves[0], curves[1], rtol=0.05, atol=0.02)
