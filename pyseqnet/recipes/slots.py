"""Slots of requests to an assistant (SNIPS): BiLSTM with and without a CRF, Elman, Jordan and a net without context.

Mesnil, He, Deng, Bengio: Investigation of recurrent-neural-network architectures and learning methods for spoken
language understanding, 2013; Huang, Xu, Yu, 2015; Coucke et al., 2018 (data).
"""

from __future__ import annotations

from pyseqnet.data import corpora
from pyseqnet.data.corpora import Tagged
from pyseqnet.recipes import Score, Settings
from pyseqnet.recipes.tag_words import list_errors, train
from pyseqnet.training import chunk_f1

EPOCHS = 6
QUICK_REQUESTS, QUICK_SHARE = 1000, 7  # of the training; every so many of the test
MODELS = {
    "BiLSTM-CRF": ("lstm", True),
    "BiLSTM": ("lstm", False),
    "Elman": ("elman", False),
    "Jordan": ("jordan", False),
    "feed-forward": ("none", False),
}
CITIES = ("taipei", "berlin", "lima", "oslo", "rome", "cairo")


def journeys() -> list[Tagged]:
    """ "arrive at X", "leave X": the same words, other slots; only context tells which."""
    return [
        Tagged(["i", verb, where, city, "today"], ["O", "O", "O", f"B-{slot}", "O"])
        for city in CITIES
        for verb, where, slot in (("arrive", "at", "destination"), ("leave", "at", "origin"))
    ]


def run(settings: Settings) -> list[Score]:
    from pyseqnet.recipes import draw

    training, test = corpora.snips("train"), corpora.snips("validate")
    if settings.quick:
        training, test = training[:: max(1, len(training) // QUICK_REQUESTS)], test[::QUICK_SHARE]
    chosen = ("BiLSTM-CRF", "feed-forward") if settings.quick else tuple(MODELS)
    found = {}
    for name in chosen:
        reader, crf = MODELS[name]
        found[name] = train(training, test, chunk_f1, settings, name=name, epochs=EPOCHS, reader=reader, crf=crf)
    list_errors(test, found["BiLSTM-CRF"].predicted, settings.out / "errors.txt")
    draw.curves({name: one.history for name, one in found.items()}, settings.out / "learning_curves.png")

    goals = {"BiLSTM-CRF": 88.0}
    scores = [Score(f"chunk F1, {name}, %", 100 * one.score, goals.get(name)) for name, one in found.items()]
    if "BiLSTM" in found:
        gain = 100 * (found["BiLSTM-CRF"].score - found["BiLSTM"].score)
        scores.append(Score("points gained by the CRF", gain, 0.0))
    told = {}
    for name, reader in (("BiLSTM", "lstm"), ("feed-forward", "none")):
        pairs = journeys()
        one = train(pairs, pairs, chunk_f1, settings, name=f"{name}, journeys", epochs=60, reader=reader, crf=False)
        told[name] = 100 * one.score
        scores.append(Score(f"arrive or leave, {name}, F1, %", told[name]))
    scores.append(Score("points by which context tells arrive from leave", told["BiLSTM"] - told["feed-forward"], 30.0))
    scores.append(Score.fall("BiLSTM-CRF", found["BiLSTM-CRF"].history))
    return scores
