"""The recurrent encoder-decoder: an LSTM reads, another writes, with or without attention between them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyseqnet import nn
from pyseqnet.decoding import Generated, generate

ATTENTIONS = ("none", "additive", "location")
LOCATION_KERNEL = 15  # places of the source that a filter of location-aware attention spans


class RecurrentState(NamedTuple):
    """What the decoder knows of R rows while it writes."""

    memory: Tensor  # (R, S, E) the encoder's states
    projected: Tensor | None  # (R, S, hidden) the attention's keys, computed once
    lengths: Tensor  # (R,) of the sources
    hidden: tuple[Tensor, Tensor]  # the decoder's LSTM, (layers, R, hidden) each
    location: nn.LocationState | None = None
    weights: Tensor | None = None  # (R, S) of the last step


class RecurrentTranslator(torch.nn.Module):
    """Writes the sequence that belongs to another one, with LSTMs (Sutskever et al., 2014; Bahdanau et al., 2015).

    A bidirectional LSTM reads the source; the decoder, an LSTM too, starts from its last states. With attention, each
    of the decoder's states asks where in the source to look, and what it finds there is joined to it before the output
    (Luong et al., 2015, without input feeding: so all positions are computed at once when the target is known). Without
    attention, the decoder has only what it started from.

    Args:
        source_symbols, target_symbols: how many there are. `padding` fills source and target on the right, `begin`
            starts a target, `end` closes it.
        attention: "none", "additive" (Bahdanau), or "location" (Chorowski: it sees where it looked before).
        embedding_size, hidden_size, layers, dropout: of both LSTMs.

    Shapes: source (B, S) and target (B, T), int64; output (B, T, target_symbols), the scores of the symbol behind each
    of the target's. It is a decoder for `pyseqnet.decoding.generate` itself: ``start``, ``step``, ``reorder``.

    >>> model = RecurrentTranslator(50, 14, attention="additive").eval()
    >>> source = torch.tensor([[5, 6, 7], [8, 9, 0]])  # the second is padded
    >>> model(source, torch.tensor([[1, 4], [1, 3]])).shape
    torch.Size([2, 2, 14])
    >>> model.search(source, 6, beams=3, results=2).tokens.shape[:2]
    torch.Size([2, 2])

    Papers: Sutskever, Vinyals, Le, 2014; Bahdanau, Cho, Bengio, 2015; Luong, Pham, Manning, 2015.
    """

    def __init__(
        self,
        source_symbols: int,
        target_symbols: int,
        *,
        attention: str = "additive",
        embedding_size: int = 64,
        hidden_size: int = 128,
        layers: int = 1,
        dropout: float = 0.0,
        padding: int = 0,
        begin: int = 1,
        end: int = 2,
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}; got {attention!r}")
        self.padding, self.begin, self.end = padding, begin, end
        self.source_embedding = torch.nn.Embedding(source_symbols, embedding_size)
        self.target_embedding = torch.nn.Embedding(target_symbols, embedding_size)
        options: dict[str, Any] = {"batch_first": True, "dropout": dropout if layers > 1 else 0.0}
        self.encoder = nn.LSTM(embedding_size, hidden_size, layers, bidirectional=True, **options)
        self.decoder = nn.LSTM(embedding_size, hidden_size, layers, **options)
        self.bridge = torch.nn.Linear(2 * hidden_size, hidden_size)  # from both directions to the decoder's start
        self.dropout = torch.nn.Dropout(dropout)
        sizes = (hidden_size, 2 * hidden_size, hidden_size)
        self.attention: Any = None
        if attention == "additive":
            self.attention = nn.AdditiveAttention(*sizes)
        elif attention == "location":
            self.attention = nn.LocationAwareAttention(*sizes, kernel_size=LOCATION_KERNEL, cumulative=True)
        self.join = torch.nn.Linear(3 * hidden_size if self.attention is not None else hidden_size, hidden_size)
        self.head = torch.nn.Linear(hidden_size, target_symbols)

    def embed(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder reads of the source (B, S): vectors (B, S, embedding_size), and how many are real, (B,)."""
        return self.source_embedding(source), (source != self.padding).sum(1)

    def start(self, source: Tensor) -> RecurrentState:
        """Reads the source (B, S); the state before the first symbol."""
        embedded, lengths = self.embed(source)
        embedded = self.dropout(embedded)
        memory, (hidden, cell) = self.encoder(embedded, lengths=lengths.clamp(min=1).cpu())
        both = (torch.cat([part[0::2], part[1::2]], 2) for part in (hidden, cell))
        first = tuple(torch.tanh(self.bridge(part)) for part in both)
        projected = None if self.attention is None else self.attention.project_key(memory, lengths)
        return RecurrentState(memory, projected, lengths, (first[0], first[1]))

    def write(self, target: Tensor, state: RecurrentState) -> tuple[Tensor, Tensor | None, RecurrentState]:
        """What the output layer reads (B, T, hidden), where it looked (B, T, S), the state after the target (B, T)."""
        written, hidden = self.decoder(self.dropout(self.target_embedding(target)), state.hidden)
        weights, location = None, state.location
        if self.attention is not None:
            options: dict[str, Any] = {"key_lengths": state.lengths, "projected_key": state.projected}
            if isinstance(self.attention, nn.LocationAwareAttention):
                found, weights, location = self.attention(written, state.memory, state=location, **options)
            else:
                found, weights = self.attention(written, state.memory, **options)
            written = torch.cat([written, found], 2)
        joined = self.dropout(torch.tanh(self.join(written)))
        last = None if weights is None else weights[:, -1]
        return joined, weights, state._replace(hidden=hidden, location=location, weights=last)

    def read(self, target: Tensor, state: RecurrentState) -> tuple[Tensor, Tensor | None, RecurrentState]:
        """Scores (B, T, V) behind each symbol of the target (B, T), where it looked (B, T, S), the state after it."""
        joined, weights, state = self.write(target, state)
        return self.head(joined), weights, state

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.read(target, self.start(source))[0]

    def step(self, tokens: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        scores, _, state = self.read(tokens.unsqueeze(1), state)
        return scores[:, 0], state

    def reorder(self, state: RecurrentState, index: Tensor) -> RecurrentState:
        def rows(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.index_select(0, index)

        hidden, cell = (part.index_select(1, index) for part in state.hidden)
        return RecurrentState(
            state.memory.index_select(0, index),
            rows(state.projected),
            state.lengths.index_select(0, index),
            (hidden, cell),
            None if state.location is None else state.location.reorder(index),
            rows(state.weights),
        )

    def alignment(self, state: RecurrentState) -> Tensor | None:
        return state.weights

    @torch.no_grad()
    def search(self, source: Tensor, max_length: int, **options: Any) -> Generated:
        """What the model writes, by any method of `pyseqnet.decoding.generate`, whose options these are."""
        return self.generate_from(self.start(source), source, max_length, **options)

    def generate_from(self, state: Any, source: Tensor, max_length: int, **options: Any) -> Generated:
        """`search` from a state that is already there."""
        begin = torch.full((source.shape[0],), self.begin, device=source.device)
        common: dict[str, Any] = {"begin": begin, "end": self.end, "padding": self.padding, "max_length": max_length}
        return generate(self, state, **common, **options)
