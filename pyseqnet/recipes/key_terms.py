"""Key terms of German captions, in English (Multi30k): attention reads the caption once for each of 300 terms.

Shen, Lee: Neural attention models for sequence classification: analysis and application to key term extraction and
dialogue act detection, 2016. Terms are the commonest English words that are no stop words; a caption's are those of its
translation. Beside it: the five commonest terms for every caption, and by counting the terms that go most often with
one of its words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet.data import corpora
from pyseqnet.data.text import Vocabulary, padded, words
from pyseqnet.models import LabelAttention
from pyseqnet.recipes import Score, Settings, read_labels

TERMS = 300
FOUND = 5  # terms named for a caption
EPOCHS = 4
QUICK_CAPTIONS = 1000


def hits(scores: Tensor, marks: Tensor) -> float:
    """Of the terms that could be among the first `FOUND`, the share that is: recall at five, over all captions."""
    best = scores.topk(FOUND, 1).indices
    return (marks.gather(1, best).sum() / marks.sum(1).clamp_max(FOUND).sum()).item()


def associations(texts: list[Tensor], marks: Tensor, test: list[Tensor], symbols: int) -> Tensor:
    """Scores by counting: how much likelier a term is for each word of the caption than for any caption, best word."""
    seen = torch.zeros(symbols, marks.shape[1])
    count = torch.zeros(symbols)
    for text, row in zip(texts, marks, strict=True):
        unique = text.unique()
        seen[unique] += row
        count[unique] += 1
    share = (seen + marks.mean(0)) / (count.unsqueeze(1) + 1)  # one caption's worth of the mean, for rare words
    return torch.stack([share[text.unique()].amax(0) for text in test])


def run(settings: Settings) -> list[Score]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    from pyseqnet.recipes import draw

    pairs, held_out = corpora.multi30k("train"), corpora.multi30k("test_2016_flickr")
    if settings.quick:
        pairs, held_out = pairs[:QUICK_CAPTIONS], held_out[:100]
    german = Vocabulary((words(one) for one, _ in pairs), least=3)
    content = [
        [word for word in words(other) if word.isalpha() and word not in ENGLISH_STOP_WORDS] for _, other in pairs
    ]
    terms = Vocabulary(content, most=TERMS)

    texts, test_texts = ([german.encode(words(one)) for one, _ in part] for part in (pairs, held_out))
    marks, test_marks = (read_labels.marks([words(other) for _, other in part], terms) for part in (pairs, held_out))
    torch.manual_seed(settings.seed)
    model = LabelAttention(len(german), len(terms))
    history = read_labels.train("key terms", model, texts, marks, settings, EPOCHS)
    found = read_labels.scores(model, test_texts)
    with torch.no_grad():
        _, weights = model(*padded(test_texts[:1]), need_weights=True)
    best = found[0].topk(FOUND).indices.tolist()
    names = [str(name) for name in terms.decode(best)]
    draw.matrix(
        weights[0, best], names, words(held_out[0][0]), settings.out / "attention.png", "where each term is read"
    )
    right = 100 * hits(found, test_marks)
    common = 100 * hits(marks.sum(0).expand_as(test_marks), test_marks)
    counted = 100 * hits(associations(texts, marks, test_texts, len(german)), test_marks)
    return [
        Score("found at five, attention, %", right, 70.0),
        Score("found at five, the commonest terms, %", common),
        Score("found at five, counted associations, %", counted),
        Score("points gained over counting", right - counted, 0.0),
        Score.fall("key terms", history),
    ]
