"""Language models: the probability of the next symbol, from those before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyseqnet import nn
from pyseqnet.decoding import RecurrentStepper, TransformerStepper

SIZES: dict[str, dict[str, int]] = {"lstm": {"size": 256, "layers": 1}, "transformer": {"size": 128, "layers": 4}}


class LanguageModel(torch.nn.Module):
    """Scores each next symbol of a text: an LSTM, or a causal Transformer that normalises before each block.

    Args:
        symbols: how many there are.
        kind: "lstm" or "transformer".
        size, layers: by default of the kind (`SIZES`).
        nhead, norm_first, dropout: of the Transformer; the LSTM has the dropout before its head.

    Shapes: text (B, T) int64; output (B, T, symbols), scores of the symbol behind each.

    >>> model = LanguageModel(10, kind="lstm", size=16)
    >>> model(torch.zeros(2, 5, dtype=torch.int64)).shape
    torch.Size([2, 5, 10])
    """

    def __init__(
        self,
        symbols: int,
        *,
        kind: str = "lstm",
        size: int | None = None,
        layers: int | None = None,
        nhead: int = 4,
        norm_first: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if kind not in SIZES:
            raise ValueError(f"kind must be one of {', '.join(SIZES)}; got {kind!r}")
        size = SIZES[kind]["size"] if size is None else size
        layers = SIZES[kind]["layers"] if layers is None else layers
        self.kind = kind
        self.embedding = torch.nn.Embedding(symbols, size)
        self.dropout = torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(size, symbols)
        self.body: Any
        if kind == "lstm":
            self.body = nn.LSTM(size, size, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
            return
        self.positions = nn.SinusoidalPositions(size, dropout=dropout, batch_first=True)
        layer = nn.TransformerEncoderLayer(size, nhead, 4 * size, dropout, batch_first=True, norm_first=norm_first)
        last = nn.LayerNorm(size) if norm_first else None
        self.body = nn.TransformerEncoder(layer, layers, last, enable_nested_tensor=False)

    def _embed(self, text: Tensor, position: int = 0) -> Tensor:
        embedded: Tensor = self.embedding(text)
        return embedded if self.kind == "lstm" else self.positions(embedded, offset=position)

    def _score(self, states: Tensor) -> Tensor:
        scores: Tensor = self.head(self.dropout(states))
        return scores

    def forward(self, text: Tensor) -> Tensor:
        embedded = self._embed(text)
        if self.kind == "lstm":
            return self._score(self.body(embedded)[0])
        future = torch.ones(text.shape[1], text.shape[1], dtype=torch.bool, device=text.device).triu(1)
        return self._score(self.body(embedded, mask=future, is_causal=True))

    def loss(self, text: Tensor) -> Tensor:
        """Mean cross-entropy, nats a symbol, of all but the first symbol of each text (B, T)."""
        scores = self(text[:, :-1])
        return torch.nn.functional.cross_entropy(scores.flatten(0, 1), text[:, 1:].flatten())

    def stepper(self) -> RecurrentStepper | TransformerStepper:
        """For `pyseqnet.decoding.generate`; the state is ``stepper.start()``."""
        if self.kind == "lstm":
            return RecurrentStepper(self._embed, self.body, self._score)
        return TransformerStepper(self.body, self._embed, self._score)
