"""Training and testing of the classifier."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from pyseqnet.demo.digits import Digits, shifted

BATCH = 64
PEAK_LEARNING_RATE = 2e-3
WEIGHT_DECAY = 5e-2


@dataclass
class History:
    """One entry an epoch; the accuracies are shares of 1."""

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


def train(model: torch.nn.Module, data: Digits, epochs: int, seed: int) -> History:
    """Trains in place. The test images are only looked at: the last epoch's weights are the result."""
    generator = torch.Generator().manual_seed(seed)
    count = len(data.train_images)
    steps = -(-count // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=epochs * steps)
    criterion = torch.nn.CrossEntropyLoss()
    history = History()
    start = time.perf_counter()
    often = 0.1 if sys.stderr.isatty() else 5.0  # seconds: a log wants few lines
    with tqdm(range(epochs), desc="training", unit="epoch", mininterval=often) as bar:
        for _ in bar:
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
            history.loss.append(total / count)
            history.train_accuracy.append(right / count)
            correct = predict(model, data.test_images) == data.test_labels
            history.test_accuracy.append(correct.double().mean().item())
            bar.set_postfix_str(
                f"loss {history.loss[-1]:.3f}, test accuracy {history.test_accuracy[-1]:.2%}", refresh=False
            )
    history.seconds = time.perf_counter() - start
    return history
