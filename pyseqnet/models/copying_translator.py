"""The recurrent encoder-decoder that can copy words of its source which its vocabulary does not have."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyseqnet import nn
from pyseqnet.decoding import Generated
from pyseqnet.models.recurrent_translator import RecurrentState, RecurrentTranslator


class CopyingState(NamedTuple):
    """What the decoder knows of R rows, and what they may copy."""

    inner: RecurrentState
    places: Tensor  # (R, S) extended numbers of the source's words
    extra: int


class CopyingTranslator(RecurrentTranslator):
    """`RecurrentTranslator` with additive attention and the output of a pointer-generator (See et al., 2017).

    An *extended number* is a target symbol, or, from ``target_symbols`` on, one of the words that only this source has.

    Args:
        other: the target symbol that the decoder reads in place of a word that it copied.
        **options: as of `RecurrentTranslator`, without ``attention``.

    Shapes: source (B, S), int64; ``places`` (B, S): the source's words by extended number; target (B, T) by extended
    number. ``forward`` gives log-probabilities (B, T, target_symbols + extra).

    >>> model = CopyingTranslator(50, 14, other=3).eval()
    >>> source, places = torch.tensor([[5, 6, 7]]), torch.tensor([[9, 14, 15]])
    >>> model(source, places, torch.tensor([[1, 14]]), extra=2).shape
    torch.Size([1, 2, 16])
    >>> model.search_with_copies(source, places, 6, extra=2).tokens.shape[:2]
    torch.Size([1, 1])

    Papers: Gu et al., 2016; See, Liu, Manning, 2017.
    """

    def __init__(self, source_symbols: int, target_symbols: int, *, other: int, **options: Any) -> None:
        super().__init__(source_symbols, target_symbols, attention="additive", **options)
        self.other = other
        hidden = self.head.in_features
        self.head: Any = nn.PointerGenerator(hidden, target_symbols)

    def known(self, target: Tensor) -> Tensor:
        """The target as its embedding knows it: copied words are `other`."""
        return target.masked_fill(target >= self.target_embedding.num_embeddings, self.other)

    def start_with(self, source: Tensor, places: Tensor, extra: int) -> CopyingState:
        return CopyingState(self.start(source), places, extra)

    def forward(self, source: Tensor, places: Tensor, target: Tensor, extra: int = 0) -> Tensor:  # type: ignore[override]
        joined, weights, _ = self.write(self.known(target), self.start(source))
        log_probs: Tensor = self.head(joined, weights, places, extra)
        return log_probs

    def loss(self, source: Tensor, places: Tensor, target: Tensor) -> Tensor:
        """Mean of -log P of the target, teacher forced; a word that nobody has counts as `other`."""
        joined, weights, _ = self.write(self.known(target[:, :-1]), self.start(source))
        found: Tensor = self.head.loss(
            joined, weights, places, target[:, 1:], ignore_index=self.padding, unknown=self.other
        )
        return found

    def step(self, tokens: Tensor, state: CopyingState) -> tuple[Tensor, CopyingState]:  # type: ignore[override]
        joined, weights, inner = self.write(self.known(tokens).unsqueeze(1), state.inner)
        log_probs = self.head(joined, weights, state.places, state.extra)
        return log_probs[:, 0], state._replace(inner=inner)

    def reorder(self, state: CopyingState, index: Tensor) -> CopyingState:  # type: ignore[override]
        return CopyingState(super().reorder(state.inner, index), state.places.index_select(0, index), state.extra)

    def alignment(self, state: CopyingState) -> Tensor | None:  # type: ignore[override]
        return state.inner.weights

    @torch.no_grad()
    def search_with_copies(
        self, source: Tensor, places: Tensor, max_length: int, *, extra: int, **options: Any
    ) -> Generated:
        """What the model writes, by extended number; options as of `pyseqnet.decoding.generate`."""
        return self.generate_from(self.start_with(source, places, extra), source, max_length, **options)
