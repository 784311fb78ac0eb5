"""CTC decoding: collapse (C24), best path, prefix beam search (C26, golden G15), alignment."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support import normal

import pyseqnet.functional as F
from pyseqnet.decoding import ctc_align, ctc_beam_search, ctc_collapse, ctc_greedy_search


def test_collapse() -> None:
    assert ctc_collapse([1, 1, 2, 2]) == [1, 2]
    assert ctc_collapse([3, 0, 3, 3, 0]) == [3, 3]
    assert ctc_collapse([]) == []
    assert ctc_collapse([2, 2, 1], blank=2) == [1]


def test_best_path_is_not_the_best_labelling() -> None:
    y = torch.tensor([0.6, 0.4]).log().expand(2, 1, 2)
    (greedy,) = ctc_greedy_search(y)
    assert greedy.labels == []
    assert math.exp(greedy.score) == pytest.approx(0.36)
    (found,) = ctc_beam_search(y, nbest=2)
    assert [h.labels for h in found] == [[1], []]
    assert [math.exp(h.score) for h in found] == pytest.approx([0.64, 0.36])


def test_a_wide_beam_is_exact() -> None:
    y = normal((5, 2, 3), 3).log_softmax(2)
    for b, hypotheses in enumerate(ctc_beam_search(y, beam_width=1000, nbest=1000, classes_per_step=None)):
        every = {tuple(ctc_collapse(path)) for path in itertools.product(range(3), repeat=5)}
        assert {tuple(h.labels) for h in hypotheses} == every
        scores = [h.score for h in hypotheses]
        assert scores == sorted(scores, reverse=True)
        for h in hypotheses:
            loss = F.ctc_loss(y[:, b : b + 1], torch.tensor([h.labels], dtype=torch.int64), [5], [len(h.labels)],
                              reduction="sum")  # fmt: skip
            assert h.score == pytest.approx(-loss.item(), abs=1e-9)


def test_greedy_lengths_times_and_scores() -> None:
    path = [0, 2, 2, 0, 2, 1, 1]
    y = torch.full((7, 2, 3), -5.0)
    for t, c in enumerate(path):
        y[t, :, c] = -0.1
    full, short = ctc_greedy_search(y, torch.tensor([7, 3]))
    assert (full.labels, full.times) == ([2, 2, 1], [1, 4, 5])
    assert (short.labels, short.times) == ([2], [1])
    assert short.score == pytest.approx(-0.3)
    (beam,) = ctc_beam_search(y[:, :1])[0]
    assert (beam.labels, beam.times) == ([2, 2, 1], [1, 4, 5])
    assert ctc_greedy_search(y[:0])[0].labels == []


def test_language_model_and_length_bonus_decide() -> None:
    y = torch.tensor([[[0.2, 0.41, 0.39]]]).log()

    def prefers_two(prefix: tuple[int, ...], label: int) -> float:
        return math.log(0.9 if label == 2 else 0.1)

    assert ctc_beam_search(y)[0][0].labels == [1]
    assert ctc_beam_search(y, language_model=prefers_two)[0][0].labels == [2]
    assert ctc_beam_search(y, language_model=prefers_two, language_weight=0.0)[0][0].labels == [1]
    assert ctc_beam_search(y, length_bonus=-5.0)[0][0].labels == []


def test_alignment_is_the_best_of_all_paths() -> None:
    y = normal((5, 1, 3), 9).log_softmax(2)
    for labels in ([], [1], [2, 2], [1, 2, 1], [1, 1, 2]):
        ((path, found),) = ctc_align(y, [labels])
        scores = {
            p: sum(y[t, 0, c].item() for t, c in enumerate(p))
            for p in itertools.product(range(3), repeat=5)
            if ctc_collapse(p) == labels
        }
        assert tuple(path) == max(scores, key=scores.get)
        assert found.score == pytest.approx(max(scores.values()))
        assert [path[t] for t in found.times] == labels


def test_bad_input() -> None:
    y = torch.zeros(3, 1, 4).log_softmax(2)
    with pytest.raises(ValueError, match=r"log_probs must be \(T, B, C\)"):
        ctc_greedy_search(y[0])
    with pytest.raises(TypeError, match="floating-point"):
        ctc_greedy_search(y.long())
    with pytest.raises(ValueError, match="blank must be a class, 0 to 3, got 4"):
        ctc_beam_search(y, blank=4)
    with pytest.raises(ValueError, match="input_lengths must be 1 numbers from 0 to 3"):
        ctc_greedy_search(y, [4])
    with pytest.raises(ValueError, match="beam_width must be positive, got 0"):
        ctc_beam_search(y, beam_width=0)
    with pytest.raises(ValueError, match="3 labels do not fit 3 steps"):
        ctc_align(y, [[1, 1, 2]])
    with pytest.raises(ValueError, match="other than blank"):
        ctc_align(y, [[0]])
    with pytest.raises(ValueError, match="targets must have 1 sequences, got 2"):
        ctc_align(y, [[1], [2]])
