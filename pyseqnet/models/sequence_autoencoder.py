"""A vector for a sequence of any length: what an encoder leaves is all that the decoder gets.

Chung, Wu, Shen, Lee, Lee: Audio Word2Vec: unsupervised learning of audio segment representations, 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet import nn


class SequenceAutoencoder(torch.nn.Module):
    """Encodes sequences of frames as vectors and decodes them again; both are trained together on the frames' error.

    The encoder is an LSTM whose last hidden state, made `size` numbers, is the vector. The decoder is an LSTM that
    reads the vector at every step and nothing else, so that nothing of a sequence reaches it by another way.

    Shapes of ``forward(frames, lengths)``: frames (B, T, features), lengths (B,) int64 on the CPU; output (B, T,
    features). `encode` gives (B, size).

    >>> model = SequenceAutoencoder(features=40, size=16)
    >>> frames, lengths = torch.zeros(3, 20, 40), torch.tensor([20, 11, 5])
    >>> model.encode(frames, lengths).shape, model(frames, lengths).shape
    (torch.Size([3, 16]), torch.Size([3, 20, 40]))
    """

    def __init__(self, features: int, size: int, *, hidden: int = 128) -> None:
        super().__init__()
        self.encoder = nn.LSTM(features, hidden, batch_first=True)
        self.vector = torch.nn.Linear(hidden, size)
        self.decoder = nn.LSTM(size, hidden, batch_first=True)
        self.head = torch.nn.Linear(hidden, features)

    def encode(self, frames: Tensor, lengths: Tensor) -> Tensor:
        _, (last, _) = self.encoder(frames, lengths=lengths)
        vector: Tensor = self.vector(last[0])
        return vector

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        vector = self.encode(frames, lengths)
        states, _ = self.decoder(vector.unsqueeze(1).expand(-1, frames.shape[1], -1), lengths=lengths)
        output: Tensor = self.head(states)
        return output
