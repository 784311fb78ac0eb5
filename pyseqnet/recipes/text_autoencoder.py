"""Lines of Shakespeare through one vector: an LSTM reads the characters, another writes them again.

Li, Luong, Jurafsky, A hierarchical neural autoencoder for paragraphs and documents, 2015; Sutskever et al., 2014.
A line is cut behind its last word that ends within 24 characters; no line that is tested was trained on. Nothing but
the vector passes from reader to writer, and the writer reads its own characters.
"""

from __future__ import annotations

import torch

from pyseqnet.data import corpora
from pyseqnet.data.text import Vocabulary
from pyseqnet.models import RecurrentTranslator
from pyseqnet.recipes import Score, Settings
from pyseqnet.recipes.sequence_pairs import SPECIAL, Pairs, symbols, train, write

LONGEST = 24  # characters
HELD_OUT, GLANCE = 1000, 200
EPOCHS, RATE = 10, 4e-3
QUICK_LINES, QUICK_STEPS = 500, 25
SHOWN = 12


def cut(line: str) -> str:
    """As many words as fit.

    >>> cut("Before we proceed any further, hear me speak.")
    'Before we proceed any'
    """
    return line if len(line) <= LONGEST else line[: LONGEST + 1].rpartition(" ")[0]


def accuracy(found: list[str], truth: list[str]) -> float:
    """The share of the truth's characters that stand where they stood."""
    right = sum(a == b for one, other in zip(found, truth, strict=True) for a, b in zip(one, other, strict=False))
    return right / sum(map(len, truth))


def run(settings: Settings) -> list[Score]:
    from pyseqnet.recipes import draw

    lines = list(dict.fromkeys(cut(line.strip()) for line in corpora.shakespeare().splitlines()))
    lines = [line for line in lines if line]
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    lines = [lines[i] for i in order[: QUICK_LINES if settings.quick else None]]
    held = min(HELD_OUT, len(lines) // 5)
    test, training = lines[:held], lines[held:]
    characters = Vocabulary(training, special=SPECIAL)
    seen = Pairs(((line, line) for line in test), characters, characters)

    def written(count: int) -> list[str]:
        return ["".join(map(str, row)) for row in write(model, seen, LONGEST + 1, count=count)]

    torch.manual_seed(settings.seed)
    sizes = {"embedding_size": 64, "hidden_size": 256}
    model = RecurrentTranslator(len(characters), len(characters), attention="none", **sizes, **symbols(characters))
    history = train(
        "lines",
        model,
        Pairs(((line, line) for line in training), characters, characters),
        settings,
        epochs=EPOCHS,
        quick_steps=QUICK_STEPS,
        rate=RATE,
        evaluate=lambda: {"accuracy": 100 * accuracy(written(GLANCE), test[:GLANCE])},
    )
    found = written(len(test))
    same = sum(a == b for a, b in zip(found, test, strict=True)) / len(test)
    (settings.out / "lines.txt").write_text(
        "".join(f"{true}\n  {line}\n" for true, line in zip(test[:SHOWN], found[:SHOWN], strict=True))
    )
    draw.curves({"lines": history}, settings.out / "learning_curves.png")
    return [
        Score("characters that come back, %", 100 * accuracy(found, test), 95.0),
        Score("whole lines that come back, %", 100 * same),
        Score.fall("lines", history),
    ]
