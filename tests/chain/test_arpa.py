"""n-gram models in ARPA format: probabilities by hand, back-off, and their part in CTC beam search (C26)."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from pyseqnet.decoding import ArpaLanguageModel, ctc_beam_search

TEXT = """
ignored preface

\\data\\
ngram 1=5
ngram 2=4
ngram 3=1

\\1-grams:
-1.0\t<unk>
-99\t<s>\t-0.5
-0.7\t</s>
-0.4\ta\t-0.2
-0.6\tb\t-0.3

\\2-grams:
-0.1\t<s> a\t-0.05
-0.3\ta b\t-0.15
-0.9\ta a
-0.8\tb </s>

\\3-grams:
-0.2\t<s> a b

\\end\\
"""


@pytest.fixture
def model(tmp_path: Path) -> ArpaLanguageModel:
    path = tmp_path / "lm.arpa"
    path.write_text(TEXT)
    return ArpaLanguageModel(path, labels=["<blank>", "a", "b", "c"])


def test_probabilities_by_hand(model: ArpaLanguageModel) -> None:
    assert model.order == 3
    for context, word, log10 in (
        (["<s>"], "a", -0.1),  # a bigram of the file
        (["<s>", "a"], "b", -0.2),  # a trigram
        (["<s>", "a"], "a", -0.05 - 0.9),  # backs off to a bigram
        (["<s>"], "b", -0.5 - 0.6),  # to a unigram
        (["a", "b"], "a", -0.15 - 0.3 - 0.4),  # twice
        (["b", "a"], "b", -0.3),  # a history the file lacks costs nothing
        (["a", "a"], "b", -0.3),  # nor does one without a weight
        (["<s>", "a"], "word", -0.05 - 0.2 - 1.0),  # unknown
        (["x", "y", "<s>", "a"], "b", -0.2),  # only two words count
        ([], "a", -0.4),
    ):
        assert model.log_prob(context, word) == pytest.approx(log10 * math.log(10), abs=1e-12)
    assert model.score(["a", "b"]) == pytest.approx((-0.1 - 0.2 - 0.15 - 0.8) * math.log(10), abs=1e-12)
    assert model.score(["a", "b"], end=False) == pytest.approx(-0.3 * math.log(10), abs=1e-12)


def test_called_with_labels_it_scores_sentences(model: ArpaLanguageModel) -> None:
    for labels in itertools.product((1, 2, 3), repeat=4):
        total = sum(model(labels[:i], labels[i]) for i in range(4))
        assert total == pytest.approx(model.score([model.labels[c] for c in labels], end=False), abs=1e-12)


def test_it_decides_what_the_beam_cannot(model: ArpaLanguageModel) -> None:
    """Every class equally likely: the words are the language model's, whose scores differ from those without by it."""
    log_probs = torch.full((5, 1, 4), -math.log(4))
    wide = {"beam_width": 1000, "nbest": 1000, "classes_per_step": None}
    plain = {tuple(h.labels): h.score for h in ctc_beam_search(log_probs, **wide)[0]}
    for weight, bonus in ((1.0, 0.0), (0.7, 1.5)):
        (found,) = ctc_beam_search(log_probs, **wide, language_model=model, language_weight=weight, length_bonus=bonus)
        assert len(found) == len(plain)
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
        for h in found:
            assert len(h.times) == len(h.labels)
            assert h.times == sorted(set(h.times))
            added = weight * model.score([model.labels[c] for c in h.labels], end=False) + bonus * len(h.labels)
            assert h.score == pytest.approx(plain[tuple(h.labels)] + added, abs=1e-9)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\\data\\", "data", r"expected \\data\\"),
        ("\\end\\", "", r"at the end, \\end\\"),
        ("ngram 2=4", "ngram 2=3", "announces n-grams"),
        ("-0.3\ta b\t-0.15", "-0.3\ta", r"ARPA line 18: .* expected a probability, 2 words"),
        ("-0.4\ta\t-0.2", "x\ta\t-0.2", "ARPA line 13: .* could not convert string to float"),
    ],
)
def test_bad_files(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "bad.arpa"
    path.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        ArpaLanguageModel(path)


def test_without_labels_it_is_not_for_beams(tmp_path: Path) -> None:
    path = tmp_path / "lm.arpa"
    path.write_text(TEXT)
    with pytest.raises(ValueError, match="labels= says which word each label is"):
        ArpaLanguageModel(path)((), 1)
