"""A chat bot that knows its corpus by heart (ChatterBot): an LSTM with attention answers word by word.

Vinyals, Le, A neural conversational model, 2015. The corpus is small: what is asked of the model is that it keeps it.
"""

from __future__ import annotations

import torch

from pyseqnet.data import corpora
from pyseqnet.data.text import Vocabulary, words
from pyseqnet.models import RecurrentTranslator
from pyseqnet.recipes import Score, Settings
from pyseqnet.recipes.sequence_pairs import SPECIAL, Pairs, symbols, train, write

LONGEST = 30  # words of an answer
EPOCHS, BATCH, RATE = 60, 32, 4e-3
QUICK_TALKS, QUICK_STEPS = 100, 40
UNSEEN = ("How are you?", "Who is your favorite author?", "Do you like the moon?")


def run(settings: Settings) -> list[Score]:
    from pyseqnet.recipes import draw

    talks = [(words(said), words(answer)) for said, answer in corpora.chatterbot()]
    talks = [(said, answer) for said, answer in talks if said and 0 < len(answer) <= LONGEST]
    talks = list({tuple(said): (said, answer) for said, answer in reversed(talks)}.values())
    talks = talks[: QUICK_TALKS if settings.quick else None]
    reading = Vocabulary(said for said, _ in talks)
    writing = Vocabulary((answer for _, answer in talks), special=SPECIAL)
    pairs = Pairs(talks, reading, writing)

    def exact(count: int | None = None) -> float:
        found = write(model, pairs, LONGEST + 1, count=count)
        return 100 * sum(row == answer for row, (_, answer) in zip(found, talks, strict=False)) / len(found)

    torch.manual_seed(settings.seed)
    sizes = {"embedding_size": 128, "hidden_size": 192}
    model = RecurrentTranslator(len(reading), len(writing), attention="additive", **sizes, **symbols(writing))
    history = train(
        "talks", model, pairs, settings, epochs=EPOCHS, quick_steps=QUICK_STEPS, rate=RATE, batch=BATCH,
        evaluate=lambda: {"exact": exact(100)},
    )  # fmt: skip
    asked = Pairs(((words(said), []) for said in UNSEEN), reading, writing)
    lines = [
        f"{said}\n  {' '.join(map(str, answer))}\n"
        for said, answer in zip(UNSEEN, write(model, asked, LONGEST), strict=True)
    ]
    (settings.out / "answers.txt").write_text("".join(lines))
    draw.curves({"talks": history}, settings.out / "learning_curves.png")
    return [Score("answers word for word, %", exact(), 95.0), Score.fall("talks", history)]
