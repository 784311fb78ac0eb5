"""The word tagger: a tag for each word, from the word, its letters and its neighbours, with or without a CRF."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyseqnet import nn

READERS = ("lstm", "elman", "jordan", "none")


class WordTagger(torch.nn.Module):
    """Tells the tag of each word of a sentence (Huang, Xu, Yu, 2015).

    A word is its embedding and, with `trigrams`, the mean embedding of its letter trigrams, by which words that were
    never seen are told by their endings. A bidirectional reader goes over the sentence; a linear layer scores the tags;
    a CRF, if asked for, scores which tag follows which.

    Args:
        words, tags: how many there are; word 0 is padding.
        trigrams: how many there are, 0 for none; trigram 0 is padding.
        reader: "lstm", "elman", "jordan", or "none": each word for itself, the baseline.
        crf: a `pyseqnet.nn.CRF` on top.
        embedding_size, hidden_size, dropout: of the layers.

    Shapes: words (B, T), trigrams (B, T, K) or None, lengths (B,) int64 on the CPU; scores (B, T, tags).

    >>> model = WordTagger(100, 7)
    >>> words, lengths = torch.randint(1, 100, (2, 5)), torch.tensor([5, 3])
    >>> model.loss(words, lengths, torch.zeros(2, 5, dtype=torch.int64)).shape
    torch.Size([])
    >>> [len(tags) for tags in model.decode(words, lengths)]
    [5, 3]
    """

    def __init__(
        self,
        words: int,
        tags: int,
        *,
        trigrams: int = 0,
        reader: str = "lstm",
        crf: bool = True,
        embedding_size: int = 64,
        hidden_size: int = 96,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        if reader not in READERS:
            raise ValueError(f"reader must be one of {', '.join(READERS)}; got {reader!r}")
        self.words = torch.nn.Embedding(words, embedding_size, padding_idx=0)
        self.trigrams = (
            torch.nn.EmbeddingBag(trigrams, embedding_size, mode="mean", padding_idx=0) if trigrams else None
        )
        self.dropout = torch.nn.Dropout(dropout)
        size = embedding_size * (2 if trigrams else 1)
        options: dict[str, Any] = {"batch_first": True, "bidirectional": True}
        self.reader: Any = None
        if reader == "lstm":
            self.reader = nn.LSTM(size, hidden_size, **options)
        elif reader == "elman":
            self.reader = nn.RNN(size, hidden_size, **options)
        elif reader == "jordan":
            self.reader = nn.JordanRNN(size, hidden_size, hidden_size, output_nonlinearity="tanh", **options)
        self.hidden = torch.nn.Linear(size, 2 * hidden_size) if self.reader is None else None
        self.head = torch.nn.Linear(2 * hidden_size, tags)
        self.crf = nn.CRF(tags, batch_first=True) if crf else None

    def forward(self, words: Tensor, lengths: Tensor, trigrams: Tensor | None = None) -> Tensor:
        embedded = self.words(words)
        if self.trigrams is not None:
            if trigrams is None:
                raise ValueError("this tagger reads the trigrams of the words, too")
            letters = self.trigrams(trigrams.flatten(0, 1)).view(*words.shape, -1)
            embedded = torch.cat([embedded, letters], 2)
        embedded = self.dropout(embedded)
        if self.hidden is not None:
            states = self.hidden(embedded).relu()
        else:
            states, _ = self.reader(embedded, lengths=lengths)
        scores: Tensor = self.head(self.dropout(states))
        return scores

    def loss(self, words: Tensor, lengths: Tensor, tags: Tensor, trigrams: Tensor | None = None) -> Tensor:
        """Negative log-likelihood of tags (B, T), a word; what lies behind the lengths does not count."""
        scores, mask = self(words, lengths, trigrams), _mask(words, lengths)
        if self.crf is not None:
            likelihood: Tensor = self.crf(scores, tags, mask, reduction="token_mean")
            return -likelihood
        return torch.nn.functional.cross_entropy(scores[mask], tags[mask])

    @torch.no_grad()
    def decode(self, words: Tensor, lengths: Tensor, trigrams: Tensor | None = None) -> list[list[int]]:
        """The best tags of each sentence: of all together with a CRF, else of each word."""
        scores = self(words, lengths, trigrams)
        if self.crf is not None:
            best: list[list[int]] = self.crf.decode(scores, _mask(words, lengths))
            return best
        rows = scores.argmax(2).tolist()
        return [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]


def _mask(words: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(words.shape[1], device=words.device) < lengths.to(words.device).unsqueeze(1)
