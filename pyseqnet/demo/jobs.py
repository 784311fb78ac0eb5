"""The three trainings of the demo: what is learned, how well, and the pictures of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyseqnet.data import images
from pyseqnet.demo import dates, python_source
from pyseqnet.demo.python_source import Source
from pyseqnet.models import ImageClassifier, SequenceTagger, SequenceTranslator
from pyseqnet.training import History, batches, fit

DIGIT_CHANNELS = (32, 64)
DIGIT_DROPOUT = 0.2  # before the linear layer, which holds few digits in many weights
DIGIT_EPOCHS = 60
DIGIT_BATCH, DIGIT_LEARNING_RATE, DIGIT_WEIGHT_DECAY = 64, 2e-3, 5e-2

TAGGER = {"embedding_size": 32, "hidden_size": 96}
TAGGER_BATCH, TAGGER_STEPS, TAGGER_LEARNING_RATE = 32, 600, 5e-3
TAGGER_GLANCE = 50  # test windows that are looked at during the training
PIECE = 1000  # characters of a test file that are read together

TRANSLATOR = {"d_model": 64, "nhead": 4, "dim_feedforward": 256}
TRANSLATOR_BATCH, TRANSLATOR_STEPS, TRANSLATOR_LEARNING_RATE = 64, 1000, 3e-3
LOOKS = 15  # at the test data during the training of a sequence model

TRANSLATOR_GLANCE = 200  # test dates that are written during the training

SNIPPET_LINES = 36
MAP_LOCALES = ("pt_BR", "fr_FR", "en_US")  # of scripts that matplotlib's own font has
MOST_MISTAKES_SHOWN = 12


@dataclass
class Result:
    """What one training gave."""

    name: str
    goal: float
    right: int
    tested: int
    unit: str  # what is counted in `tested`
    parameters: int
    history: History
    trained_on: str
    pictures: dict[str, Path] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)  # what the page shows besides

    @property
    def accuracy(self) -> float:
        return self.right / self.tested

    @property
    def mistakes(self) -> int:
        return self.tested - self.right

    @property
    def passed(self) -> bool:
        return self.accuracy >= self.goal


def _size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _loss(scores: Tensor, classes: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of scores (N, C), and the share that is right."""
    right = (scores.argmax(1) == classes).double().mean().item()
    return torch.nn.functional.cross_entropy(scores, classes), {"training": right}


# --- digits -----------------------------------------------------------------------------------------------------


def classify_digits(folder: Path, seed: int, share: float) -> Result:
    """A convolutional network on handwritten digits."""
    torch.manual_seed(seed)
    data = images.digits(seed)
    model = ImageClassifier(1, data.size, DIGIT_CHANNELS, len(data.classes), dropout=DIGIT_DROPOUT)
    epochs = max(1, round(share * DIGIT_EPOCHS))
    generator = torch.Generator().manual_seed(seed)
    draw = batches(len(data.train_images), DIGIT_BATCH, seed)

    def loss() -> tuple[Tensor, dict[str, float]]:
        chosen = draw()
        return _loss(model(images.shifted(data.train_images[chosen], generator)), data.train_labels[chosen])

    @torch.no_grad()
    def predict() -> Tensor:
        scores: Tensor = model(data.test_images)
        return scores.argmax(1)

    def test() -> dict[str, float]:
        return {"test": (predict() == data.test_labels).double().mean().item()}

    history = fit(
        model, loss, epochs * len(draw), learning_rate=DIGIT_LEARNING_RATE, weight_decay=DIGIT_WEIGHT_DECAY,
        max_norm=math.inf, evaluate=test, looks=epochs, name="training on digits",
    )  # fmt: skip
    predicted = predict()

    from pyseqnet.demo import plots  # matplotlib takes a second to import: the training starts first

    result = Result(
        "digits",
        0.98,
        int((predicted == data.test_labels).sum()),
        len(predicted),
        "images",
        _size(model),
        history,
        f"{epochs} epochs of {len(data.train_images)} images",
    )
    for name in ("learning_curve", "confusion_matrix", "first_layer_filters"):
        result.pictures[name] = folder / f"digits_{name}.png"
    plots.learning_curve(history, result.goal, result.pictures["learning_curve"], "training, shifted images")
    plots.confusion_matrix(
        data.test_labels,
        predicted,
        data.classes,
        "Test images: digit against prediction",
        result.pictures["confusion_matrix"],
    )
    plots.first_layer_filters(model.get_parameter("features.0.weight"), result.pictures["first_layer_filters"])
    return result


# --- Python source ----------------------------------------------------------------------------------------------


def tag(model: SequenceTagger, source: Source) -> Tensor:
    """The kind of each character (N,); the file is cut into pieces, each of which is read alone."""
    pieces = source.symbols.split(PIECE)
    lengths = torch.tensor([len(piece) for piece in pieces])
    padded = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
    model.eval()
    with torch.no_grad():
        kinds = model(padded, lengths).argmax(-1)
    return torch.cat([row[:length] for row, length in zip(kinds, lengths.tolist(), strict=True)])


def highlight_python(folder: Path, seed: int, share: float) -> Result:
    """A bidirectional LSTM that tells what each character of Python source is."""
    torch.manual_seed(seed)
    sources, held_out = python_source.load(seed, share)
    symbols, kinds = python_source.windows(sources)
    test_symbols, test_kinds = python_source.windows(held_out)
    generator = torch.Generator().manual_seed(seed)
    draw = batches(len(symbols), TAGGER_BATCH, seed)
    glance = torch.randint(0, len(test_symbols), (TAGGER_GLANCE,), generator=generator)
    glance_symbols, glance_kinds = test_symbols[glance], test_kinds[glance]
    model = SequenceTagger(python_source.SYMBOLS, len(python_source.KINDS), **TAGGER)

    def loss() -> tuple[Tensor, dict[str, float]]:
        chosen = draw()
        return _loss(model(symbols[chosen]).flatten(0, 1), kinds[chosen].flatten())

    def test() -> dict[str, float]:
        return {"test": (model(glance_symbols).argmax(-1) == glance_kinds).double().mean().item()}

    steps = max(1, round(share * TAGGER_STEPS))
    name = "training on Python source"
    history = fit(model, loss, steps, learning_rate=TAGGER_LEARNING_RATE, evaluate=test, looks=LOOKS, name=name)
    predicted = [tag(model, source) for source in held_out]
    truth = torch.cat([source.kinds for source in held_out])
    found = torch.cat(predicted)

    from pyseqnet.demo import plots

    result = Result(
        "Python source",
        0.98,
        int((found == truth).sum()),
        len(found),
        "characters",
        _size(model),
        history,
        f"{steps} steps of {TAGGER_BATCH} x {python_source.WINDOW} characters",
    )
    for name in ("learning_curve", "confusion_matrix"):
        result.pictures[name] = folder / f"python_{name}.png"
    plots.learning_curve(history, result.goal, result.pictures["learning_curve"], "training")
    names = list(python_source.KINDS)
    title = "Characters of the test files: kind against prediction"
    plots.confusion_matrix(truth, found, names, title, result.pictures["confusion_matrix"])
    result.facts = {
        "training_files": len(sources),
        "test_files": len(held_out),
        "training_characters": sum(len(source.text) for source in sources),
        "kinds": names,
        "snippet": _snippet(held_out, predicted),
    }
    return result


def _snippet(sources: list[Source], predicted: list[Tensor]) -> dict[str, Any]:
    """The passage of the test files with the most even mixture of kinds, as runs of equally tagged characters."""
    best = (-1.0, 0, 0, 0)
    for number, source in enumerate(sources):
        ends = [0] + [i + 1 for i, character in enumerate(source.text) if character == "\n"]
        for line in range(0, len(ends) - SNIPPET_LINES, SNIPPET_LINES // 2):
            first, last = ends[line], ends[line + SNIPPET_LINES]
            shares = torch.bincount(source.kinds[first:last], minlength=len(python_source.KINDS)) / (last - first)
            entropy = -sum(p * math.log(p) for p in shares.tolist() if p)
            best = max(best, (entropy, number, first, last))
    _, number, first, last = best
    source = sources[number]
    last = last or len(source.text)
    runs: list[dict[str, Any]] = []
    marks = zip(predicted[number][first:last].tolist(), source.kinds[first:last].tolist(), strict=True)
    for character, mark in zip(source.text[first:last], marks, strict=True):
        if not runs or runs[-1]["mark"] != mark:
            runs.append({"text": "", "mark": mark})
        runs[-1]["text"] += character
    names = python_source.KINDS
    return {
        "file": source.name,
        "line": source.text.count("\n", 0, first) + 1,
        "mistakes": int((predicted[number][first:last] != source.kinds[first:last]).sum()),
        "characters": last - first,
        "runs": [{"text": run["text"], "kind": names[run["mark"][0]], "truth": names[run["mark"][1]]} for run in runs],
    }


# --- dates ------------------------------------------------------------------------------------------------------


def translate_dates(folder: Path, seed: int, share: float) -> Result:
    """A Transformer that reads dates of sixteen locales and writes them in ISO 8601."""
    torch.manual_seed(seed)
    corpus = dates.load(seed, share)
    data = corpus.training
    draw = batches(len(data.iso), TRANSLATOR_BATCH, seed)
    model = SequenceTranslator(corpus.source_symbols, dates.TARGET_SYMBOLS, **TRANSLATOR)

    def loss() -> tuple[Tensor, dict[str, float]]:
        chosen = draw()
        source, target = data.source[chosen], data.target[chosen]
        source = source[:, : int((source != dates.PADDING).sum(1).max())]
        return _loss(model(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten())

    def write(count: int) -> list[str]:
        model.eval()
        return dates.read(model.generate(corpus.test.source[:count], dates.TARGET_LENGTH - 1))

    def test() -> dict[str, float]:
        written = write(TRANSLATOR_GLANCE)
        return {"test": sum(a == b for a, b in zip(written, corpus.test.iso, strict=False)) / len(written)}

    steps = max(1, round(share * TRANSLATOR_STEPS))
    name = "training on dates"
    history = fit(model, loss, steps, learning_rate=TRANSLATOR_LEARNING_RATE, evaluate=test, looks=LOOKS, name=name)
    written = write(len(corpus.test.iso))
    right = [a == b for a, b in zip(written, corpus.test.iso, strict=True)]

    from pyseqnet.demo import plots

    result = Result(
        "dates",
        0.98,
        sum(right),
        len(right),
        "dates",
        _size(model),
        history,
        f"{steps} steps of {TRANSLATOR_BATCH} of {len(data.iso)} dates",
    )
    for name in ("learning_curve", "cross_attention"):
        result.pictures[name] = folder / f"dates_{name}.png"
    plots.learning_curve(
        history, result.goal, result.pictures["learning_curve"], "training, characters", "test, whole dates"
    )
    shown = max(
        (i for i, locale in enumerate(corpus.test.locales) if locale in MAP_LOCALES),
        key=lambda i: (right[i], len(corpus.test.texts[i])),
    )
    text = corpus.test.texts[shown]
    source, target = corpus.test.source[shown : shown + 1, : len(text)], corpus.test.target[shown : shown + 1, :-1]
    weights = model.cross_attention(source, target)[0]
    plots.cross_attention(weights, text, [*corpus.test.iso[shown], "end"], result.pictures["cross_attention"])
    rows = [
        {"locale": locale, "text": text, "written": found, "iso": iso, "right": found == iso}
        for locale, text, found, iso in zip(
            corpus.test.locales, corpus.test.texts, written, corpus.test.iso, strict=True
        )
    ]
    result.facts = {
        "locales": len(dates.LOCALES),
        "examples": [row for _, row in sorted({row["locale"]: row for row in reversed(rows)}.items())],  # first of each
        "mistakes": [row for row in rows if not row["right"]][:MOST_MISTAKES_SHOWN],
    }
    return result


JOBS: tuple[Callable[[Path, int, float], Result], ...] = (classify_digits, highlight_python, translate_dates)
