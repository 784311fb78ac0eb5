"""Which tag may follow which, from the names of tags: BIO, BIOUL, BMES.

Ramshaw, Marcus: Text chunking using transformation-based learning, 1995 (BIO).
Ratinov, Roth: Design challenges and misconceptions in named entity recognition, 2009 (BIOUL, also called BILOU).
Xue: Chinese word segmentation as character tagging, 2003 (BMES).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AllowedTransitions(NamedTuple):
    """Booleans: start ``(C,)``, end ``(C,)`` and, for tag j after tag i, transitions ``(C, C)`` at ``[i, j]``."""

    start: Tensor
    end: Tensor
    transitions: Tensor


# Positions of a tag in its chunk, as (may open a chunk, may close it).
_SCHEMES = {
    "BIO": {"B": (True, True), "I": (False, True), "O": (True, True)},
    "BIOUL": {"B": (True, False), "I": (False, False), "L": (False, True), "U": (True, True), "O": (True, True)},
    "BMES": {"B": (True, False), "M": (False, False), "E": (False, True), "S": (True, True), "O": (True, True)},
}


def allowed_transitions(tags: Sequence[str], scheme: str) -> AllowedTransitions:
    """The transitions that give well-formed chunks.

    Args:
        tags: names by index: ``"B-PER"``, ``"I-PER"``, ``"O"``; BMES also without types, ``"B"``, ``"M"``.
        scheme: ``"BIO"`` (each chunk begins with B), ``"BIOUL"`` (begin, inside, last; unit alone) or ``"BMES"``
            (begin, middle, end; single alone). ``"O"`` is outside of chunks in all of them.

    Raises:
        ValueError for another scheme, a name that is not of it, or a name that occurs twice.

    >>> allowed_transitions(["O", "B-X", "I-X"], "BIO").transitions.tolist()
    [[True, True, False], [True, True, True], [True, True, True]]
    """
    if scheme not in _SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(_SCHEMES)}; got {scheme!r}")
    positions = _SCHEMES[scheme]
    if len(set(tags)) != len(tags) or not tags:
        raise ValueError(f"tags must be different names, at least one; got {list(tags)}")
    parts = [tuple(tag.split("-", 1)) if "-" in tag else (tag, "") for tag in tags]
    for tag, (position, _) in zip(tags, parts, strict=True):
        if position not in positions or (position == "O" and "-" in tag) or (position != "O" and tag.endswith("-")):
            raise ValueError(f"{tag!r} is no tag of {scheme}: expected {', '.join(positions)}, as in 'B-PER' or 'O'")
    opens = [positions[position][0] for position, _ in parts]
    closes = [positions[position][1] for position, _ in parts]

    def may_follow(i: int, j: int) -> bool:
        if opens[j]:
            return closes[i]
        # j goes on with a chunk: of i's type, and not closed by i; in BIO what has begun may always go on.
        still_open = parts[i][0] != "O" if scheme == "BIO" else not closes[i]
        return still_open and parts[i][1] == parts[j][1]

    count = range(len(tags))
    return AllowedTransitions(
        torch.tensor(opens), torch.tensor(closes), torch.tensor([[may_follow(i, j) for j in count] for i in count])
    )
