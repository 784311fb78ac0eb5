"""The policy network of Go: convolutions without pooling, since a board is not the same with every other row gone."""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet import nn


class GoPolicy(torch.nn.Module):
    """Scores every point of a Go board for the next move (Silver et al., Mastering the game of Go with deep neural
    networks and tree search, 2016).

    A 5x5 convolution, `layers` - 1 convolutions of 3x3, all zero-padded so that the board keeps its size, each with
    ReLU; then one 1x1 filter and a bias of its own for every point. Nothing is pooled, unless `pool` asks for it, to
    see what that costs: max-pooling by so much behind the first layer; points that were pooled share a score.

    Shapes: input (N, planes, size, size), the board as feature planes; output (N, size*size), scores before softmax,
    row by row. An unbatched (planes, size, size) gives (size*size,).

    >>> policy = GoPolicy(filters=16)
    >>> policy(torch.zeros(2, 48, 19, 19)).shape
    torch.Size([2, 361])
    """

    def __init__(
        self, planes: int = 48, filters: int = 192, layers: int = 12, size: int = 19, *, pool: int = 1
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        if pool < 1:
            raise ValueError(f"pool must be at least 1, got {pool}")
        self.pool = pool
        body: list[torch.nn.Module] = [nn.Conv2d(planes, filters, 5, padding=2), torch.nn.ReLU()]
        if pool > 1:
            body.append(nn.MaxPool2d(pool, ceil_mode=True))
        for _ in range(layers - 1):
            body += [nn.Conv2d(filters, filters, 3, padding=1), torch.nn.ReLU()]
        self.body = nn.Sequential(*body)
        self.head = nn.Conv2d(filters, 1, 1, bias=False)
        self.bias = torch.nn.Parameter(torch.zeros(size * size))

    def forward(self, input: Tensor) -> Tensor:
        board = self.head(self.body(input))
        if self.pool > 1:
            pooled = torch.arange(input.shape[-1], device=board.device) // self.pool
            board = board[..., pooled[:, None], pooled]
        scores: Tensor = board.flatten(-3) + self.bias
        return scores
