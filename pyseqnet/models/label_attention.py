"""Several labels of a text at once: each label reads the text with a query of its own.

Shen, Lee: Neural attention models for sequence classification: analysis and application to key term extraction and
dialogue act detection, 2016; Mullenbach, Wiegreffe, Duke, Sun, Eisenstein: Explainable prediction of medical codes from
clinical text, 2018 (a query for each label).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet import functional, nn


class LabelAttention(torch.nn.Module):
    """Scores each of `labels`, of which a text may have any number.

    A bidirectional LSTM reads the embedded words; each label's query attends to its states, and what it finds is
    weighed by a vector of the label. The sigmoid of a score is the label's probability.

    Shapes of ``forward(input, lengths)``: input (B, T) int64, 0 for padding; lengths (B,) int64 on the CPU. Output
    (B, labels); with ``need_weights=True`` also where each label looked, (B, labels, T).

    >>> model = LabelAttention(50, 7)
    >>> scores, weights = model(torch.ones(2, 5, dtype=torch.int64), torch.tensor([5, 3]), need_weights=True)
    >>> scores.shape, weights.shape
    (torch.Size([2, 7]), torch.Size([2, 7, 5]))
    """

    def __init__(
        self, symbols: int, labels: int, *, embedding: int = 64, hidden: int = 64, dropout: float = 0.3
    ) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(symbols, embedding, padding_idx=0)
        self.lstm = nn.LSTM(embedding, hidden, batch_first=True, bidirectional=True)
        self.dropout = torch.nn.Dropout(dropout)
        self.queries = torch.nn.Parameter(torch.randn(labels, 2 * hidden))
        self.weight = torch.nn.Parameter(torch.randn(labels, 2 * hidden) / (2 * hidden) ** 0.5)
        self.bias = torch.nn.Parameter(torch.zeros(labels))

    def forward(self, input: Tensor, lengths: Tensor, *, need_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        states, _ = self.lstm(self.dropout(self.embedding(input)), lengths=lengths)
        memory = self.dropout(states).unsqueeze(1)
        queries = self.queries.expand(len(input), 1, -1, -1)
        found = functional.scaled_dot_product_attention(
            queries, memory, memory, key_lengths=lengths, return_weights=need_weights
        )
        mixed, weights = found if need_weights else (found, None)
        scores: Tensor = (mixed.squeeze(1) * self.weight).sum(2) + self.bias
        return scores if weights is None else (scores, weights.squeeze(1))
