"""From text to frames of speech, several frames a step, with attention that sees where it has been.

Wang et al.: Tacotron: towards end-to-end speech synthesis, 2017; Shen et al.: Natural TTS synthesis by conditioning
WaveNet on mel spectrogram predictions, 2018.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyseqnet import nn


class Spoken(NamedTuple):
    """Frames (B, steps * frames_a_step, bands), whether each step is the last (B, steps), before the sigmoid, and where
    each step looked (B, steps, S)."""

    frames: Tensor
    stop: Tensor
    weights: Tensor


class SpeechSynthesizer(torch.nn.Module):
    """Reads symbols and speaks: frames of mel bands, `frames_a_step` at once.

    A bidirectional LSTM reads the text. At each step an LSTM sees the last frame before it, through a narrow layer with
    dropout, so that it cannot do without the text; its state asks the text by location-aware attention; a linear layer
    makes frames of both.

    Shapes of ``forward(text, lengths, frames)``: text (B, S) int64, lengths (B,) int64 on the CPU, the true frames
    (B, T, bands) with T a multiple of `frames_a_step`, of which each step sees those before it. `speak` needs none.

    >>> model = SpeechSynthesizer(30, 40).eval()
    >>> text, lengths = torch.ones(2, 9, dtype=torch.int64), torch.tensor([9, 4])
    >>> model(text, lengths, torch.zeros(2, 12, 40)).frames.shape, model.speak(text, lengths, 5).weights.shape
    (torch.Size([2, 12, 40]), torch.Size([2, 5, 9]))
    """

    def __init__(
        self, symbols: int, bands: int, *, frames_a_step: int = 4, width: int = 64, hidden: int = 128,
        dropout: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.bands, self.frames_a_step = bands, frames_a_step
        self.embedding = torch.nn.Embedding(symbols, width, padding_idx=0)
        self.encoder = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.before = torch.nn.Sequential(torch.nn.Linear(bands, width), torch.nn.ReLU(), torch.nn.Dropout(dropout))
        self.decoder = nn.LSTM(width, hidden, batch_first=True)
        self.attention = nn.LocationAwareAttention(hidden, 2 * width, hidden, kernel_size=7, cumulative=True)
        self.join = torch.nn.Linear(hidden + 2 * width, hidden)
        self.head = torch.nn.Linear(hidden, frames_a_step * bands + 1)

    def _read(self, text: Tensor, lengths: Tensor) -> Tensor:
        memory: Tensor = self.encoder(self.embedding(text), lengths=lengths)[0]
        return memory

    def _write(self, states: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        output = self.head(torch.tanh(self.join(torch.cat([states, found], 2))))
        frames = output[..., :-1].unflatten(2, (self.frames_a_step, self.bands)).flatten(1, 2)
        return frames, output[..., -1]

    def forward(self, text: Tensor, lengths: Tensor, frames: Tensor) -> Spoken:
        if frames.shape[1] % self.frames_a_step:
            raise ValueError(f"there must be a multiple of {self.frames_a_step} frames; got {frames.shape[1]}")
        memory = self._read(text, lengths)
        last = frames[:, self.frames_a_step - 1 : -1 : self.frames_a_step]
        states, _ = self.decoder(self.before(torch.nn.functional.pad(last, (0, 0, 1, 0))))
        found, weights, _ = self.attention(states, memory, key_lengths=lengths)
        return Spoken(*self._write(states, found), weights)

    @torch.no_grad()
    def speak(self, text: Tensor, lengths: Tensor, steps: int) -> Spoken:
        """So many steps from the text alone; each sees the frame that was spoken before it."""
        memory = self._read(text, lengths)
        keys = self.attention.project_key(memory, lengths)
        last, state, location = memory.new_zeros(len(text), 1, self.bands), None, None
        parts: list[Spoken] = []
        for _ in range(steps):
            states, state = self.decoder(self.before(last), state)
            found, weights, location = self.attention(
                states, memory, key_lengths=lengths, projected_key=keys, state=location
            )
            frames, stop = self._write(states, found)
            parts.append(Spoken(frames, stop, weights))
            last = frames[:, -1:]
        return Spoken(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))
