"""Which kinds of slots does a request have (SNIPS)? Labels written one by one, or read by attention for each label.

Yang et al., SGM: sequence generation model for multi-label classification, 2018; Shen, Lee, 2016; Coucke et al., 2018
(data). The baseline is a logistic regression for each label on the words of the request, whatever their order.
"""

from __future__ import annotations

import torch

from pyseqnet.data import corpora
from pyseqnet.data.text import Vocabulary, padded
from pyseqnet.models import LabelAttention, RecurrentTranslator
from pyseqnet.recipes import Score, Settings, read_labels
from pyseqnet.recipes.sequence_pairs import SPECIAL, Pairs, symbols, train, write

EPOCHS, QUICK_STEPS = 5, 20
LEARNING_RATE = 5e-3
EVERY, QUICK_EVERY = 3, 30  # of the training requests: fewer let the models differ
MOST = 10  # labels written for a request
SHOWN = 3  # labels whose attention is drawn
Labels = list[set[str]]


def slots(request: corpora.Tagged) -> set[str]:
    return {tag[2:] for tag in request.tags if tag != "O"}


def micro_f1(truth: Labels, found: Labels) -> float:
    """Of all labels of all texts together."""
    right = sum(len(a & b) for a, b in zip(truth, found, strict=True))
    return 2 * right / max(1, sum(map(len, truth)) + sum(map(len, found)))


def regression(train_texts: list[list[str]], train_labels: Labels, test_texts: list[list[str]]) -> Labels:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.preprocessing import MultiLabelBinarizer

    count, binarize = CountVectorizer(analyzer=list, binary=True), MultiLabelBinarizer()
    model = OneVsRestClassifier(LogisticRegression(max_iter=200))
    model.fit(count.fit_transform(train_texts), binarize.fit_transform(train_labels))
    return [set(row) for row in binarize.inverse_transform(model.predict(count.transform(test_texts)))]


def run(settings: Settings) -> list[Score]:
    from pyseqnet.recipes import draw

    requests = corpora.snips("train")[:: settings.steps(EVERY, QUICK_EVERY)]
    held_out = corpora.snips("validate")[:: settings.steps(1, 7)]
    words = Vocabulary((one.words for one in requests), least=2)
    known = Vocabulary((sorted(slots(one)) for one in requests), special=SPECIAL)
    texts, test_texts = ([words.encode(one.words) for one in part] for part in (requests, held_out))
    labels, truth = ([slots(one) for one in part] for part in (requests, held_out))

    torch.manual_seed(settings.seed)
    reader = LabelAttention(len(words), len(known))

    # the commonest label first, as the vocabulary has them
    def ordered(part: list[corpora.Tagged]) -> Pairs:
        return Pairs(((one.words, sorted(slots(one), key=lambda label: known[label])) for one in part), words, known)

    writer = RecurrentTranslator(len(words), len(known), dropout=0.3, **symbols(known))
    histories = {
        "attention for each label": read_labels.train(
            "attention for each label", reader, texts, read_labels.marks(labels, known), settings, EPOCHS
        ),
        "labels written one by one": train(
            "labels written one by one",
            writer,
            ordered(requests),
            settings,
            epochs=EPOCHS,
            quick_steps=QUICK_STEPS,
            rate=LEARNING_RATE,
        ),
    }
    written = [set(map(str, row)) for row in write(writer, ordered(held_out), MOST)]
    likely = read_labels.scores(reader, test_texts) > 0
    read = [set(map(str, known.decode(row.nonzero().flatten().tolist()))) for row in likely]
    with torch.no_grad():
        scores, weights = reader(*padded(test_texts[:1]), need_weights=True)
    shown = scores[0].topk(SHOWN).indices.tolist()
    names = [str(name) for name in known.decode(shown)]
    draw.matrix(weights[0, shown], names, held_out[0].words, settings.out / "attention.png", "where each label looks")
    draw.curves(histories, settings.out / "learning_curves.png")
    baseline = micro_f1(truth, regression([one.words for one in requests], labels, [one.words for one in held_out]))
    f1 = {"attention for each label": micro_f1(truth, read), "labels written one by one": micro_f1(truth, written)}
    return [
        *(Score(f"F1, {name}, %", 100 * value, 90.0) for name, value in f1.items()),
        Score("F1, logistic regression on words, %", 100 * baseline),
        *(Score(f"points gained over regression, {name}", 100 * (value - baseline), 0.0) for name, value in f1.items()),
        *(Score.fall(name, history) for name, history in histories.items()),
    ]
