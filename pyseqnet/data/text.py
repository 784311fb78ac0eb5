"""Text as numbers: vocabularies with an entry for other words, padding, hashed letter trigrams."""

from __future__ import annotations

import collections
import re
from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

PADDING, OTHER = 0, 1
WORDS = re.compile(r"[\w']+|[^\w\s]")


def words(text: str) -> list[str]:
    """Words and punctuation marks, in lower case."""
    return WORDS.findall(text.lower())


class Vocabulary:
    """Numbers for the entries that occur at least ``least`` times in ``sequences``, the most frequent first.

    0 is padding, 1 stands for everything else ("other": one more dimension, not the zero vector), then come ``special``
    entries, then the others in the order of their frequency, equals in the order of their first occurrence.
    """

    def __init__(
        self,
        sequences: Iterable[Iterable[Hashable]],
        *,
        least: int = 1,
        special: Sequence[str] = (),
        most: int | None = None,
    ) -> None:
        counts = collections.Counter(entry for sequence in sequences for entry in sequence)
        known = [entry for entry, count in counts.most_common(most) if count >= least]
        self.entries: list[Hashable] = ["<padding>", "<other>", *special, *known]
        self._numbers = {entry: number for number, entry in enumerate(self.entries) if number > OTHER}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, entry: Hashable) -> int:
        return self._numbers.get(entry, OTHER)

    def encode(self, sequence: Iterable[Hashable]) -> Tensor:
        """The numbers of a sequence, (T,) int64."""
        return torch.tensor([self[entry] for entry in sequence], dtype=torch.int64)

    def decode(self, numbers: Iterable[int]) -> list[Hashable]:
        return [self.entries[number] for number in numbers]


def padded(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences (T_i, ...) side by side: (B, max T, ...) filled up with `PADDING`, and their lengths (B,) int64."""
    lengths = torch.tensor([len(one) for one in sequences])
    return torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=PADDING), lengths


def trigrams(word: str) -> list[str]:
    """The letter trigrams of a word with its borders: "apple" gives #ap app ppl ple le# (Huang et al., 2013)."""
    marked = f"#{word}#"
    return [marked[i : i + 3] for i in range(max(1, len(marked) - 2))]
