"""Visual question answering: the regions of an image are the memory that a question reads.

Xu, Saenko: Ask, attend and answer, 2015; Yang, He, Gao, Deng, Smola: Stacked attention networks, 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet import nn
from pyseqnet.models.question_reader import QuestionReader


class VisualQuestionAnswerer(torch.nn.Module):
    """Answers questions about images.

    Convolutions with pooling turn the image into a grid of regions, each with a learned place; a `QuestionReader` reads
    them.

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
        self.regions = nn.Sequential(*blocks)
        self.places = nn.LearnedPositions(self.side * self.side, width, batch_first=True)
        self.reader = QuestionReader(symbols, answers, width=width, heads=heads, hops=hops)

    def forward(
        self, image: Tensor, question: Tensor, lengths: Tensor, *, need_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        memory = self.places(self.regions(image).flatten(2).transpose(1, 2))
        found: Tensor | tuple[Tensor, Tensor] = self.reader(memory, question, lengths, need_weights=need_weights)
        if isinstance(found, Tensor):
            return found
        scores, weights = found
        return scores, weights.view(-1, self.side, self.side)
