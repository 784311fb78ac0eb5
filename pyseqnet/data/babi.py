"""bAbI: twenty kinds of questions about short stories (Weston et al.: Towards AI-complete question answering, 2015)."""

from __future__ import annotations

import re
import tarfile
from dataclasses import dataclass

from pyseqnet.data import find
from pyseqnet.data.text import words

ORIGIN = "the bAbI tasks v1.2, English, 1000 questions a task, as en.tar.gz"


@dataclass(frozen=True)
class Question:
    """The sentences told so far, oldest first, the question, the one-word (or comma-separated) answer."""

    story: tuple[tuple[str, ...], ...]
    question: tuple[str, ...]
    answer: str


def _read(text: str) -> list[Question]:
    found: list[Question] = []
    story: list[tuple[str, ...]] = []
    for line in text.splitlines():
        number, rest = line.split(" ", 1)
        if number == "1":
            story = []
        if "\t" in rest:
            question, answer, _ = rest.split("\t")
            found.append(Question(tuple(story), tuple(words(question)), answer))
        else:
            story.append(tuple(words(rest)))
    return found


def task(number: int) -> tuple[list[Question], list[Question]]:
    """The training and the test questions of task ``number``, 1 to 20."""
    if not 1 <= number <= 20:
        raise ValueError(f"bAbI has tasks 1 to 20, not {number}")
    parts: dict[str, list[Question]] = {}
    with tarfile.open(find("babi/en.tar.gz", origin=ORIGIN)) as archive:
        for member in archive.getmembers():
            named = re.fullmatch(rf"en/qa{number}_.*_(train|test)\.txt", member.name)
            file = archive.extractfile(member) if named else None
            if named and file is not None:
                parts[named[1]] = _read(file.read().decode())
    return parts["train"], parts["test"]
