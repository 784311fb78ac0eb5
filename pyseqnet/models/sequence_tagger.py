"""The bidirectional LSTM tagger: one tag for each element of a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet import nn


class SequenceTagger(torch.nn.Module):
    """Tells which of `tags` each symbol of a sequence has, from what stands before and behind it.

    An embedding, a bidirectional LSTM of `layers` layers with `hidden_size` cells in each direction, one linear layer.
    Dropout, if asked for, lies between the layers of the LSTM and before the linear layer.

    Shapes: input (B, T) int64, output (B, T, tags), scores before softmax; (T,) gives (T, tags). With ``lengths`` (B,),
    int64 on the CPU, what lies behind a sequence's end is not read.

    >>> model = SequenceTagger(symbols=128, tags=7)
    >>> model(torch.zeros(5, 20, dtype=torch.int64)).shape
    torch.Size([5, 20, 7])

    Papers: Graves, Schmidhuber, Framewise phoneme classification with bidirectional LSTM, 2005; Huang, Xu, Yu,
    Bidirectional LSTM-CRF models for sequence tagging, 2015.
    """

    def __init__(
        self,
        symbols: int,
        tags: int,
        *,
        embedding_size: int = 32,
        hidden_size: int = 96,
        layers: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(symbols, embedding_size)
        between = dropout if layers > 1 else 0.0
        self.lstm = nn.LSTM(embedding_size, hidden_size, layers, batch_first=True, dropout=between, bidirectional=True)
        self.dropout = torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(2 * hidden_size, tags)

    def forward(self, input: Tensor, lengths: Tensor | None = None) -> Tensor:
        embedded = self.embedding(input)
        states, _ = self.lstm(embedded) if lengths is None else self.lstm(embedded, lengths=lengths)
        scores: Tensor = self.head(self.dropout(states))
        return scores
