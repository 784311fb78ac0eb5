"""Sentences to bracketed trees (UD English EWT): grammar as a foreign language, decoded without any constraint.

Vinyals, Kaiser, Koo, Petrov, Sutskever, Hinton, Grammar as a foreign language, 2015. A tree is a string of symbols: a
word that governs others opens a bracket with its relation, holds its part of speech among its dependents in their
order, and closes it; a word without dependents is its part of speech. Sentences of 3 to 15 words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from pyseqnet.data import corpora
from pyseqnet.data.corpora import Parsed
from pyseqnet.data.text import Vocabulary
from pyseqnet.models import RecurrentTranslator
from pyseqnet.recipes import Score, Settings
from pyseqnet.recipes.sequence_pairs import SPECIAL, Pairs, symbols, train, write

SHORTEST, LONGEST = 3, 15  # words of a sentence
MOST_SYMBOLS = 60
EPOCHS, BATCH, RATE = 12, 32, 3e-3
QUICK_SENTENCES, QUICK_STEPS, QUICK_TEST = 400, 25, 40
GLANCE = 200
CLOSE = ")"
Bracket = tuple[str, int, int]


def linear(sentence: Parsed) -> list[str]:
    """The tree as symbols.

    >>> linear(Parsed(["we", "saw", "it"], ["PRON", "VERB", "PRON"], [1, -1, 1], ["nsubj", "root", "obj"]))
    ['(root', 'PRON', 'VERB', 'PRON', ')']
    """
    below: dict[int, list[int]] = {}
    for word, head in enumerate(sentence.heads):
        below.setdefault(head, []).append(word)

    def node(word: int) -> list[str]:
        if word not in below:
            return [sentence.tags[word]]
        inside: list[str] = []
        for part in sorted([word, *below[word]]):
            inside += [sentence.tags[word]] if part == word else node(part)
        return [f"({sentence.relations[word].split(':')[0]}", *inside, CLOSE]

    return node(below[-1][0])


def brackets(tree: Sequence[str]) -> Counter[Bracket] | None:
    """The labelled brackets of a tree, (relation, first word, word behind); None if it is not well formed.

    Well formed is one tree: every bracket that opens closes, none closes that did not open, each holds a word, and
    nothing stands outside the first, unless the whole is one word.

    >>> brackets(["(root", "VERB", "(obj", "DET", "NOUN", ")", ")"])
    Counter({('root', 0, 3): 1, ('obj', 1, 3): 1})
    >>> brackets(["(root", "VERB"]) is None, brackets(["(root", ")"]) is None, brackets(["VERB"])
    (True, True, Counter())
    """
    open_ones: list[tuple[str, int]] = []
    found: Counter[Bracket] = Counter()
    position = 0
    for number, symbol in enumerate(tree):
        if number and not open_ones:
            return None
        if symbol == CLOSE:
            if not open_ones:
                return None
            label, first = open_ones.pop()
            if first == position:
                return None
            found[label, first, position] += 1
        elif symbol.startswith("("):
            open_ones.append((symbol[1:], position))
        else:
            position += 1
    if open_ones or not position:
        return None
    return Counter(dict(sorted(found.items(), key=lambda item: (item[0][1], -item[0][2]))))


def scores(found: Sequence[Sequence[str]], truth: Sequence[Sequence[str]], lengths: Sequence[int]) -> dict[str, float]:
    """Percentages: well-formed trees, trees with as many words as the sentence, F1 of labelled brackets."""
    well = right = wanted = written = fitting = 0
    for tree, true, length in zip(found, truth, lengths, strict=True):
        true_ones, ones = brackets(true), brackets(tree)
        assert true_ones is not None
        well += ones is not None
        fitting += ones is not None and sum(s != CLOSE and not s.startswith("(") for s in tree) == length
        ones = ones or Counter()
        right += (ones & true_ones).total()
        wanted, written = wanted + true_ones.total(), written + ones.total()
    count = len(found)
    return {
        "well-formed": 100 * well / count,
        "as many words": 100 * fitting / count,
        "bracket F1": 200 * right / max(1, wanted + written),
    }


def run(settings: Settings) -> list[Score]:
    from pyseqnet.recipes import draw

    def sentences(part: str, most: int | None) -> list[Parsed]:
        return [one for one in corpora.ewt_trees(part) if SHORTEST <= len(one.words) <= LONGEST][:most]

    training = sentences("train", QUICK_SENTENCES if settings.quick else None)
    test = sentences("test", QUICK_TEST if settings.quick else None)
    glance = sentences("dev", QUICK_TEST if settings.quick else GLANCE)
    reading = Vocabulary(([word.lower() for word in one.words] for one in training), least=2)
    writing = Vocabulary((linear(one) for one in training), special=SPECIAL)

    def pairs(some: Sequence[Parsed]) -> Pairs:
        return Pairs((([word.lower() for word in one.words], linear(one)) for one in some), reading, writing)

    def measure(some: Sequence[Parsed], numbers: Pairs, beams: int) -> dict[str, float]:
        found = [[str(s) for s in row] for row in write(model, numbers, MOST_SYMBOLS, beams=beams)]
        return scores(found, [linear(one) for one in some], [len(one.words) for one in some])

    torch.manual_seed(settings.seed)
    options: dict[str, Any] = {"attention": "additive", "embedding_size": 96, "hidden_size": 160, "dropout": 0.3}
    model = RecurrentTranslator(len(reading), len(writing), **options, **symbols(writing))
    seen = pairs(glance)
    history = train(
        "trees", model, pairs(training), settings, epochs=EPOCHS, quick_steps=QUICK_STEPS, rate=RATE, batch=BATCH,
        evaluate=lambda: measure(glance, seen, 1),
    )  # fmt: skip
    result = [Score.fall("trees", history)]
    for beams in (1,) if settings.quick else (1, 5):
        values = measure(test, pairs(test), beams)
        method = "greedy" if beams == 1 else f"{beams} beams"
        result.append(Score(f"well-formed trees, {method}, %", values["well-formed"], 98.0))
        result.append(Score(f"trees with as many words, {method}, %", values["as many words"]))
        result.append(Score(f"labelled brackets, F1, {method}, %", values["bracket F1"]))
    shown = next((one for one in test if len(one.words) >= 6), test[0])
    found = model.search(reading.encode(w.lower() for w in shown.words)[None], MOST_SYMBOLS, return_alignments=True)
    assert found.alignments is not None
    rows = [str(symbol) for symbol in writing.decode(found.tokens[0, 0].tolist())]
    draw.matrix(found.alignments[0, 0], rows, shown.words, settings.out / "attention.png", "where the parser looks")
    draw.curves({"trees": history}, settings.out / "learning_curves.png")
    return result
