"""Visual question answering: the regions of an image are the memory that a question reads.

Xu, Saenko: Ask, attend and answer, 2015; Yang, He, Gao, Deng, Smola: Stacked attention networks, 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet import nn


class VisualQuestionAnswerer(torch.nn.Module):
    """Answers questions about images.

    Convolutions with pooling turn the image into a grid of regions, each with a learned place and normalised; a
    bidirectional LSTM turns the question into one vector, which reads the regions by multi-head attention `hops` times,
    adding what it read.

    Shapes of ``forward(image, question, lengths)``: image (N, 3, S, S) with S a multiple of 8; question (N, T) int64
    and its lengths (N,) int64 on the CPU. Output (N, answers), before softmax; with ``need_weights=True`` also the
    last reading's weights over the regions, (N, S/8, S/8).

    >>> model = VisualQuestionAnswerer(30, 13, image_size=16)
    >>> model(torch.zeros(2, 3, 16, 16), torch.ones(2, 5, dtype=torch.int64), torch.tensor([5, 3])).shape
    torch.Size([2, 13])
    """

    def __init__(
        self, symbols: int, answers: int, *, image_size: int = 64, width: int = 64, heads: int = 4, hops: int = 2
    ) -> None:
        super().__init__()
        if image_size % 8 or image_size <= 0:
            raise ValueError(f"image_size must be a multiple of 8, got {image_size}")
        self.side = image_size // 8
        blocks: list[torch.nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, width)):
            blocks += [nn.Conv2d(before, after, 3, padding=1), torch.nn.ReLU(), nn.MaxPool2d(2)]
        for _ in range(2):  # a region sees 54 pixels, more than most objects have, instead of 22
            blocks += [nn.Conv2d(width, width, 3, padding=1), torch.nn.ReLU()]
        self.regions = nn.Sequential(*blocks)
        self.places = nn.LearnedPositions(self.side * self.side, width, batch_first=True)
        self.norm = nn.LayerNorm(width)  # a reader looks for a direction, and regions differ most in their length
        self.embedding = torch.nn.Embedding(symbols, width, padding_idx=0)
        self.lstm = nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)
        self.readers = torch.nn.ModuleList(nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(hops))
        self.norms = torch.nn.ModuleList(nn.LayerNorm(width) for _ in range(hops))
        self.head = torch.nn.Sequential(
            torch.nn.Linear(2 * width, width), torch.nn.ReLU(), torch.nn.Linear(width, answers)
        )

    def forward(
        self, image: Tensor, question: Tensor, lengths: Tensor, *, need_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        memory = self.norm(self.places(self.regions(image).flatten(2).transpose(1, 2)))
        _, (last, _) = self.lstm(self.embedding(question), lengths=lengths)
        asked = torch.cat([last[0], last[1]], 1).unsqueeze(1)
        state = asked
        weights = None
        for read, norm in zip(self.readers, self.norms, strict=True):
            found, weights = read(norm(state), memory, memory, need_weights=need_weights)
            state = state + found
        scores: Tensor = self.head(torch.cat([state, asked], 2).squeeze(1))
        if weights is None:
            return scores
        return scores, weights.view(-1, self.side, self.side)
