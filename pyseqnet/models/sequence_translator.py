"""The encoder-decoder Transformer: reads one sequence, writes another, one symbol at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyseqnet import nn
from pyseqnet.decoding import Generated, TransformerStepper, generate


class SequenceTranslator(torch.nn.Module):
    """Writes the sequence that belongs to another one (Vaswani et al., 2017), normalised before each block.

    The encoder reads the whole source at once. The decoder sees the source through cross-attention, and of the target
    what it has written so far. Three symbols are special: `padding` fills source and target on the right, `begin`
    starts a target, `end` closes it.

    Shapes: source (B, S) and target (B, T), int64; output (B, T, target_symbols), the scores of the symbol *behind*
    each of the target's. To train, give ``target[:, :-1]`` and compare with ``target[:, 1:]`` (teacher forcing).

    >>> model = SequenceTranslator(source_symbols=50, target_symbols=14)
    >>> source = torch.tensor([[5, 6, 7], [8, 9, 0]])  # the second is padded
    >>> model(source, torch.tensor([[1, 4], [1, 3]])).shape
    torch.Size([2, 2, 14])
    >>> model.eval().generate(source, max_len=6).shape[0]
    2
    """

    def __init__(
        self,
        source_symbols: int,
        target_symbols: int,
        *,
        d_model: int = 64,
        nhead: int = 4,
        num_encoder_layers: int = 2,
        num_decoder_layers: int = 2,
        dim_feedforward: int = 256,
        dropout: float = 0.0,
        padding: int = 0,
        begin: int = 1,
        end: int = 2,
    ) -> None:
        super().__init__()
        special = (padding, begin, end)
        if len(set(special)) != 3 or not all(0 <= symbol < target_symbols for symbol in special):
            raise ValueError(f"padding, begin and end must be three of the {target_symbols} symbols; got {special}")
        self.padding, self.begin, self.end = special
        self.scale = math.sqrt(d_model)  # brings embeddings of deviation 1 / sqrt(d_model) to that of the positions
        self.source_embedding = torch.nn.Embedding(source_symbols, d_model)
        self.target_embedding = torch.nn.Embedding(target_symbols, d_model)
        for embedding in (self.source_embedding, self.target_embedding):
            torch.nn.init.normal_(embedding.weight, std=1 / self.scale)
        self.positions = nn.SinusoidalPositions(d_model, dropout=dropout, batch_first=True)
        options: dict[str, Any] = {
            "dim_feedforward": dim_feedforward,
            "dropout": dropout,
            "batch_first": True,
            "norm_first": True,
        }
        # The encoder that Transformer would build, without torch's remark on its path for nested tensors.
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(d_model, nhead, **options),
            num_encoder_layers,
            nn.LayerNorm(d_model),
            enable_nested_tensor=False,
        )
        self.transformer = nn.Transformer(
            d_model, nhead, num_decoder_layers=num_decoder_layers, custom_encoder=encoder, **options
        )
        self.head = torch.nn.Linear(d_model, target_symbols)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """The source's memory (B, S, E), and which of it is padding (B, S)."""
        ignored = source == self.padding
        embedded = self.positions(self.source_embedding(source) * self.scale)
        return self.transformer.encoder(embedded, src_key_padding_mask=ignored), ignored

    def decode(self, target: Tensor, memory: Tensor, ignored: Tensor) -> Tensor:
        """Scores (B, T, target_symbols) of the symbol behind each of the target's."""
        embedded = self.positions(self.target_embedding(target) * self.scale)
        # Padding is on the right: what comes before it does not see it anyway.
        written = self.transformer.decoder(
            embedded,
            memory,
            tgt_mask=_future(target),
            tgt_is_causal=True,
            memory_key_padding_mask=ignored,
        )
        scores: Tensor = self.head(written)
        return scores

    def stepper(self, *, alignments: bool = False) -> TransformerStepper:
        """The decoder for `pyseqnet.decoding.generate`; its state is ``stepper.start(*model.encode(source))``."""

        def embed(tokens: Tensor, position: int) -> Tensor:
            embedded: Tensor = self.positions(self.target_embedding(tokens) * self.scale, offset=position)
            return embedded

        return TransformerStepper(self.transformer.decoder, embed, self.head, alignments=alignments)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.decode(target, *self.encode(source))

    @torch.no_grad()
    def generate(self, source: Tensor, max_len: int) -> Tensor:
        """The likeliest symbol at every step: (B, T) with T <= max_len, without `begin`, `padding` behind `end`.

        Rows end each for themselves. For beams, samples and alignments: ``search``.
        """
        return self.search(source, max_len).tokens[:, 0]

    @torch.no_grad()
    def search(self, source: Tensor, max_length: int, *, return_alignments: bool = False, **options: Any) -> Generated:
        """What the model writes, by any method of `pyseqnet.decoding.generate`, whose options these are."""
        stepper = self.stepper(alignments=return_alignments)
        return generate(
            stepper,
            stepper.start(*self.encode(source)),
            begin=source.new_full((source.shape[0],), self.begin),
            end=self.end,
            padding=self.padding,
            max_length=max_length,
            return_alignments=return_alignments,
            **options,
        )

    @torch.no_grad()
    def cross_attention(self, source: Tensor, target: Tensor) -> Tensor:
        """Where the decoder's last layer looks for the symbol behind each of the target's: (B, T, S), mean of heads."""
        seen: list[Tensor] = []
        attention = self.transformer.decoder.layers[-1].multihead_attn

        def look(layer: torch.nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
            query, key, value = arguments
            seen.append(layer.forward(query, key, value, key_padding_mask=options["key_padding_mask"])[1])

        hook = attention.register_forward_pre_hook(look, with_kwargs=True)
        try:
            self(source, target)
        finally:
            hook.remove()
        return seen[0]


def _future(target: Tensor) -> Tensor:
    """True where a position would see a later one."""
    length = target.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
