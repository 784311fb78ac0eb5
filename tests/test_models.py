"""The models: shapes, what they are built of, and that they learn what torch's twin learns."""

from __future__ import annotations

import doctest

import pytest
import torch

from pyseqnet import nn
from pyseqnet.models import ImageClassifier, image_classifier


def torch_twin(model: ImageClassifier) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for layer in model.features:
        if isinstance(layer, nn.Conv2d):
            twin = torch.nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding)
            twin.load_state_dict(layer.state_dict())
            layers.append(twin)
        elif isinstance(layer, nn.MaxPool2d):
            layers.append(torch.nn.MaxPool2d(layer.kernel_size))
        else:
            layers.append(torch.nn.ReLU())
    head = torch.nn.Linear(model.head.in_features, model.head.out_features)
    head.load_state_dict(model.head.state_dict())
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), head)


def test_examples() -> None:
    results = doctest.testmod(image_classifier)
    assert results.attempted
    assert not results.failed


def test_parameters_are_those_of_the_lecture() -> None:
    # 3x3x3 weights for each of 64 filters and their biases
    model = ImageClassifier(3, 100, (64,), 10)
    assert sum(p.numel() for p in model.features.parameters()) == 1792


def test_trains_as_torch_does() -> None:
    torch.manual_seed(0)
    ours = ImageClassifier(2, (12, 9), (5, 7), 3)
    theirs = torch_twin(ours)
    images, labels = torch.randn(16, 2, 12, 9), torch.randint(0, 3, (16,))
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        for _ in range(20):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    assert losses[1] < 1.0
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": ()}, "channels is empty"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"image_size": 7, "channels": (4, 4, 4)}, "3 poolings by 2 leave nothing"),
    ],
)
def test_impossible_shapes_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageClassifier(**arguments)
