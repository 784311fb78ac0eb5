"""A speech recogniser: frames to scores of labels, a quarter as many steps as frames.

Graves, Fernández, Gomez, Schmidhuber: Connectionist temporal classification, 2006; Yeh et al.: Transformer-Transducer,
2019 (truncated self-attention).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pyseqnet import nn

ENCODERS = ("lstm", "attention")


class SpeechEncoder(torch.nn.Module):
    """Turns frames of speech into states, a quarter as many.

    Two convolutions over time with stride 2 and ReLU, then an encoder: ``"lstm"``, bidirectional, two layers;
    ``"attention"``, Transformer layers whose frames see ``left`` frames before and ``right`` after themselves only, so
    that the cost is linear in time and the delay is known.

    Shapes of ``forward(frames, lengths)``: frames (B, T, bands); lengths (B,) int64 on the CPU. Output
    ``(states (B, T', 2 * width), lengths (B,))``, T' = ceil(ceil(T / 2) / 2).

    >>> states, lengths = SpeechEncoder(40)(torch.zeros(2, 50, 40), torch.tensor([50, 31]))
    >>> states.shape, lengths
    (torch.Size([2, 13, 128]), tensor([13,  8]))
    """

    def __init__(
        self,
        bands: int,
        *,
        encoder: str = "lstm",
        width: int = 64,
        layers: int = 2,
        left: int = 15,
        right: int = 5,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if encoder not in ENCODERS:
            raise ValueError(f"encoder must be one of {', '.join(ENCODERS)}; got {encoder!r}")
        self.encoder = encoder
        self.first = nn.Conv1dReLU(bands, width, 3, stride=2, padding=1)
        self.second = nn.Conv1dReLU(width, 2 * width, 3, stride=2, padding=1)
        if encoder == "lstm":
            self.lstm = nn.LSTM(2 * width, width, layers, batch_first=True, dropout=dropout, bidirectional=True)
        else:
            layer = nn.TransformerEncoderLayer(
                2 * width,
                4,
                4 * width,
                dropout,
                batch_first=True,
                norm_first=True,
                attention=functools.partial(nn.TruncatedSelfAttention, left=left, right=right),
            )
            self.transformer = nn.TransformerEncoder(layer, layers, nn.LayerNorm(2 * width), enable_nested_tensor=False)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        planes = frames.transpose(1, 2)
        for layer in (self.first, self.second):
            inside = torch.arange(planes.shape[2]) < lengths.unsqueeze(1)
            # what stands behind an end is not read as if it were sound
            planes = layer(planes * inside.unsqueeze(1).to(planes))
            lengths = (lengths + 1) // 2
        states = planes.transpose(1, 2).contiguous()
        if self.encoder == "lstm":
            states, _ = self.lstm(states, lengths=lengths)
        else:
            padding = torch.arange(states.shape[1]) >= lengths.unsqueeze(1)
            states = self.transformer(states, src_key_padding_mask=padding)
        return states, lengths


class SpeechRecognizer(SpeechEncoder):
    """Scores the labels of speech for `nn.CTCLoss`: a `SpeechEncoder`, whose options these are, and a linear layer.

    Shapes of ``forward(frames, lengths)``: as there, but the output is ``(scores (T', B, labels), lengths (B,))``,
    before log-softmax.

    >>> scores, lengths = SpeechRecognizer(40, 11)(torch.zeros(2, 50, 40), torch.tensor([50, 31]))
    >>> scores.shape, lengths
    (torch.Size([13, 2, 11]), tensor([13,  8]))
    """

    def __init__(self, bands: int, labels: int, *, width: int = 64, dropout: float = 0.1, **options: Any) -> None:
        super().__init__(bands, width=width, dropout=dropout, **options)
        self.dropout = torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(2 * width, labels)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        states, lengths = super().forward(frames, lengths)
        scores: Tensor = self.head(self.dropout(states)).transpose(0, 1)
        return scores, lengths
