"""What the image recipes share: training with augmentation, accuracy, a picture of the mistakes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyseqnet.data.images import Images, shifted, turned_and_scaled
from pyseqnet.models import ImageClassifier, VisionTransformer
from pyseqnet.recipes import Score, Settings
from pyseqnet.training import History, batches, fit

BATCH = 64
LEARNING_RATE = 2e-3
GLANCE = 2000  # test images that are looked at during the training
MISTAKES = 32  # drawn


@dataclass(frozen=True)
class Trained:
    model: torch.nn.Module
    history: History


def predict(model: torch.nn.Module, images: Tensor, at_once: int = 500) -> Tensor:
    """The class of each image, (N,)."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in images.split(at_once)])


def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images whose class is found."""
    return (predict(model, images) == labels).double().mean().item()


def train(
    model: torch.nn.Module,
    data: Images,
    settings: Settings,
    *,
    epochs: int,
    name: str,
    shift: int = 0,
    degrees: float = 0.0,
    scales: tuple[float, float] = (1.0, 1.0),
) -> Trained:
    """Cross-entropy over shuffled batches; each image moved, turned and scaled by chance within the bounds given."""
    generator = torch.Generator().manual_seed(settings.seed)
    draw = batches(len(data.train_labels), BATCH, settings.seed)
    criterion = torch.nn.CrossEntropyLoss()

    def loss() -> Tensor:
        chosen = draw()
        images = data.train_images[chosen]
        if shift:
            images = shifted(images, generator, shift)
        if degrees or scales != (1.0, 1.0):
            chance = torch.rand(2, len(chosen), generator=generator)
            turn, scale = (2 * chance[0] - 1) * degrees, scales[0] + chance[1] * (scales[1] - scales[0])
            images = turned_and_scaled(images, turn, scale)
        value: Tensor = criterion(model(images), data.train_labels[chosen])
        return value

    def evaluate() -> dict[str, float]:
        return {"accuracy": accuracy(model, data.test_images[:GLANCE], data.test_labels[:GLANCE])}

    steps = epochs * -(-len(data.train_labels) // BATCH)
    history = fit(
        model,
        loss,
        steps,
        learning_rate=LEARNING_RATE,
        weight_decay=5e-2,
        evaluate=evaluate,
        name=name,
        progress=settings.progress,
    )
    return Trained(model, history)


def compare(
    data: Images,
    settings: Settings,
    *,
    epochs: int,
    dropout: float,
    transformer: dict[str, Any],
    goals: tuple[float, float],
) -> list[Score]:
    """A CNN and a vision Transformer on few images, each moved by up to a pixel; goals in % of the test images."""
    scores = []
    for name, goal in zip(("CNN", "vision Transformer"), goals, strict=True):
        model: torch.nn.Module
        if name == "CNN":
            model = ImageClassifier(1, data.size, (32, 64), len(data.classes), dropout=dropout)
        else:
            model = VisionTransformer(len(data.classes), image_size=data.size, channels=1, **transformer)
        trained = train(model, data, settings, epochs=epochs, name=name, shift=1)
        right = 100 * accuracy(model, data.test_images, data.test_labels)
        scores += [Score(f"accuracy of the {name}, %", right, goal), Score.fall(name, trained.history)]
        if name == "CNN":
            draw_errors(model, data, settings.out / "errors.png")
    return scores


def draw_errors(model: torch.nn.Module, data: Images, path: Path) -> None:
    """The first mistakes on the test images, each with its class and what it was taken for."""
    from pyseqnet.recipes import draw

    predicted = predict(model, data.test_images)
    wrong = (predicted != data.test_labels).nonzero().flatten()[:MISTAKES]
    titles = [f"{data.classes[data.test_labels[i]]} → {data.classes[predicted[i]]}" for i in wrong.tolist()]
    draw.images(data.test_images[wrong, 0], titles, path)
