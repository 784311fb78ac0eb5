"""A question reads a memory: what answers questions about images, speech and texts alike.

Weston, Chopra, Bordes: Memory networks, 2015; Yang, He, Gao, Deng, Smola: Stacked attention networks, 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet import nn


class QuestionReader(torch.nn.Module):
    """Scores answers to a question about a memory of vectors.

    A bidirectional LSTM turns the question into one vector, which reads the memory by multi-head attention `hops`
    times, adding what it read.

    Shapes of ``forward(memory, question, lengths, ignored=None)``: memory (N, M, width); question (N, T) int64, 0 for
    padding, and its lengths (N,) int64 on the CPU; ignored (N, M) bool, True for what of the memory is padding. Output
    (N, answers), before softmax; with ``need_weights=True`` also the last reading's weights (N, M).

    >>> reader = QuestionReader(30, 13, width=16)
    >>> reader(torch.zeros(2, 9, 16), torch.ones(2, 5, dtype=torch.int64), torch.tensor([5, 3])).shape
    torch.Size([2, 13])
    """

    def __init__(self, symbols: int, answers: int, *, width: int = 64, heads: int = 4, hops: int = 2) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)  # a reader looks for a direction, and what is read may differ in length
        self.embedding = torch.nn.Embedding(symbols, width, padding_idx=0)
        self.lstm = nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)
        self.readers = torch.nn.ModuleList(nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(hops))
        self.norms = torch.nn.ModuleList(nn.LayerNorm(width) for _ in range(hops))
        self.head = torch.nn.Sequential(
            torch.nn.Linear(2 * width, width), torch.nn.ReLU(), torch.nn.Linear(width, answers)
        )

    def forward(
        self, memory: Tensor, question: Tensor, lengths: Tensor, ignored: Tensor | None = None,
        *, need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        memory = self.norm(memory)
        _, (last, _) = self.lstm(self.embedding(question), lengths=lengths)
        asked = torch.cat([last[0], last[1]], 1).unsqueeze(1)
        state = asked
        weights = None
        for read, norm in zip(self.readers, self.norms, strict=True):
            found, weights = read(norm(state), memory, memory, key_padding_mask=ignored, need_weights=need_weights)
            state = state + found
        scores: Tensor = self.head(torch.cat([state, asked], 2).squeeze(1))
        return scores if weights is None else (scores, weights.squeeze(1))
