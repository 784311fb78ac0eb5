"""Attention of each query to its best keys only."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyseqnet import functional as F
from pyseqnet.nn.efficient.base import MultiheadMixer, positive, visible_keys

_ROWS = 512  # queries whose scores are held at once


class TopKAttention(MultiheadMixer):
    """Each query attends to the `k` keys with its largest scores, or to those that dense attention would give at least
    the weight ``threshold``; what is left is a softmax among them.

    Equivalent to::

        scores = q @ k.T / sqrt(D)                                      # with masks
        kept = scores >= scores.topk(k).values[..., -1:]                # equal ones stay together
        kept = softmax(scores) >= threshold                             # in place of it, with a threshold
        softmax(scores.masked_fill(~kept, -inf)) @ v

    ``k`` at least the number of keys, or a threshold of 0, is `MultiheadAttention`. What to keep is known only after
    all scores, so no time is saved; memory is one bool a pair, since scores are held for a block of queries at a time
    (Gupta et al., 2021). No gradient flows through the choice. A query that keeps nothing (no weight reaches the
    threshold) gives the output projection's bias.

    >>> layer = TopKAttention(8, 2, batch_first=True, k=4)
    >>> x = torch.zeros(3, 50, 8)
    >>> layer(x, x, x, is_causal=True)[0].shape
    torch.Size([3, 50, 8])

    Papers: Zhao, Lin, Zhang, Ren, Su, Sun: Explicit sparse Transformer, 2019; Gupta, Dar, Goodman, Ciprut, Berant:
    Memory-efficient Transformers via top-k attention, 2021.
    """

    self_attention = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        k: int | None = None,
        threshold: float | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, bias, batch_first, device=device, dtype=dtype)
        if k is not None and threshold is not None:
            raise ValueError(f"give k or threshold, not both; got {k} and {threshold}")
        if k is None and threshold is None:
            k = 32
        if k is not None:
            positive(k=k)
        if threshold is not None and not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold must be between 0 and 1, got {threshold}")
        self.k, self.threshold = k, threshold

    def _kept(self, query: Tensor, key: Tensor, visible: Tensor | None, first: int, causal: bool) -> Tensor:
        scores = query @ key.transpose(2, 3) / math.sqrt(self.head_dim)
        if visible is not None:
            scores = scores.masked_fill(~visible, -math.inf)
        if causal:
            later = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(first + 1)
            scores = scores.masked_fill(later, -math.inf)
        if self.threshold is not None:
            return scores.softmax(3) >= self.threshold
        assert self.k is not None
        return scores >= scores.topk(min(self.k, scores.shape[3]), 3, sorted=True).values[..., -1:]

    def _attend(self, heads: tuple[Tensor, ...], padding: Tensor | None, causal: bool) -> Tensor:
        query, key, value = heads
        visible = visible_keys(padding)
        mask = visible
        if key.shape[2] and query.shape[2]:
            with torch.no_grad():
                parts = [
                    self._kept(rows, key, visible, n * _ROWS, causal) for n, rows in enumerate(query.split(_ROWS, 2))
                ]
                mask = torch.cat(parts, 2)
                mask = mask if visible is None else mask & visible
        output: Tensor = F.scaled_dot_product_attention(query, key, value, mask, self._dropout_p, causal)
        return output
