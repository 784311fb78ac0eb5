"""Transformer layers: torch's own, with the attention computed by our kernels.

Vaswani et al.: Attention is all you need, 2017; normalisation before the blocks: Xiong et al., On layer
normalization in the Transformer architecture, 2020.

Where they differ from torch's: attention as in `MultiheadAttention`; there is no inference-only path, so training and
evaluation compute the same and padded positions hold what the layers make of them (torch's holds zeros there, but only
in evaluation without gradients and with ``enable_nested_tensor``); padded positions that hold NaN or infinity do not
reach a gradient; and all of them compile with ``fullgraph=True``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Bound at import: replacing torch.nn's classes by ours later cannot make a class its own base.
from torch.nn import LayerNorm as _TorchLayerNorm
from torch.nn import MultiheadAttention as _TorchMultiheadAttention
from torch.nn import Transformer as _TorchTransformer
from torch.nn import TransformerDecoder as _TorchTransformerDecoder
from torch.nn import TransformerDecoderLayer as _TorchTransformerDecoderLayer
from torch.nn import TransformerEncoder as _TorchTransformerEncoder
from torch.nn import TransformerEncoderLayer as _TorchTransformerEncoderLayer
from torch.nn.functional import relu

from pyseqnet.nn.attention import MultiheadAttention, agreed_masks, finite_padding
from pyseqnet.nn.norm import LayerNorm

Activation = str | Callable[[Tensor], Tensor]


def _take_over(module: torch.nn.Module) -> None:
    """Every part that torch built becomes ours, with the parameters that it has drawn."""
    for part in module.modules():
        if type(part) in _OURS:
            part.__class__ = _OURS[type(part)]


def _finds_causal_mask(mask: Tensor | None, hint: bool | None, length: int) -> bool:
    """The hint; without one, whether `mask` is the causal one. As torch, but a compiler is not made to look."""
    if hint is not None or mask is None or torch.compiler.is_compiling():
        return bool(hint)
    if mask.shape != (length, length):
        return False
    causal = torch.full_like(mask, True if mask.dtype == torch.bool else -torch.inf).triu_(1)
    return torch.equal(mask, causal)


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
        _take_over(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        padding, mask = agreed_masks(src_key_padding_mask, src_mask, "src_key_padding_mask", "src_mask", src.dtype)
        x = finite_padding(src, padding, self.self_attn.batch_first)
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), mask, padding, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, mask, padding, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))


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
        _take_over(self)

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
    ) -> Tensor:
        tgt = finite_padding(tgt, tgt_key_padding_mask, self.self_attn.batch_first)
        return super().forward(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            tgt_is_causal,
            memory_is_causal,
        )


class TransformerEncoder(_TorchTransformerEncoder):
    """Drop-in for `torch.nn.TransformerEncoder`: `num_layers` copies of `encoder_layer`, then `norm`.

    ``enable_nested_tensor`` and ``mask_check`` are kept as attributes; there is no path that they would choose.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        padding, mask = agreed_masks(src_key_padding_mask, mask, "src_key_padding_mask", "mask", src.dtype)
        batch_first = self.layers[0].self_attn.batch_first
        length = src.shape[1 if src.dim() == 3 and batch_first else 0]
        causal = _finds_causal_mask(mask, is_causal, length)
        output = src
        for layer in self.layers:
            output = layer(output, src_mask=mask, is_causal=causal, src_key_padding_mask=padding)
        return self.norm(output) if self.norm is not None else output


class TransformerDecoder(_TorchTransformerDecoder):
    """Drop-in for `torch.nn.TransformerDecoder`: `num_layers` copies of `decoder_layer`, then `norm`."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        batch_first = self.layers[0].self_attn.batch_first
        length = tgt.shape[1 if tgt.dim() == 3 and batch_first else 0]
        return super().forward(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            _finds_causal_mask(tgt_mask, tgt_is_causal, length),
            memory_is_causal,
        )


class Transformer(_TorchTransformer):
    """Drop-in for `torch.nn.Transformer`: encoder and decoder, each with a final normalisation.

    A `custom_encoder` or `custom_decoder` is used as it is.

    >>> sum(p.numel() for p in Transformer().parameters())
    44140544
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            num_encoder_layers,
            num_decoder_layers,
            dim_feedforward,
            dropout,
            activation,
            custom_encoder,
            custom_decoder,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        if custom_encoder is None:
            _take_over(self.encoder)
        if custom_decoder is None:
            _take_over(self.decoder)


_OURS: dict[type, type] = {
    _TorchMultiheadAttention: MultiheadAttention,
    _TorchLayerNorm: LayerNorm,
    _TorchTransformerEncoderLayer: TransformerEncoderLayer,
    _TorchTransformerDecoderLayer: TransformerDecoderLayer,
    _TorchTransformerEncoder: TransformerEncoder,
    _TorchTransformerDecoder: TransformerDecoder,
}
