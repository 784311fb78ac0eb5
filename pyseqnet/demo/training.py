"""Training: of the classifier in epochs, of the sequence models in steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from pyseqnet.data.images import Images, shifted

BATCH = 64
PEAK_LEARNING_RATE = 2e-3
WEIGHT_DECAY = 5e-2
MEASUREMENTS = 15  # of a sequence model during its training
LARGEST_NORM = 1.0  # of the gradient: steps that would be longer are shortened


@dataclass
class History:
    """One entry an epoch, or every so many steps; the accuracies are shares of 1."""

    at: list[int] = field(default_factory=list)  # epochs or steps done
    loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    seconds: float = 0.0


def predict(model: torch.nn.Module, images: Tensor) -> Tensor:
    """Scores (N, C, H, W) images; returns the class of each, (N,)."""
    model.eval()
    with torch.no_grad():
        scores: Tensor = model(images)
    return scores.argmax(1)


def _seconds_between_lines() -> float:
    return 0.1 if sys.stderr.isatty() else 5.0  # a log wants few lines


def train(model: torch.nn.Module, data: Images, epochs: int, seed: int) -> History:
    """Trains in place. The test images are only looked at: the last epoch's weights are the result."""
    generator = torch.Generator().manual_seed(seed)
    count = len(data.train_images)
    steps = -(-count // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=epochs * steps)
    criterion = torch.nn.CrossEntropyLoss()
    history = History()
    start = time.perf_counter()
    with tqdm(range(epochs), desc="training on digits", unit="epoch", mininterval=_seconds_between_lines()) as bar:
        for epoch in bar:
            model.train()
            total, right = 0.0, 0
            for chosen in torch.randperm(count, generator=generator).split(BATCH):
                images = shifted(data.train_images[chosen], generator)
                labels = data.train_labels[chosen]
                optimizer.zero_grad()
                scores = model(images)
                loss = criterion(scores, labels)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(chosen)
                right += int((scores.argmax(1) == labels).sum())
            history.at.append(epoch + 1)
            history.loss.append(total / count)
            history.train_accuracy.append(right / count)
            correct = predict(model, data.test_images) == data.test_labels
            history.test_accuracy.append(correct.double().mean().item())
            bar.set_postfix_str(
                f"loss {history.loss[-1]:.3f}, test accuracy {history.test_accuracy[-1]:.2%}", refresh=False
            )
    history.seconds = time.perf_counter() - start
    return history


def train_in_steps(
    model: torch.nn.Module,
    name: str,
    steps: int,
    learning_rate: float,
    batch: Callable[[], tuple[Tensor, Tensor]],
    test: Callable[[], float],
) -> History:
    """Trains in place: `steps` batches of one cycle of the learning rate.

    Args:
        batch: scores (N, C) of the next batch, in training mode, and the right classes (N,).
        test: the accuracy on held-out data. It is only looked at: the last step's weights are the result.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    criterion = torch.nn.CrossEntropyLoss()
    history = History()
    every = max(1, steps // MEASUREMENTS)
    start = time.perf_counter()
    total, right, seen = 0.0, 0, 0
    with tqdm(
        range(1, steps + 1), desc=f"training on {name}", unit="step", mininterval=_seconds_between_lines()
    ) as bar:
        for step in bar:
            model.train()
            optimizer.zero_grad()
            scores, classes = batch()
            loss = criterion(scores, classes)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(classes)
            right += int((scores.argmax(1) == classes).sum())
            seen += len(classes)
            if step % every == 0 or step == steps:
                model.eval()
                history.at.append(step)
                history.loss.append(total / seen)
                history.train_accuracy.append(right / seen)
                with torch.no_grad():
                    history.test_accuracy.append(test())
                total, right, seen = 0.0, 0, 0
                bar.set_postfix_str(
                    f"loss {history.loss[-1]:.3f}, test accuracy {history.test_accuracy[-1]:.2%}", refresh=False
                )
    history.seconds = time.perf_counter() - start
    return history
