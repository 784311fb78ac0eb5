"""Layers of a Transformer: torch's own, with the attention computed by our kernels.

What they take beyond torch's and where they differ says `pyseqnet.nn.transformer`, the stacks of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Bound at import: replacing torch.nn's classes by ours later cannot make a class its own base.
from torch.nn import TransformerDecoderLayer as _TorchTransformerDecoderLayer
from torch.nn import TransformerEncoderLayer as _TorchTransformerEncoderLayer
from torch.nn.functional import relu

from pyseqnet.masks import Pattern
from pyseqnet.nn._attention_masks import agreed_masks, finite_padding
from pyseqnet.nn._transformer_parts import (
    PARTS,
    Activation,
    Factory,
    choose_parts,
    new_cache,
    normalised,
    step,
    take_over,
)
from pyseqnet.nn.cache import LayerState


class TransformerEncoderLayer(_TorchTransformerEncoderLayer):
    """Drop-in for `torch.nn.TransformerEncoderLayer`: self-attention, then two linear layers.

    Each is added to its input and normalised, after the sum or (``norm_first``) before the block.

    >>> layer = TransformerEncoderLayer(512, 8)
    >>> sum(p.numel() for p in layer.parameters())
    3152384
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        attention: str | Factory = "softmax",
        pattern: Pattern | None = None,
        norm: str | Factory = "layer",
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        take_over(self, PARTS)
        choose_parts(self, attention, pattern, norm, bias, {"device": device, "dtype": dtype})

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        state: LayerState | None = None,
    ) -> Tensor:
        padding, mask = agreed_masks(src_key_padding_mask, src_mask, "src_key_padding_mask", "src_mask", src.dtype)
        batch_first = bool(self.self_attn.batch_first)
        x = finite_padding(src, padding, batch_first) if state is None else src
        ignored = padding if state is None else None

        def attend(x: Tensor) -> Tensor:
            if state is None:
                return self._sa_block(x, mask, padding, is_causal=is_causal)
            return self.dropout1(step(self.self_attn, x, mask, padding, state))

        if self.norm_first:
            x = x + attend(normalised(self.norm1, x, ignored, batch_first))
            return x + self._ff_block(normalised(self.norm2, x, ignored, batch_first))
        x = normalised(self.norm1, x + attend(x), ignored, batch_first)
        return normalised(self.norm2, x + self._ff_block(x), ignored, batch_first)

    def new_state(self, capacity: int | None = None, batch_size: int | None = None) -> LayerState:
        """An empty state of this layer for decoding; see `TransformerEncoder.new_state`."""
        return LayerState(new_cache(self.self_attn, capacity, batch_size))


class TransformerDecoderLayer(_TorchTransformerDecoderLayer):
    """Drop-in for `torch.nn.TransformerDecoderLayer`: self-attention, attention to `memory`, two linear layers.

    Each is added to its input and normalised, after the sum or (``norm_first``) before the block.

    >>> layer = TransformerDecoderLayer(512, 8)
    >>> sum(p.numel() for p in layer.parameters())
    4204032
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        attention: str | Factory = "softmax",
        pattern: Pattern | None = None,
        norm: str | Factory = "layer",
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        take_over(self, PARTS)
        choose_parts(self, attention, pattern, norm, bias, {"device": device, "dtype": dtype})

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        state: LayerState | None = None,
    ) -> Tensor:
        batch_first = bool(self.self_attn.batch_first)
        x = finite_padding(tgt, tgt_key_padding_mask, batch_first) if state is None else tgt
        ignored = tgt_key_padding_mask if state is None else None

        def attend(x: Tensor) -> Tensor:
            if state is None:
                return self._sa_block(x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)
            return self.dropout1(step(self.self_attn, x, tgt_mask, tgt_key_padding_mask, state))

        def look(x: Tensor) -> Tensor:
            if state is None or state.memory is None:
                return self._mha_block(x, memory, memory_mask, memory_key_padding_mask, memory_is_causal)
            output = self.multihead_attn(
                x,
                memory,
                memory,
                attn_mask=memory_mask,
                key_padding_mask=memory_key_padding_mask,
                need_weights=False,
                cache=state.memory,
            )[0]
            return self.dropout2(output)

        def add_norm(norm: torch.nn.Module, x: Tensor) -> Tensor:
            return normalised(norm, x, ignored, batch_first)

        if self.norm_first:
            x = x + attend(add_norm(self.norm1, x))
            x = x + look(add_norm(self.norm2, x))
            return x + self._ff_block(add_norm(self.norm3, x))
        x = add_norm(self.norm1, x + attend(x))
        x = add_norm(self.norm2, x + look(x))
        return add_norm(self.norm3, x + self._ff_block(x))

    def new_state(self, capacity: int | None = None, batch_size: int | None = None) -> LayerState:
        """An empty state of this layer for decoding; see `TransformerDecoder.new_state`."""
        return LayerState(
            new_cache(self.self_attn, capacity, batch_size), new_cache(self.multihead_attn, None, None, memory=True)
        )
