"""Transformer layers: torch's own, with the attention computed by our kernels.

Vaswani et al.: Attention is all you need, 2017; normalisation before the blocks: Xiong et al., On layer
normalization in the Transformer architecture, 2020.

Where they differ from torch's: attention as in `MultiheadAttention`; there is no inference-only path, so training and
evaluation compute the same and padded positions hold what the layers make of them (torch's holds zeros there, but only
in evaluation without gradients and with ``enable_nested_tensor``); padded positions that hold NaN or infinity do not
reach a gradient; and all of them compile with ``fullgraph=True``.

Beyond torch's, all by keyword:

* layers take ``attention`` (a name of `ATTENTION` or a factory called as `MultiheadAttention`), ``pattern`` (of
  `pyseqnet.masks`, for the self-attention) and ``norm`` (a name of `NORMS`, or a factory called with ``d_model``);
* a stack takes a list of layers in place of one that is copied, so that each may differ;
* ``state=`` decodes token by token: ``state = decoder.new_state()``, then ``decoder(new_tokens, memory, state=state)``
  gives what the whole sequence would have given at these positions; keys and values of the past, and those of the
  memory, are computed once. ``state.reorder(beams)`` follows a beam search, ``state.length`` is the next position;
* a decoder's ``memory_layers`` says which of the encoder's layers each of its own reads (Liu et al., Rethinking and
  improving natural language generation with layer-wise multi-view decoding, 2020).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Bound at import: replacing torch.nn's classes by ours later cannot make a class its own base.
from torch.nn import MultiheadAttention as _TorchMultiheadAttention
from torch.nn import Transformer as _TorchTransformer
from torch.nn import TransformerDecoder as _TorchTransformerDecoder
from torch.nn import TransformerDecoderLayer as _TorchTransformerDecoderLayer
from torch.nn import TransformerEncoder as _TorchTransformerEncoder
from torch.nn import TransformerEncoderLayer as _TorchTransformerEncoderLayer
from torch.nn.functional import relu

from pyseqnet.nn._attention_masks import agreed_masks
from pyseqnet.nn._transformer_parts import (
    MEMORY_LAYERS,
    PARTS,
    Activation,
    finds_causal_mask,
    normalised,
    one_or_list,
    states_of,
    take_over,
)
from pyseqnet.nn.cache import DecodingState
from pyseqnet.nn.transformer_layers import TransformerDecoderLayer, TransformerEncoderLayer


class TransformerEncoder(_TorchTransformerEncoder):
    """Drop-in for `torch.nn.TransformerEncoder`: `num_layers` copies of `encoder_layer`, then `norm`.

    ``enable_nested_tensor`` and ``mask_check`` are kept as attributes; there is no path that they would choose.
    `encoder_layer` may be a list of layers, which are used as they are; `num_layers` is then their number, or
    None.

    ``return_layers=True`` returns ``(output, layers)``, the second a list of what each layer gave, the last of them
    normalised: what a decoder with ``memory_layers`` reads.

    ``state``: causal decoding, as a language model does it; ``src`` holds the new positions only.
    """

    def __init__(
        self,
        encoder_layer: Any,
        num_layers: int | None,
        norm: torch.nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        layer, count, layers = one_or_list(encoder_layer, num_layers, "encoder layer")
        if layers is None and isinstance(getattr(layer, "self_attn", None), _TorchMultiheadAttention):
            super().__init__(layer, count, norm, enable_nested_tensor, mask_check)
            return
        # torch's constructor looks into the layer for what its nested tensors need; other layers need not have it.
        torch.nn.Module.__init__(self)
        self.layers = torch.nn.ModuleList([copy.deepcopy(layer) for _ in range(count)] if layers is None else layers)
        self.num_layers = len(self.layers)
        self.norm = norm
        self.enable_nested_tensor, self.use_nested_tensor, self.mask_check = enable_nested_tensor, False, mask_check

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        state: DecodingState | None = None,
        return_layers: bool = False,
    ) -> Any:
        padding, mask = agreed_masks(src_key_padding_mask, mask, "src_key_padding_mask", "mask", src.dtype)
        batch_first = self.layers[0].self_attn.batch_first
        length = src.shape[1 if src.dim() == 3 and batch_first else 0]
        causal = finds_causal_mask(mask, is_causal, length)
        output, outputs = src, []
        for layer, own in zip(self.layers, states_of(self, state), strict=True):
            options = {} if own is None else {"state": own}
            output = layer(output, src_mask=mask, is_causal=causal, src_key_padding_mask=padding, **options)
            outputs.append(output)
        if self.norm is not None:
            output = outputs[-1] = normalised(self.norm, output, None if state else padding, batch_first)
        return (output, outputs) if return_layers else output

    def new_state(self, capacity: int | None = None, batch_size: int | None = None) -> DecodingState:
        """An empty state for decoding. Memory grows as it must; with ``capacity`` and ``batch_size`` it is allocated
        here, once."""
        return DecodingState([layer.new_state(capacity, batch_size) for layer in self.layers])


class TransformerDecoder(_TorchTransformerDecoder):
    """Drop-in for `torch.nn.TransformerDecoder`: `num_layers` copies of `decoder_layer`, then `norm`.

    `decoder_layer` may be a list of layers, which are used as they are; `num_layers` is then their number, or
    None.

    Beyond torch's arguments:

    Args:
        memory_layers: where `memory` is a list of an encoder's layers (``encoder(..., return_layers=True)[1]``), which
            of them the decoder's layer number l reads: "last" (as torch), "same" (number l; where the numbers of layers
            differ, the one at the same share of the depth), "reverse" (counted from the last), or "adaptive" (a learned
            mean of all, ``memory_mix`` (decoder layers, encoder layers) through softmax).
        num_memory_layers: how many there are; needed by "adaptive".

    ``state`` decodes token by token: ``tgt`` holds the new positions only, ``memory`` is projected once, and masks of
    the target are not needed.

    >>> layer = TransformerDecoderLayer(8, 2, 16, batch_first=True)
    >>> decoder = TransformerDecoder(layer, 2).eval()
    >>> memory, state = torch.zeros(1, 3, 8), decoder.new_state()
    >>> with torch.no_grad():
    ...     for _ in range(4):
    ...         output = decoder(torch.zeros(1, 1, 8), memory, state=state)
    >>> state.length
    4
    """

    memory_layers = "last"  # of a converted decoder
    memory_mix: torch.nn.Parameter | None

    def __init__(
        self,
        decoder_layer: Any,
        num_layers: int | None,
        norm: torch.nn.Module | None = None,
        *,
        memory_layers: str = "last",
        num_memory_layers: int | None = None,
    ) -> None:
        layer, count, layers = one_or_list(decoder_layer, num_layers, "decoder layer")
        super().__init__(layer, count, norm)
        if layers is not None:
            self.layers = torch.nn.ModuleList(layers)
            self.num_layers = len(layers)
        self.set_memory_layers(memory_layers, num_memory_layers)

    def set_memory_layers(self, memory_layers: str, num_memory_layers: int | None = None) -> None:
        """Which of the encoder's layers each layer reads from now on; "adaptive" starts with the mean of all."""
        if memory_layers not in MEMORY_LAYERS:
            raise ValueError(f"memory_layers must be one of {', '.join(MEMORY_LAYERS)}; got {memory_layers!r}")
        if memory_layers == "adaptive":
            if num_memory_layers is None or num_memory_layers <= 0:
                raise ValueError("memory_layers='adaptive' needs num_memory_layers, the number of encoder layers")
            like = next(self.layers.parameters())
            mix = torch.zeros(self.num_layers, num_memory_layers, device=like.device, dtype=like.dtype)
            self.memory_mix = torch.nn.Parameter(mix)
        self.memory_layers = memory_layers

    def _memories(self, memory: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """What each layer reads."""
        count = len(self.layers)
        if isinstance(memory, Tensor):
            if self.memory_layers != "last":
                raise ValueError(
                    f"memory_layers={self.memory_layers!r} needs a list of the encoder's layers as memory: "
                    "encoder(..., return_layers=True)[1]"
                )
            return [memory] * count
        given = list(memory)
        if not given:
            raise ValueError("memory must not be an empty list")
        if self.memory_layers == "last":
            return [given[-1]] * count
        if self.memory_layers == "adaptive":
            assert self.memory_mix is not None
            if len(given) != self.memory_mix.shape[1]:
                raise ValueError(f"memory must be {self.memory_mix.shape[1]} layers; got {len(given)}")
            shares = self.memory_mix.softmax(1)
            return list(torch.einsum("de,e...->d...", shares, torch.stack(given)).unbind())
        # The same share of the depth: of 6 layers that 3 read, numbers 2, 4 and 6.
        same = [given[(layer + 1) * len(given) // count - 1 if len(given) >= count else layer * len(given) // count]
                for layer in range(count)]  # fmt: skip
        return same if self.memory_layers == "same" else same[::-1]

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor | Sequence[Tensor],
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        state: DecodingState | None = None,
    ) -> Tensor:
        batch_first = self.layers[0].self_attn.batch_first
        length = tgt.shape[1 if tgt.dim() == 3 and batch_first else 0]
        causal = finds_causal_mask(tgt_mask, tgt_is_causal, length)
        output = tgt
        for layer, source, own in zip(self.layers, self._memories(memory), states_of(self, state), strict=True):
            options = {} if own is None else {"state": own}
            output = layer(
                output,
                source,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=causal,
                memory_is_causal=memory_is_causal,
                **options,
            )
        if self.norm is None:
            return output
        return normalised(self.norm, output, None if state else tgt_key_padding_mask, batch_first)

    def new_state(self, capacity: int | None = None, batch_size: int | None = None) -> DecodingState:
        """An empty state for decoding. Memory grows as it must; with ``capacity`` and ``batch_size`` it is allocated
        here, once. The encoder's output is projected in the first step and kept: one state belongs to one source."""
        return DecodingState([layer.new_state(capacity, batch_size) for layer in self.layers])


class Transformer(_TorchTransformer):
    """Drop-in for `torch.nn.Transformer`: encoder and decoder, each with a final normalisation.

    A `custom_encoder` or `custom_decoder` is used as it is. ``memory_layers`` (by keyword): which of the encoder's
    layers each of the decoder's reads, as in `TransformerDecoder`; "last" is torch's.

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
        *,
        memory_layers: str = "last",
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
            take_over(self.encoder, _OURS)
        if custom_decoder is None:
            take_over(self.decoder, _OURS)
        if memory_layers != "last":
            if custom_encoder is not None or custom_decoder is not None:
                raise ValueError("memory_layers belongs to a custom_decoder itself: give it there")
            self.decoder.set_memory_layers(memory_layers, num_encoder_layers)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        if getattr(self.decoder, "memory_layers", "last") == "last":
            return super().forward(
                src,
                tgt,
                src_mask,
                tgt_mask,
                memory_mask,
                src_key_padding_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                src_is_causal,
                tgt_is_causal,
                memory_is_causal,
            )
        memory = self.encoder(
            src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal, return_layers=True
        )[1]
        output: Tensor = self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )
        return output


_OURS: dict[type, type] = {
    **PARTS,
    _TorchTransformerEncoderLayer: TransformerEncoderLayer,
    _TorchTransformerDecoderLayer: TransformerDecoderLayer,
    _TorchTransformerEncoder: TransformerEncoder,
    _TorchTransformerDecoder: TransformerDecoder,
}
