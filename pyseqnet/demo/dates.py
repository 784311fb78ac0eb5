"""Dates as people of sixteen locales write them (Unicode's CLDR, through Babel), and the same in ISO 8601."""

from __future__ import annotations

import datetime
import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

LOCALES = (
    "cs_CZ", "de_DE", "el_GR", "en_US", "es_ES", "fi_FI", "fr_FR", "hu_HU", "it_IT", "ja_JP", "nl_NL", "pl_PL",
    "pt_BR", "ru_RU", "sv_SE", "tr_TR",
)  # fmt: skip
FORMATS = ("full", "long", "medium")  # "short" has years of two digits, and months before days or behind them
FIRST_DAY, LAST_DAY = datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)
TRAINING_DATES, TEST_DATES = 40_000, 2_000
PADDING, BEGIN, END = 0, 1, 2
SPECIAL = 3
ISO_CHARACTERS = "0123456789-"
TARGET_SYMBOLS = SPECIAL + len(ISO_CHARACTERS)
TARGET_LENGTH = len("2026-11-22") + 2  # BEGIN and END


@dataclass(frozen=True)
class Dates:
    """Texts and their ISO forms; source (N, S) and target (N, 12) hold their symbols, padded with 0."""

    texts: list[str]
    locales: list[str]
    iso: list[str]
    source: Tensor
    target: Tensor


@dataclass(frozen=True)
class Corpus:
    characters: str  # of the training texts; symbol SPECIAL + i is the i-th, and the last symbol any other
    training: Dates
    test: Dates

    @property
    def source_symbols(self) -> int:
        return SPECIAL + len(self.characters) + 1


def _drawn(days: list[datetime.date], count: int, chance: random.Random) -> list[tuple[str, str, str]]:
    """`count` different (text, locale, ISO form) of these days."""
    from babel.dates import format_date

    found: dict[str, tuple[str, str, str]] = {}
    while len(found) < count:
        day, locale = chance.choice(days), chance.choice(LOCALES)
        text = format_date(day, format=chance.choice(FORMATS), locale=locale)
        before = found.setdefault(text, (text, locale, day.isoformat()))
        if before[2] != day.isoformat():
            raise RuntimeError(f"{text!r} is both {before[2]} and {day.isoformat()}")
    return list(found.values())


def _symbols(texts: list[str], characters: str) -> Tensor:
    numbers = {character: SPECIAL + i for i, character in enumerate(characters)}
    unknown = SPECIAL + len(characters)
    table = torch.full((len(texts), max(map(len, texts))), PADDING)
    for row, text in zip(table, texts, strict=True):
        row[: len(text)] = torch.tensor([numbers.get(character, unknown) for character in text])
    return table


def _dates(drawn: list[tuple[str, str, str]], characters: str) -> Dates:
    texts, locales, iso = (list(column) for column in zip(*drawn, strict=True))
    edge = torch.ones(len(iso), 1, dtype=torch.int64)
    target = torch.cat([edge * BEGIN, _symbols(iso, ISO_CHARACTERS), edge * END], 1)
    return Dates(texts, locales, iso, _symbols(texts, characters), target)


def load(seed: int, share: float = 1.0) -> Corpus:
    """TRAINING_DATES and TEST_DATES texts, times `share`. No day of the test is in the training, in whatever locale."""
    chance = random.Random(seed)
    days = [FIRST_DAY + datetime.timedelta(i) for i in range((LAST_DAY - FIRST_DAY).days + 1)]
    chance.shuffle(days)
    held_out = len(days) // 10
    for_test = _drawn(days[:held_out], math.ceil(share * TEST_DATES), chance)
    for_training = _drawn(days[held_out:], math.ceil(share * TRAINING_DATES), chance)
    characters = "".join(sorted(set().union(*(text for text, _, _ in for_training))))
    return Corpus(characters, _dates(for_training, characters), _dates(for_test, characters))


def read(target: Tensor) -> list[str]:
    """Symbols (N, T) as texts, up to END; what is no character of a date shows as a question mark."""
    texts = []
    for row in target.tolist():
        symbols = row[: row.index(END)] if END in row else row
        texts.append("".join(ISO_CHARACTERS[s - SPECIAL] if s >= SPECIAL else "?" for s in symbols))
    return texts
