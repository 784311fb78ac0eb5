"""Attention without queries and keys: the matrix of scores is a parameter, or synthesised from each token alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Parameter
from torch.nn.functional import relu

from pyseqnet import functional as F
from pyseqnet.nn.efficient.base import MultiheadMixer, positive, visible_keys

MODES = ("dense", "random", "factorized_random")


class SynthesizerAttention(MultiheadMixer):
    """Synthesizer: ``softmax(R) V``, with R from no product of queries and keys.

    Equivalent to::

        R = W2 @ relu(W1 @ x[i])                     # "dense": row i, for each head, from token i
        R = scores[:, :L, :L]                        # "random": a parameter (num_heads, seq_len, seq_len)
        R = left[:, :L] @ right[:, :L].T             # "factorized_random": (num_heads, seq_len, rank) each
        softmax(R + masks) @ V                       # V = x @ Wv

    A factorised R is never formed: its factors are the kernel's queries and keys. With R = 0 the layer is mean pooling.
    ``trainable=False`` keeps a random R as it was drawn. At most ``seq_len`` positions; shorter inputs take the first
    rows and columns.

    >>> layer = SynthesizerAttention(8, 2, batch_first=True, mode="random", seq_len=64)
    >>> x = torch.zeros(3, 50, 8)
    >>> layer(x, x, x, is_causal=True)[0].shape
    torch.Size([3, 50, 8])

    Paper: Tay, Bahri, Metzler, Juan, Zhao, Zheng: Synthesizer: Rethinking self-attention for Transformer models, 2021.
    """

    projections = 1

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        mode: str = "random",
        seq_len: int = 512,
        rank: int = 8,
        trainable: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, bias, batch_first, device=device, dtype=dtype)
        positive(seq_len=seq_len, rank=rank)
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}; got {mode!r}")
        if mode == "dense" and not trainable:
            raise ValueError("trainable=False belongs to the random modes")
        self.mode, self.seq_len = mode, seq_len
        factory = {"device": device, "dtype": dtype}

        def drawn(*shape: int) -> Parameter:
            return Parameter(torch.randn(num_heads, *shape, **factory), requires_grad=trainable)

        if mode == "dense":
            self.hidden = Linear(embed_dim, embed_dim, bias=bias, **factory)
            self.synthesis = Parameter(torch.randn(num_heads, self.head_dim, seq_len, **factory) * self.head_dim**-0.5)
        elif mode == "random":
            self.scores = drawn(seq_len, seq_len)
        else:
            self.left, self.right = drawn(seq_len, rank), drawn(seq_len, rank)

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, causal: bool) -> Tensor:
        batch, length = query.shape[:2]
        if length > self.seq_len:
            self._refuse(f"made for at most seq_len={self.seq_len} positions; got {length}")
        (v,) = self._heads(query, query, query)
        bias = None
        if self.mode == "factorized_random":
            left, right = (t[None, :, :length].expand(batch, -1, -1, -1) for t in (self.left, self.right))
        else:  # products of zeros, to which the scores are added
            left = right = v.new_zeros(batch, self.num_heads, length, 1)
            if self.mode == "random":
                bias = self.scores[None, :, :length, :length]
            else:
                hidden = relu(self.hidden(query)).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
                bias = hidden @ self.synthesis[:, :, :length]
        mixed = F.scaled_dot_product_attention(
            left, right, v, visible_keys(padding), self._dropout_p, causal, 1.0, bias=bias
        )
        return self.out_proj(mixed.transpose(1, 2).flatten(2))
