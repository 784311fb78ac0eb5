"""Parts of speech of English web text (UD EWT) by a BiLSTM-CRF that also reads the letters of words.

Huang, Xu, Yu, 2015; Silveira et al., A gold standard dependency corpus for English, 2014 (data).
"""

from __future__ import annotations

from typing import Any

from pyseqnet.data import corpora
from pyseqnet.recipes import Score, Settings
from pyseqnet.recipes.tag_words import list_errors, train

EPOCHS = 6
SIZES: dict[str, Any] = {"embedding_size": 128, "hidden_size": 128}  # chosen on the development part, as the epochs
QUICK_SENTENCES = 300


def accuracy(truth: list[list[str]], predicted: list[list[str]]) -> float:
    pairs = [pair for a, b in zip(truth, predicted, strict=True) for pair in zip(a, b, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def run(settings: Settings) -> list[Score]:
    from pyseqnet.recipes import draw

    training, test = corpora.ewt("train"), corpora.ewt("test")
    if settings.quick:
        training, test = training[: 2 * QUICK_SENTENCES], test[:QUICK_SENTENCES]
    with_crf = train(training, test, accuracy, settings, name="BiLSTM-CRF", epochs=EPOCHS, **SIZES)
    alone = train(
        training, test, accuracy, settings, name="words alone", epochs=EPOCHS, reader="none", crf=False, **SIZES
    )
    list_errors(test, with_crf.predicted, settings.out / "errors.txt")
    draw.curves({"BiLSTM-CRF": with_crf.history, "words alone": alone.history}, settings.out / "learning_curves.png")
    return [
        Score("accuracy, BiLSTM-CRF, %", 100 * with_crf.score, 94.5),
        Score("accuracy, each word for itself, %", 100 * alone.score),
        Score.fall("BiLSTM-CRF", with_crf.history),
    ]
