"""Sparse Sinkhorn attention: blocks of keys are sorted by a learned, nearly doubly stochastic matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyseqnet import functional as F
from pyseqnet.nn.efficient.base import MultiheadMixer, positive

_NEVER = -1e9  # the logarithm of a weight that is none; finite, so that gradients are


def sinkhorn(scores: Tensor, iterations: int, allowed: Tensor | None = None, causal: bool = False) -> Tensor:
    """Rows and columns of ``exp(scores)`` (..., N, N) normalised in turn, `iterations` times, in logarithms.

    Ends with the columns; after some ten iterations both sum to one. ``allowed`` (bool) leaves entries out. ``causal``:
    a column is normalised by its entries in this row and those above only, so that no row depends on a later one.
    """
    allowed = torch.ones_like(scores, dtype=torch.bool) if allowed is None else allowed
    scores = scores.masked_fill(~allowed, _NEVER)
    for _ in range(iterations):
        scores = (scores - scores.logsumexp(-1, keepdim=True)).masked_fill(~allowed, _NEVER)
        sums = scores.logcumsumexp(-2) if causal else scores.logsumexp(-2, keepdim=True)
        scores = (scores - sums).masked_fill(~allowed, _NEVER)
    return scores.exp()


def attention_to_sorted_blocks(
    query: Tensor, key: Tensor, value: Tensor, sort: Tensor, hidden: Tensor, causal: bool, dropout_p: float
) -> Tensor:
    """Each block of m queries sees its own block of keys and the mean of all blocks, weighted by its row of `sort`.

    query, key, value ``(B, H, N, m, D)``; sort ``(B, H, N, N)``; hidden ``(B, N, m)`` True for padded keys, which take
    no part in a mean. Causal: inside the own block; `sort` itself says which blocks come before.
    """
    visible = (~hidden).to(key.dtype)[:, None, :, :, None]
    share = torch.einsum("bhij,bhjmd->bhimd", sort, visible.expand(-1, sort.shape[1], -1, -1, -1))
    there = share > torch.finfo(share.dtype).tiny
    weight = torch.where(there, share, 1.0).reciprocal()
    moved = [torch.einsum("bhij,bhjmd->bhimd", sort, t * visible) * weight for t in (key, value)]
    size = query.shape[3]
    own = ~hidden[:, None, :, None, :].expand(-1, query.shape[1], -1, size, -1)
    if causal:
        own = own & torch.ones(size, size, dtype=torch.bool, device=query.device).tril()
    mask = torch.cat([there.squeeze(4).unsqueeze(3).expand_as(own), own], 4)
    k, v = torch.cat([moved[0], key], 3), torch.cat([moved[1], value], 3)
    output: Tensor = F.scaled_dot_product_attention(query, k, v, mask, dropout_p)
    return output


class SinkhornAttention(MultiheadMixer):
    """Local attention in blocks of `block_size`, and to one block more that sorting has brought there.

    Equivalent to::

        R = sinkhorn((mean of q in block i) . (mean of k in block j) / sqrt(D) / temperature, iterations)
        attention(q[i], cat([R @ blocks(k), blocks(k)])[i], cat([R @ blocks(v), blocks(v)])[i])

    Gumbel noise is added to the scores in training with ``gumbel=True``. With R the identity the layer is local
    attention in blocks. Pairs computed: ``L * 2 * block_size``, and ``(L / block_size)**2`` scores of blocks.

    Causal: block i draws from blocks before it only; its row of scores comes from its first query (which every query of
    the block may see) and is balanced without a look at later rows. The last block is filled up, and padding takes no
    part: neither as a key, nor in the means.

    >>> layer = SinkhornAttention(8, 2, batch_first=True, block_size=16)
    >>> x = torch.randn(3, 50, 8)
    >>> layer(x, x, x, is_causal=True)[0].shape
    torch.Size([3, 50, 8])

    Paper: Tay, Bahri, Yang, Metzler, Juan: Sparse Sinkhorn attention, 2020.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        block_size: int = 64,
        iterations: int = 8,
        temperature: float = 0.75,
        gumbel: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, bias, batch_first, device=device, dtype=dtype)
        positive(block_size=block_size, iterations=iterations)
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.block_size, self.iterations, self.temperature, self.gumbel = block_size, iterations, temperature, gumbel

    def _sort(self, query: Tensor, key: Tensor, hidden: Tensor, causal: bool) -> Tensor:
        """The matrix (B, H, N, N) from blocks (B, H, N, m, D)."""
        seen = (~hidden).to(key.dtype)[:, None, :, :, None]
        number = seen.sum(3).clamp(min=1)
        rows = query[:, :, :, 0] if causal else (query * seen).sum(3) / number
        scores = rows @ ((key * seen).sum(3) / number).transpose(2, 3) / math.sqrt(self.head_dim)
        if self.training and self.gumbel:
            scores = scores - torch.empty_like(scores).exponential_().log()
        some = (~hidden).any(2)[:, None]
        allowed = some.unsqueeze(3) & some.unsqueeze(2)
        if causal:
            count = scores.shape[3]
            allowed = allowed & torch.ones(count, count, dtype=torch.bool, device=scores.device).tril(-1)
        return sinkhorn(scores / self.temperature, self.iterations, allowed.expand_as(scores), causal)

    def _attend(self, heads: tuple[Tensor, ...], padding: Tensor | None, causal: bool) -> Tensor:
        batch, _, length, _ = heads[0].shape
        if not heads[0].numel():
            return heads[0]
        missing = -length % self.block_size
        hidden = torch.zeros(batch, length, dtype=torch.bool, device=heads[0].device) if padding is None else padding
        hidden = pad(hidden, (0, missing), value=True).unflatten(1, (-1, self.block_size))
        query, key, value = (pad(t, (0, 0, 0, missing)).unflatten(2, (-1, self.block_size)) for t in heads)
        sort = self._sort(query, key, hidden, causal)
        output = attention_to_sorted_blocks(query, key, value, sort, hidden, causal, self._dropout_p)
        return output.flatten(2, 3)[:, :, :length]
