"""Python source and what each of its characters is, from the interpreter's own standard library through `tokenize`."""

from __future__ import annotations

import io
import keyword
import random
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

KINDS = ("space", "keyword", "name", "number", "string", "comment", "operator")
SYMBOLS = 129  # ASCII, and one for every other character
WINDOW = 200  # characters
TRAINING_CHARACTERS, TEST_CHARACTERS = 1_500_000, 200_000
LARGEST_FILE = 50_000  # characters: tables and generated files are not what people write
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "turtledemo", "encodings"}


@dataclass(frozen=True)
class Source:
    """One text: its characters, and of each its number (N,) and kind (N,), int64."""

    name: str
    text: str
    symbols: Tensor
    kinds: Tensor


def _kind_of(token: tokenize.TokenInfo) -> int:
    """Position in KINDS; 0 for what has no characters of its own."""
    if token.type == tokenize.NAME:
        return 1 if keyword.iskeyword(token.string) else 2
    named = tokenize.tok_name[token.type]  # Python 3.12 cuts f-strings into FSTRING_START, _MIDDLE and _END
    if "STRING" in named:
        return 4
    return {tokenize.NUMBER: 3, tokenize.COMMENT: 5, tokenize.OP: 6}.get(token.type, 0)


def read(name: str, text: str) -> Source:
    """Tags every character; raises what `tokenize` raises for text that is not Python."""
    kinds = bytearray(len(text))
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = _kind_of(token)
        if kind:
            first = starts[token.start[0] - 1] + token.start[1]
            last = starts[token.end[0] - 1] + token.end[1]
            kinds[first:last] = bytes([kind]) * (last - first)
    for i, character in enumerate(text):
        if not kinds[i] and not character.isspace():  # a line continued, or a doubled brace in an f-string
            kinds[i] = 6 if character == "\\" else 4
    symbols = [min(ord(character), SYMBOLS - 1) for character in text]
    return Source(name, text, torch.tensor(symbols), torch.tensor(list(kinds)))


def _files(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*.py") if not LEFT_OUT & set(path.relative_to(folder).parts[:-1])]
    return sorted(found)


def load(seed: int, share: float = 1.0) -> tuple[list[Source], list[Source]]:
    """Training and test files, TRAINING_CHARACTERS and TEST_CHARACTERS times `share` long; no file is in both."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = _files(folder)
    random.Random(seed).shuffle(paths)
    parts: tuple[list[Source], list[Source]] = ([], [])
    wanted = [share * TRAINING_CHARACTERS, share * TEST_CHARACTERS]
    for path in paths:
        part = 0 if wanted[1] <= 0 else 1  # the test's come first: they are the same whatever is trained on
        if wanted[part] <= 0:
            break
        try:
            text = path.read_text(encoding="utf-8")
            if WINDOW < len(text) <= LARGEST_FILE:
                parts[part].append(read(path.relative_to(folder).as_posix(), text))
                wanted[part] -= len(text)
        except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):  # kept by the library as bad examples
            continue
    if not parts[0]:
        raise RuntimeError(f"the standard library in {folder} holds too little source code to learn from")
    return parts


def windows(sources: list[Source]) -> tuple[Tensor, Tensor]:
    """Every window of the sources, one after the other, as views: symbols and kinds, each (N, WINDOW)."""
    symbols = torch.cat([source.symbols for source in sources])
    kinds = torch.cat([source.kinds for source in sources])
    return symbols.unfold(0, WINDOW, 1), kinds.unfold(0, WINDOW, 1)
