"""Vectors for spoken words without labels: an auto-encoder of speech, judged by finding the same word again.

Chung, Wu, Shen, Lee, Lee: Audio Word2Vec, 2016; data: Free Spoken Digit Dataset.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet.data import speech
from pyseqnet.data.text import padded
from pyseqnet.models.sequence_autoencoder import SequenceAutoencoder
from pyseqnet.recipes import Score, Settings
from pyseqnet.training import batches, fit

SIZE = 32
BATCH = 32
STEPS, QUICK_STEPS = 3000, 30
TRIED = 300  # held-out recordings: each is a query among the others


def mean_average_precision(vectors: Tensor, labels: Tensor) -> float:
    """Each vector (N, size) ranks all others by cosine; the mean over queries of the precision at every right one."""
    near = torch.nn.functional.normalize(vectors, dim=1)
    likeness = near @ near.t()
    likeness.fill_diagonal_(-2)
    order = likeness.argsort(1, descending=True)[:, :-1]
    right = (labels[order] == labels.unsqueeze(1)).double()
    precision = right.cumsum(1) / torch.arange(1, right.shape[1] + 1)
    return ((precision * right).sum(1) / right.sum(1).clamp_min(1)).mean().item()


def run(settings: Settings) -> list[Score]:
    from sklearn.decomposition import PCA

    from pyseqnet.recipes import draw

    everything = speech.recordings()
    train = [speech.log_mel(one.samples) for one in everything if not one.held_out]
    held_out = [one for one in everything if one.held_out][:TRIED]
    test = [speech.log_mel(one.samples) for one in held_out]
    digits = torch.tensor([one.digit for one in held_out])
    model = SequenceAutoencoder(speech.BANDS, SIZE)
    draw_batch = batches(len(train), BATCH, settings.seed)

    def error(frames: list[Tensor]) -> Tensor:
        batch, lengths = padded(frames)
        inside = torch.arange(batch.shape[1]) < lengths.unsqueeze(1)
        apart: Tensor = (model(batch, lengths) - batch).square().mean(2)
        return apart[inside].mean()

    def found() -> float:
        return mean_average_precision(model.encode(*padded(test)), digits)

    with torch.no_grad():
        untrained = found()
    history = fit(
        model,
        lambda: error([train[i] for i in draw_batch().tolist()]),
        settings.steps(STEPS, QUICK_STEPS),
        learning_rate=3e-3,
        evaluate=lambda: {"MAP": found()},
        name="speech auto-encoder",
        progress=settings.progress,
    )
    with torch.no_grad():
        vectors = model.encode(*padded(test))
        left = error(test).item()
    plane = torch.from_numpy(PCA(2, random_state=settings.seed).fit_transform(vectors.numpy()))
    draw.points(plane, digits.tolist(), [str(digit) for digit in range(10)], settings.out / "words.png")
    return [
        Score("mean average precision, same digit, %", 100 * found(), 30.0),  # chance: 10
        Score("mean average precision before the training, %", 100 * untrained),
        Score("error of the held-out frames (mean of all: 1)", left, 0.6, at_least=False),
        Score.fall("speech auto-encoder", history),
    ]
