"""The error rate of label sequences: edits over the length of the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def edits(found: Sequence[Any], truth: Sequence[Any]) -> int:
    """The fewest insertions, deletions and substitutions that make one of the other (Levenshtein, 1966).

    >>> edits("kitten", "sitting")
    3
    """
    row = list(range(len(truth) + 1))
    for i, one in enumerate(found, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(truth, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (one != other))
    return row[-1]


def error_rate(found: Sequence[Sequence[Any]], truth: Sequence[Sequence[Any]]) -> float:
    """All edits over all labels of the truth: 0.05 is five errors in a hundred labels; it may exceed 1."""
    total = sum(len(one) for one in truth)
    if not total:
        raise ValueError("truth holds no label")
    return sum(edits(a, b) for a, b in zip(found, truth, strict=True)) / total
