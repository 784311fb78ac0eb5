"""Self-attention in windows: truncated, as for speech, and Longformer's, with global tokens.

Yeh et al.: Transformer-Transducer: End-to-end speech recognition with self-attention, 2019.
Beltagy, Peters, Cohan: Longformer: The long-document Transformer, 2020.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear

from pyseqnet import functional as F
from pyseqnet.masks import Global, Local
from pyseqnet.nn.attention import MultiheadAttention


class TruncatedSelfAttention(MultiheadAttention):
    """`MultiheadAttention` in which frame i sees the frames ``i - left .. i + right`` only.

    Time and memory are in proportion to the window. ``right`` frames of look-ahead are the layer's latency; 0 makes it
    causal, and then it decodes with a cache. Called as `MultiheadAttention`; parameters are the same. For Transformer
    layers: ``attention=functools.partial(TruncatedSelfAttention, left=15, right=3)``.

    >>> layer = TruncatedSelfAttention(8, 2, batch_first=True, left=2, right=1)
    >>> frames = torch.zeros(1, 6, 8)
    >>> layer(frames, frames, frames)[1][0, 3]
    tensor([0.0000, 0.2500, 0.2500, 0.2500, 0.2500, 0.0000],
           grad_fn=<SelectBackward0>)

    Paper: Yeh et al., 2019, section 3.2.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        left: int,
        right: int,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
            pattern=Local(left, right),
        )


class LongformerSelfAttention(MultiheadAttention):
    """Longformer's self-attention: windows, and global tokens with projections of their own.

    The first ``global_tokens`` positions see all and are seen by all. Their queries, and the keys and values that these
    meet, come from ``global_in_proj_weight`` and ``global_in_proj_bias``, which start as copies of the windows'
    projections; every other position sees ``window`` neighbours to each side and the global tokens, through
    ``in_proj_weight``. `MultiheadAttention` with ``pattern=Local(window) | Global(tokens)`` is the same with one set of
    projections.

    Called as `MultiheadAttention`, for self-attention: ``query`` is also key and value. ``need_weights`` must be False,
    ``attn_mask`` None.

    >>> layer = LongformerSelfAttention(8, 2, batch_first=True, window=2, global_tokens=1)
    >>> x = torch.zeros(1, 6, 8)
    >>> layer(x, x, x, need_weights=False)[0].shape
    torch.Size([1, 6, 8])

    Paper: Beltagy, Peters and Cohan, 2020, section 3.1.
    """

    global_in_proj_bias: Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        window: int,
        global_tokens: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
            pattern=Local(window) | Global(global_tokens),
        )
        self.global_tokens = global_tokens
        self.global_in_proj_weight = Parameter(self.in_proj_weight.detach().clone())
        if bias:
            self.global_in_proj_bias = Parameter(self.in_proj_bias.detach().clone())
        else:
            self.register_parameter("global_in_proj_bias", None)

    def _global_rows(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """Attention of the global tokens of (B, L, E), heads joined: (B, tokens, E)."""
        size, heads = self.embed_dim, (self.num_heads, self.head_dim)
        weight_q, weight_kv = self.global_in_proj_weight.split([size, 2 * size])
        bias = self.global_in_proj_bias
        bias_q, bias_kv = bias.split([size, 2 * size]) if bias is not None else (None, None)
        query = linear(x[:, : self.global_tokens], weight_q, bias_q).unflatten(-1, heads).transpose(1, 2)
        key, value = (t.transpose(1, 2) for t in linear(x, weight_kv, bias_kv).unflatten(-1, (2, *heads)).unbind(-3))
        seen = None if padding is None else ~padding[:, None, None, :]
        rate = self.dropout if self.training else 0.0
        attended: Tensor = F.scaled_dot_product_attention(query, key, value, seen, rate)
        return attended.transpose(1, 2).flatten(2)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        if key is not query or value is not query:
            raise ValueError("LongformerSelfAttention is self-attention: query, key and value must be one tensor")
        if need_weights or attn_mask is not None or is_causal or cache is not None:
            raise ValueError("LongformerSelfAttention takes no attn_mask, is_causal or cache, and returns no weights")
        if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
            raise ValueError("LongformerSelfAttention takes a bool key_padding_mask (True = ignore)")
        local, _ = super().forward(query, key, value, key_padding_mask, need_weights=False)
        batched, dim = query.dim() == 3, 1 if self.batch_first else 0
        x = query if batched and self.batch_first else query.transpose(0, 1) if batched else query.unsqueeze(0)
        padding = key_padding_mask if batched or key_padding_mask is None else key_padding_mask.unsqueeze(0)
        if padding is not None and torch.is_grad_enabled():
            x = x.masked_fill(padding.unsqueeze(2), 0.0)  # a projection's weight would get the gradient 0 * NaN
        rows = linear(self._global_rows(x, padding), self.out_proj.weight, self.out_proj.bias)
        rows = rows if batched and self.batch_first else rows.transpose(0, 1) if batched else rows.squeeze(0)
        dim = dim if batched else 0
        count = rows.shape[dim]
        return torch.cat([rows, local.narrow(dim, count, local.shape[dim] - count)], dim), None
