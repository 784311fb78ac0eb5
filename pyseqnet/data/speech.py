"""Spoken digits: 3000 recordings at 8 kHz of six speakers (Free Spoken Digit Dataset), framed and in mel bands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyseqnet.data import find
from pyseqnet.data.text import padded

ORIGIN = "https://github.com/Jakobovski/free-spoken-digit-dataset, all recordings in one .npz"
RATE = 8000
WINDOW, HOP = 200, 80  # samples: frames of 25 ms every 10 ms, 98 of them in the first second
BANDS = 40
TEST_TAKES = 5  # the official test set: takes 0 to 4 of each digit and speaker


@dataclass(frozen=True)
class Recording:
    samples: Tensor  # (S,) float32, -1 to 1
    digit: int
    speaker: int
    take: int

    @property
    def held_out(self) -> bool:
        return self.take < TEST_TAKES


def recordings() -> list[Recording]:
    with np.load(find("fsdd/fsdd_8khz_int16.npz", origin=ORIGIN), allow_pickle=False) as file:
        audio = torch.from_numpy(file["audio"].astype(np.float32) / 32768)
        bounds = file["offset"].tolist()
        facts = zip(file["digit"].tolist(), file["speaker"].tolist(), file["index"].tolist(), strict=True)
        return [Recording(audio[bounds[i] : bounds[i + 1]], *fact) for i, fact in enumerate(facts)]


def mel_filters(bands: int = BANDS, bins: int = WINDOW // 2 + 1, rate: int = RATE) -> Tensor:
    """Triangles (bands, bins), evenly spaced on the mel scale 2595 log10(1 + f/700) from 0 to half the rate."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, bands + 2) / 2595) - 1)
    frequencies = torch.linspace(0, rate / 2, bins)
    rising = (frequencies - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - frequencies) / (corners[2:] - corners[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp_min(0)


def log_mel(samples: Tensor) -> Tensor:
    """The logarithm of the energy in mel bands, (frames, BANDS), for samples (S,): 1 + (S - WINDOW) // HOP frames.

    Each band has mean 0 and deviation 1 over the recording, so that loudness and channel do not count. A recording that
    is shorter than a window is filled up with silence.
    """
    samples = torch.nn.functional.pad(samples, (0, max(0, WINDOW - len(samples))))
    frames = samples.unfold(0, WINDOW, HOP) * torch.hann_window(WINDOW)
    energy = torch.fft.rfft(frames).abs().square() @ mel_filters().t()
    bands = (energy + 1e-6).log()
    return (bands - bands.mean(0)) / (bands.std(0, correction=0) + 1e-5)


class Strings(NamedTuple):
    """Strings of spoken digits, side by side."""

    frames: Tensor  # (B, T, BANDS)
    lengths: Tensor  # (B,) of the frames
    digits: list[list[int]]
    spans: list[list[tuple[int, int]]]  # the first sample of each digit, and the one behind its last


def joined(
    pieces: list[Tensor], generator: torch.Generator, longest_gap: float = 0.2
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Recordings one after the other, up to ``longest_gap`` seconds of near-silence before each; (S,) and spans."""
    parts, spans, end = [], [], 0
    for piece in pieces:
        gap = int(torch.randint(1, int(longest_gap * RATE), (1,), generator=generator))
        parts += [1e-3 * torch.randn(gap, generator=generator), piece]
        spans.append((end + gap, end + gap + len(piece)))
        end = spans[-1][1]
    return torch.cat(parts), spans


def strings(pool: list[Recording], count: int, generator: torch.Generator, longest: int, shortest: int = 1) -> Strings:
    """Strings of ``shortest`` to ``longest`` recordings of one speaker, with gaps."""
    speakers: dict[int, list[Recording]] = {}
    for recording in pool:
        speakers.setdefault(recording.speaker, []).append(recording)
    frames, digits, spans = [], [], []
    for _ in range(count):
        own = list(speakers.values())[int(torch.randint(len(speakers), (1,), generator=generator))]
        size = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        chosen = [own[i] for i in torch.randint(len(own), (size,), generator=generator).tolist()]
        samples, places = joined([one.samples for one in chosen], generator)
        frames.append(log_mel(samples))
        digits.append([one.digit for one in chosen])
        spans.append(places)
    return Strings(*padded(frames), digits, spans)
