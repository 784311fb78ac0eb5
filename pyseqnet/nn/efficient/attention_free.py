"""Mixing tokens without attention: Fourier transforms (FNet), spatial gates (gMLP), an MLP along tokens (MLP-Mixer).

Each takes the place of the self-attention block of a Transformer layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Parameter
from torch.nn.functional import dropout, gelu, linear

from pyseqnet.nn.efficient.base import TokenMixer, positive
from pyseqnet.nn.norm import LayerNorm


class FNetMixing(TokenMixer):
    """FNet: the real part of a Fourier transform along positions and features. No parameters.

    Equivalent to::

        fft(fft(x, dim=features), dim=positions).real       # (DFT_L @ x @ DFT_E).real

    Every output holds every input, so it cannot be causal. Padded positions count as zeros. ``num_heads`` and ``bias``
    are taken for the sake of the signature. 16-bit inputs are transformed in float32.

    Paper: Lee-Thorp, Ainslie, Eckstein, Ontañón: FNet: Mixing tokens with Fourier transforms, 2021.
    """

    never_causal = "a Fourier transform along positions mixes all of them"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, batch_first)

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, causal: bool) -> Tensor:
        wide = query.to(torch.promote_types(query.dtype, torch.float32))
        if not wide.numel():
            return query
        return torch.fft.fft(torch.fft.fft(wide, dim=2), dim=1).real.to(query.dtype)


class GatedMLPMixing(TokenMixer):
    """gMLP's block: half of the channels gate the other half, after a linear map along positions.

    Equivalent to::

        u, v = gelu(x @ W_in + b_in).chunk(2, -1)            # (L, hidden) each
        v = spatial_weight[:L, :L] @ norm(v) + spatial_bias[:L, None]
        (u * v) @ W_out + b_out                              # causal: spatial_weight.tril()

    The spatial map begins near 0 with bias 1, so that the block begins as a feed-forward one. At most ``seq_len``
    positions. ``num_heads`` is taken for the sake of the signature; ``hidden`` defaults to ``embed_dim``.

    Paper: Liu, Dai, So, Le: Pay attention to MLPs, 2021.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        seq_len: int = 512,
        hidden: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, batch_first)
        hidden = embed_dim if hidden is None else hidden
        positive(seq_len=seq_len, hidden=hidden)
        factory = {"device": device, "dtype": dtype}
        self.seq_len = seq_len
        self.in_proj = Linear(embed_dim, 2 * hidden, bias=bias, **factory)
        self.norm = LayerNorm(hidden, **factory)
        bound = 1e-3 / seq_len  # the authors'
        self.spatial_weight = Parameter(torch.empty(seq_len, seq_len, **factory).uniform_(-bound, bound))
        self.spatial_bias = Parameter(torch.ones(seq_len, **factory))
        self.out_proj = Linear(hidden, embed_dim, bias=bias, **factory)

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, causal: bool) -> Tensor:
        length = query.shape[1]
        if length > self.seq_len:
            self._refuse(f"made for at most seq_len={self.seq_len} positions; got {length}")
        u, v = gelu(self.in_proj(query)).chunk(2, -1)
        v = self.norm(v)
        if padding is not None:
            v = v.masked_fill(padding.unsqueeze(2), 0.0)
        weight = self.spatial_weight[:length, :length]
        mixed = (weight.tril() if causal else weight) @ v + self.spatial_bias[:length, None]
        return self.out_proj(dropout(u * mixed, self.dropout, self.training))


class MLPMixing(TokenMixer):
    """MLP-Mixer's token-mixing block: a two-layer perceptron along the positions, the same for every channel.

    Equivalent to::

        (W2 @ gelu(W1 @ x + b1) + b2)                        # x (L, E); W1 (hidden, seq_len), W2 (seq_len, hidden)

    Every output holds every input, so it cannot be causal. Padded positions count as zeros. At most ``seq_len``
    positions; shorter inputs take the first columns of W1 and rows of W2. ``num_heads`` is taken for the signature.

    Paper: Tolstikhin et al.: MLP-Mixer: An all-MLP architecture for vision, 2021.
    """

    never_causal = "its hidden units hold all positions"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        seq_len: int = 512,
        hidden: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, batch_first)
        hidden = seq_len // 2 or 1 if hidden is None else hidden
        positive(seq_len=seq_len, hidden=hidden)
        self.seq_len = seq_len
        self.into = Linear(seq_len, hidden, bias=bias, device=device, dtype=dtype)
        self.back = Linear(hidden, seq_len, bias=bias, device=device, dtype=dtype)

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, causal: bool) -> Tensor:
        length = query.shape[1]
        if length > self.seq_len:
            self._refuse(f"made for at most seq_len={self.seq_len} positions; got {length}")
        hidden = gelu(linear(query.transpose(1, 2), self.into.weight[:, :length], self.into.bias))
        hidden = dropout(hidden, self.dropout, self.training)
        bias = None if self.back.bias is None else self.back.bias[:length]
        return linear(hidden, self.back.weight[:length], bias).transpose(1, 2)
