"""Classifiers of whole texts: words to vectors, one of three readers, one linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet import functional, nn

READERS = ("lstm", "cnn", "attention")


class TextClassifier(torch.nn.Module):
    """Tells which of `classes` a text belongs to.

    The reader turns the embedded words into one vector. ``"lstm"``: a bidirectional LSTM, the mean of its outputs
    over time. ``"cnn"``: convolutions over 3, 4 and 5 words with ReLU (Kim: Convolutional neural networks for sentence
    classification, 2014), the mean of each filter over time: in a text of hundreds of words the largest value is mostly
    chance. ``"attention"``: the mean of the words, weighted by softmax attention of one learned query (Lin et al.: A
    structured self-attentive sentence embedding, 2017).

    Shapes: input (B, T) int64 with 0 for padding, lengths (B,) int64 on the CPU; output (B, classes), before softmax.

    >>> model = TextClassifier(1000, 2, reader="cnn")
    >>> model(torch.ones(3, 20, dtype=torch.int64), torch.tensor([20, 7, 5])).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        symbols: int,
        classes: int,
        *,
        reader: str = "lstm",
        embedding: int = 64,
        hidden: int = 64,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if reader not in READERS:
            raise ValueError(f"reader must be one of {', '.join(READERS)}; got {reader!r}")
        self.reader = reader
        self.embedding = torch.nn.Embedding(symbols, embedding, padding_idx=0)
        # small: what a word means is to be learned, not how it was drawn
        torch.nn.init.normal_(self.embedding.weight, std=0.1)
        torch.nn.init.zeros_(self.embedding.weight[0])
        self.dropout = torch.nn.Dropout(dropout)
        if reader == "lstm":
            self.lstm = nn.LSTM(embedding, hidden, batch_first=True, bidirectional=True)
            width = 2 * hidden
        elif reader == "cnn":
            self.convolutions = torch.nn.ModuleList(
                nn.Conv1dReLU(embedding, hidden, k, padding=k // 2) for k in (3, 4, 5)
            )
            width = 3 * hidden
        else:
            self.query = torch.nn.Parameter(torch.zeros(embedding))  # all words alike at the start
            width = embedding
        self.head = torch.nn.Linear(width, classes)

    def _read(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        if self.reader == "attention":
            query = self.query.expand(len(embedded), 1, 1, -1)
            memory = embedded.unsqueeze(1)
            mixed = functional.scaled_dot_product_attention(query, memory, memory, key_lengths=lengths)
            return mixed.flatten(1)
        if self.reader == "lstm":
            states, _ = self.lstm(embedded, lengths=lengths)
        else:
            planes = embedded.transpose(1, 2)  # (B, embedding, T)
            states = torch.cat([layer(planes)[:, :, : embedded.shape[1]] for layer in self.convolutions], 1).transpose(
                1, 2
            )
        padding = torch.arange(states.shape[1]) >= lengths.unsqueeze(1)
        return states.masked_fill(padding.unsqueeze(2), 0.0).sum(1) / lengths.unsqueeze(1)

    def forward(self, input: Tensor, lengths: Tensor) -> Tensor:
        vector = self._read(self.embedding(input), lengths)
        scores: Tensor = self.head(self.dropout(vector))
        return scores
