"""What the layers of this room share: called as `MultiheadAttention`, so that Transformer layers take them by name."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter
from torch.nn.functional import linear
from torch.nn.init import constant_, xavier_uniform_

from pyseqnet.nn._attention_masks import may_be_looked_at


def visible_keys(padding: Tensor | None) -> Tensor | None:
    """A padding mask (B, S), True = ignore, as attention functions take it: (B, 1, 1, S), True takes part."""
    return None if padding is None else ~padding[:, None, None, :]


def positive(**sizes: int) -> None:
    """ValueError for what is not at least 1, by name."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an integer, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


class MixerArguments(Module):
    """What every layer of this room says of causality and padding."""

    never_causal: str | None = None  # why the layer cannot be causal, in words

    def _refuse(self, words: str) -> None:
        raise ValueError(f"{type(self).__name__}: {words}")

    def _refuse_causal(self, is_causal: bool) -> None:
        if is_causal and self.never_causal is not None:
            self._refuse(f"cannot be causal: {self.never_causal}")

    def _hidden(self, mask: Tensor) -> Tensor:
        """A key_padding_mask as bool, True = ignore."""
        if mask.dtype == torch.bool:
            return mask
        hidden = mask == -math.inf
        if not mask.is_floating_point() or (may_be_looked_at(mask) and bool((mask.masked_fill(hidden, 0)).any())):
            self._refuse("key_padding_mask must be bool (True = ignore), or hold 0 and -inf only")
        return hidden


class TokenMixer(MixerArguments):
    """Arguments of `torch.nn.MultiheadAttention` read into one form, for layers that mix tokens in another way.

    ``forward(query, key, value, key_padding_mask=None, need_weights=False, attn_mask=None, average_attn_weights=True,
    is_causal=False)`` returns ``(output, None)``: there are no weights to return. Tensors are ``(L, B, E)``, with
    ``batch_first`` ``(B, L, E)``, unbatched ``(L, E)``. ``key_padding_mask`` (True = ignore, or 0 and -inf) may hide
    any position: what stands there reaches no other output and no gradient. Of masks between positions there is the
    causal one (``is_causal=True``; ``attn_mask`` is then not looked at); others raise ValueError.
    """

    self_attention = True  # whether query, key and value must be one tensor

    def __init__(self, embed_dim: int, num_heads: int, dropout: float, batch_first: bool) -> None:
        super().__init__()
        positive(embed_dim=embed_dim, num_heads=num_heads)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.dropout, self.batch_first = dropout, batch_first

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, causal: bool) -> Tensor:
        """From (B, L, E) and (B, S, E) to (B, L, E); `padding` (B, S) is bool, and zeros stand where it is True."""
        raise NotImplementedError

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        tensors = (query, key, value)
        if any(t.dim() not in (2, 3) or t.dim() != query.dim() or t.shape[-1] != self.embed_dim for t in tensors):
            self._refuse(
                f"query, key and value must be all 2-D or all 3-D with {self.embed_dim} features; got {shapes}"
            )
        if self.self_attention and (key is not query or value is not query):
            self._refuse("query, key and value must be one tensor: this is self-attention")
        batch = slice(0, 0) if query.dim() == 2 else slice(0, 1) if self.batch_first else slice(1, 2)
        if key.shape[:-1] != value.shape[:-1] or key.shape[batch] != query.shape[batch]:
            self._refuse(f"key and value must be equally long, and all of one batch; got {shapes}")

    def _padding(self, mask: Tensor | None, batch: int, keys: int, batched: bool) -> Tensor | None:
        if mask is None:
            return None
        wanted = (batch, keys) if batched else (keys,)
        if tuple(mask.shape) != wanted:
            self._refuse(f"key_padding_mask must have shape {wanted}; got {tuple(mask.shape)}")
        mask = self._hidden(mask)
        return mask if batched else mask.unsqueeze(0)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        if need_weights:
            self._refuse("there are no weights to return: need_weights must be False")
        if attn_mask is not None and not is_causal:
            self._refuse("takes no attn_mask but the causal one, with is_causal=True")
        self._refuse_causal(is_causal)
        self._check(query, key, value)
        batched = query.dim() == 3

        def rows(t: Tensor) -> Tensor:
            """(B, L, E)."""
            return t.unsqueeze(0) if not batched else t if self.batch_first else t.transpose(0, 1)

        q = rows(query)
        k = q if key is query else rows(key)
        v = k if value is key else q if value is query else rows(value)
        if is_causal and q.shape[1] != k.shape[1]:
            self._refuse(f"is_causal needs as many queries as keys; got {q.shape[1]} and {k.shape[1]}")
        padding = self._padding(key_padding_mask, k.shape[0], k.shape[1], batched)
        if padding is not None:
            hole = padding.unsqueeze(2)
            filled = k.masked_fill(hole, 0.0)
            v = filled if v is k else v.masked_fill(hole, 0.0)
            q, k = filled if q is k else q, filled
        output = self._mix(q, k, v, padding, is_causal)
        return (output[0] if not batched else output if self.batch_first else output.transpose(0, 1)), None

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}" + (", batch_first=True" if self.batch_first else "")


class MultiheadMixer(TokenMixer):
    """A `TokenMixer` on the heads of projected tokens: ``in_proj_weight``, ``in_proj_bias`` and ``out_proj`` as
    `torch.nn.MultiheadAttention` names and initialises them; a member with fewer projections says how many."""

    projections = 3
    in_proj_bias: Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, batch_first)
        factory = {"device": device, "dtype": dtype}
        rows = self.projections * embed_dim
        self.in_proj_weight = Parameter(torch.empty(rows, embed_dim, **factory))
        self.register_parameter("in_proj_bias", Parameter(torch.empty(rows, **factory)) if bias else None)
        self.out_proj = Linear(embed_dim, embed_dim, bias=bias, **factory)
        xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            constant_(self.in_proj_bias, 0.0)
            constant_(self.out_proj.bias, 0.0)

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """(B, H, L, D) for each projection, views."""
        if key is query and value is query:
            projected = linear(query, self.in_proj_weight, self.in_proj_bias).chunk(self.projections, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            projected = tuple(linear(*of) for of in zip((query, key, value), weights, biases, strict=True))
        return tuple(t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in projected)

    def _attend(self, heads: tuple[Tensor, ...], padding: Tensor | None, causal: bool) -> Tensor:
        """From projections (B, H, L, D) to outputs of the heads (B, H, L, D)."""
        raise NotImplementedError

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, causal: bool) -> Tensor:
        output = self._attend(self._heads(query, key, value), padding, causal)
        return self.out_proj(output.transpose(1, 2).flatten(2))

    @property
    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0
