"""Decoding of CTC outputs: the best path, prefix beam search, and the alignment of known labels.

Graves, Fernández, Gomez, Schmidhuber: Connectionist temporal classification, 2006.
Hannun, Maas, Jurafsky, Ng: First-pass large vocabulary continuous speech recognition using bi-directional recurrent
DNNs, 2014 (prefix beam search with a language model).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LanguageModel = Callable[[tuple[int, ...], int], float]
_NEVER = -math.inf


class CtcHypothesis(NamedTuple):
    """A decoded sequence.

    labels: without blanks and repeats. score: natural log; of the best path for greedy search and alignment, of all
    paths together (plus the language model's part and the length bonus) for beam search. times: for each label the
    step, from 0, at which it is first emitted (beam search: on the most probable path to it found so far).
    """

    labels: list[int]
    score: float
    times: list[int]


def ctc_collapse(path: Iterable[int], blank: int = 0) -> list[int]:
    """Merges repeats, then drops blanks: what CTC makes of a path of one class a step.

    >>> ctc_collapse([1, 1, 0, 1, 2, 2])
    [1, 1, 2]
    """
    labels, before = [], blank
    for c in path:
        if c not in (before, blank):
            labels.append(c)
        before = c
    return labels


def _read(log_probs: Tensor, input_lengths: Tensor | Sequence[int] | None, blank: int) -> tuple[Tensor, list[int]]:
    if not isinstance(log_probs, Tensor) or not log_probs.is_floating_point():
        raise TypeError("log_probs must be a floating-point Tensor")
    if log_probs.dim() != 3:
        raise ValueError(f"log_probs must be (T, B, C), got {tuple(log_probs.shape)}")
    steps, batch, classes = log_probs.shape
    if not 0 <= blank < classes:
        raise ValueError(f"blank must be a class, 0 to {classes - 1}, got {blank}")
    lengths = [steps] * batch if input_lengths is None else [int(n) for n in input_lengths]
    if len(lengths) != batch or any(not 0 <= n <= steps for n in lengths):
        raise ValueError(f"input_lengths must be {batch} numbers from 0 to {steps}, got {lengths}")
    return log_probs.detach(), lengths


def ctc_greedy_search(
    log_probs: Tensor, input_lengths: Tensor | Sequence[int] | None = None, blank: int = 0
) -> list[CtcHypothesis]:
    """The most probable class of every step, collapsed (best-path decoding).

    Args:
        log_probs: ``(T, B, C)`` log-probabilities, any device.
        input_lengths: steps of each sequence; None: all T.
        blank: the class that separates labels.

    The best path need not give the most probable labels: see `ctc_beam_search`.
    """
    log_probs, lengths = _read(log_probs, input_lengths, blank)
    if log_probs.shape[0] == 0:
        return [CtcHypothesis([], 0.0, []) for _ in lengths]
    best = log_probs.max(2)
    paths, scores = best.indices.t().tolist(), best.values.double().t().tolist()
    found = []
    for path, values, n in zip(paths, scores, lengths, strict=True):
        starts = [t for t in range(n) if path[t] != blank and (t == 0 or path[t] != path[t - 1])]
        found.append(CtcHypothesis([path[t] for t in starts], sum(values[:n]), starts))
    return found


class _Beam:
    """One prefix: log-probabilities of its paths that end in a blank and of those that end in its last label."""

    __slots__ = ("best", "bonus", "in_blank", "in_label", "times")

    def __init__(self, bonus: float) -> None:
        self.bonus = bonus  # of language model and length
        self.in_blank = self.in_label = _NEVER
        self.best = _NEVER  # log-probability of the most probable single path, and its times
        self.times: tuple[int, ...] = ()

    def score(self) -> float:
        return _log_add(self.in_blank, self.in_label) + self.bonus


def _log_add(a: float, b: float) -> float:
    if a < b:
        a, b = b, a
    return a if b == _NEVER else a + math.log1p(math.exp(b - a))


def ctc_beam_search(
    log_probs: Tensor,
    input_lengths: Tensor | Sequence[int] | None = None,
    blank: int = 0,
    *,
    beam_width: int = 16,
    nbest: int = 1,
    classes_per_step: int | None = 40,
    language_model: LanguageModel | None = None,
    language_weight: float = 1.0,
    length_bonus: float = 0.0,
) -> list[list[CtcHypothesis]]:
    """The most probable label sequences, the probabilities of all their paths added up (prefix beam search).

    Args:
        log_probs, input_lengths, blank: as `ctc_greedy_search`.
        beam_width: prefixes kept after each step.
        nbest: hypotheses to return for each sequence.
        classes_per_step: only this many of a step's most probable classes, and the blank, extend prefixes; None: all.
        language_model: ``f(prefix, label)``, the log-probability of a label after a prefix (a tuple of labels), such as
            an `ArpaLanguageModel`.
        language_weight: what it is multiplied with.
        length_bonus: added for each label.

    Returns:
        For each sequence up to ``nbest`` hypotheses, best first.

    With a beam wide enough for all prefixes, and no language model, a score is minus the sequence's `ctc_loss`.
    """
    log_probs, lengths = _read(log_probs, input_lengths, blank)
    for name, value in (("beam_width", beam_width), ("nbest", nbest)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    batch, classes = log_probs.shape[1:]
    width = classes if classes_per_step is None else min(classes_per_step, classes)
    if width < 1:
        raise ValueError(f"classes_per_step must be positive, got {classes_per_step}")
    top = log_probs.double().topk(width, 2)
    values, indices = top.values.transpose(0, 1).tolist(), top.indices.transpose(0, 1).tolist()
    blanks = log_probs[:, :, blank].double().t().tolist()

    def bonus(prefix: tuple[int, ...], label: int) -> float:
        spoken = language_weight * language_model(prefix, label) if language_model is not None else 0.0
        return spoken + length_bonus

    found = []
    for b in range(batch):
        beams: dict[tuple[int, ...], _Beam] = {(): _Beam(0.0)}
        beams[()].in_blank = beams[()].best = 0.0
        for t in range(lengths[b]):
            candidates = [(c, p) for c, p in zip(indices[b][t], values[b][t], strict=True) if c != blank]
            beams = _step(beams, t, candidates, blanks[b][t], bonus)
            kept = heapq.nlargest(beam_width, beams.items(), key=lambda item: item[1].score())
            beams = dict(kept)
        ranked = heapq.nlargest(nbest, beams.items(), key=lambda item: item[1].score())
        found.append([CtcHypothesis(list(prefix), beam.score(), list(beam.times)) for prefix, beam in ranked])
    return found


def _step(
    beams: dict[tuple[int, ...], _Beam],
    step: int,
    candidates: list[tuple[int, float]],
    blank: float,
    bonus: Callable[[tuple[int, ...], int], float],
) -> dict[tuple[int, ...], _Beam]:
    after: dict[tuple[int, ...], _Beam] = {}

    def reached(prefix: tuple[int, ...], parent: _Beam, added: float) -> _Beam:
        if prefix not in after:
            after[prefix] = _Beam(parent.bonus + added)
        return after[prefix]

    def remember(beam: _Beam, path: float, times: tuple[int, ...]) -> None:
        if path > beam.best:
            beam.best, beam.times = path, times

    for prefix, beam in beams.items():
        together = _log_add(beam.in_blank, beam.in_label)
        same = reached(prefix, beam, 0.0)
        same.in_blank = _log_add(same.in_blank, together + blank)
        remember(same, beam.best + blank, beam.times)
        for label, p in candidates:
            repeats = bool(prefix) and label == prefix[-1]
            if repeats:  # the same label goes on; only behind a blank does it count anew
                same.in_label = _log_add(same.in_label, beam.in_label + p)
                remember(same, beam.best + p, beam.times)
            source = beam.in_blank if repeats else together
            if source == _NEVER:
                continue
            longer = (*prefix, label)
            next_beam = reached(longer, beam, 0.0 if longer in after else bonus(prefix, label))
            next_beam.in_label = _log_add(next_beam.in_label, source + p)
            remember(next_beam, beam.best + p, (*beam.times, step))
    return after


def ctc_align(
    log_probs: Tensor,
    targets: Sequence[Sequence[int]],
    input_lengths: Tensor | Sequence[int] | None = None,
    blank: int = 0,
) -> list[tuple[list[int], CtcHypothesis]]:
    """The most probable path that gives known labels (forced alignment).

    Args:
        targets: a sequence of labels for each batch element. The others as `ctc_greedy_search`.

    Returns:
        For each sequence the class of every step, and the hypothesis with its score and the labels' first steps.

    Raises:
        ValueError where a target holds a blank or has no path of that many steps.
    """
    log_probs, lengths = _read(log_probs, input_lengths, blank)
    if len(targets) != len(lengths):
        raise ValueError(f"targets must have {len(lengths)} sequences, got {len(targets)}")
    return [_align(log_probs[:n, b].double().cpu(), list(targets[b]), blank) for b, n in enumerate(lengths)]


def _align(y: Tensor, labels: list[int], blank: int) -> tuple[list[int], CtcHypothesis]:
    steps, classes = y.shape
    if any(not 0 <= c < classes or c == blank for c in labels):
        raise ValueError(f"targets must hold classes other than blank, got {labels}")
    if len(labels) + sum(a == b for a, b in itertools.pairwise(labels)) > steps:
        raise ValueError(f"targets: {len(labels)} labels do not fit {steps} steps")
    if steps == 0:
        return [], CtcHypothesis([], 0.0, [])
    states = torch.tensor([c for label in labels for c in (blank, label)] + [blank])
    skips = torch.zeros(len(states), dtype=torch.bool)
    skips[3::2] = states[3::2] != states[1:-2:2]
    score = torch.full((len(states),), _NEVER, dtype=y.dtype)
    score[:2] = y[0, states[:2]]
    moves = []
    for t in range(1, steps):
        padded = torch.nn.functional.pad(score, (2, 0), value=_NEVER)
        choices = torch.stack([score, padded[1:-1], padded[:-2].masked_fill(~skips, _NEVER)])
        best = choices.max(0)
        moves.append(best.indices)
        score = best.values + y[t, states]
    last = max(range(max(len(states) - 2, 0), len(states)), key=lambda s: float(score[s]))
    if score[last] == _NEVER:
        raise ValueError("targets: every path has probability 0")
    at, total = [last], float(score[last])
    for move in reversed(moves):
        at.append(at[-1] - int(move[at[-1]]))
    at.reverse()
    starts = [t for t, s in enumerate(at) if s % 2 and (t == 0 or at[t - 1] != s)]
    return [int(states[s]) for s in at], CtcHypothesis(labels, total, starts)
