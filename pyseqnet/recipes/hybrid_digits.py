"""Spoken digits by a network and a hidden Markov model: the network says which state a frame is in, the model what
follows what.

Bourlard, Morgan: Connectionist speech recognition: a hybrid approach, 1994.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyseqnet.chain import hmm_decode, scaled_log_likelihoods
from pyseqnet.data import speech
from pyseqnet.data.text import padded
from pyseqnet.decoding import ctc_collapse
from pyseqnet.models.speech_recognizer import SpeechRecognizer
from pyseqnet.recipes import Score, Settings
from pyseqnet.recipes.edit_distance import error_rate
from pyseqnet.training import fit

PARTS = 3  # states of a digit, each as long as the others in the alignment; state 0 is silence
STATES = 1 + 10 * PARTS
STEP = 4 * speech.HOP  # samples from one output of the network to the next
BATCH = 16
STEPS, QUICK_STEPS = 1200, 15
COUNTED = 400  # strings from which the model is counted


class Model(NamedTuple):
    """Logarithms of how often a state comes first, follows another, and comes at all."""

    initial: Tensor
    transitions: Tensor
    priors: Tensor


def states(strings: speech.Strings, steps: Tensor) -> list[Tensor]:
    """The state of each of the network's steps: a digit's span is cut into equal parts."""
    found = []
    for digits, spans, count in zip(strings.digits, strings.spans, steps.tolist(), strict=True):
        at = torch.arange(count) * STEP + speech.WINDOW // 2
        row = torch.zeros(count, dtype=torch.int64)
        for digit, (start, end) in zip(digits, spans, strict=True):
            inside = (at >= start) & (at < end)
            part = (at[inside] - start) * PARTS // (end - start)
            row[inside] = 1 + PARTS * digit + part
        found.append(row)
    return found


def count(rows: list[Tensor]) -> Model:
    """From aligned strings. What never happened is forbidden."""
    pairs = torch.cat([row[:-1] * STATES + row[1:] for row in rows])
    follow = torch.bincount(pairs, minlength=STATES * STATES).view(STATES, STATES).float()
    first = torch.bincount(torch.stack([row[0] for row in rows]), minlength=STATES).float()
    share = torch.bincount(torch.cat(rows), minlength=STATES).float()
    return Model(
        (first / first.sum()).log(),
        (follow / follow.sum(1, keepdim=True).clamp_min(1)).log(),
        (share.clamp_min(1) / share.sum()).log(),  # a state that never came is forbidden by its transitions
    )


def digits_of(path: list[int]) -> list[int]:
    """A digit begins where its first state comes after another one."""
    pairs = zip([0, *path], path, strict=False)
    return [(now - 1) // PARTS for before, now in pairs if now and (now - 1) % PARTS == 0 and before != now]


def compare(pool: list[speech.Recording], test: speech.Strings, settings: Settings, longest: int) -> list[Score]:
    """Digit errors of the decoded model, and of the network's likeliest state at each step."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    network = SpeechRecognizer(speech.BANDS, STATES)

    def draw(size: int) -> speech.Strings:
        return speech.strings(pool, size, generator, longest)

    def loss() -> Tensor:
        drawn = draw(BATCH)
        scores, steps = network(drawn.frames, drawn.lengths)
        wanted, _ = padded([row + 1 for row in states(drawn, steps)])  # 0 is what lies behind an end
        return torch.nn.functional.cross_entropy(scores.transpose(0, 1).flatten(0, 1), wanted.flatten() - 1,
                                                 ignore_index=-1)  # fmt: skip

    history = fit(
        network,
        loss,
        settings.steps(STEPS, QUICK_STEPS),
        learning_rate=3e-3,
        name="states of spoken digits",
        progress=settings.progress,
    )
    drawn = draw(settings.steps(COUNTED, 60))
    model = count(states(drawn, (drawn.lengths + 3) // 4))
    with torch.no_grad():
        scores, steps = network(test.frames, test.lengths)
    posteriors = scores.transpose(0, 1).log_softmax(2)
    mask = torch.arange(posteriors.shape[1]) < steps.unsqueeze(1)
    paths = hmm_decode(scaled_log_likelihoods(posteriors, model.priors), mask, model.initial, model.transitions)
    digits = (posteriors.argmax(2) - 1).div(PARTS, rounding_mode="floor") + 1  # 0 is silence
    alone = [ctc_collapse(row[:length]) for row, length in zip(digits.tolist(), steps.tolist(), strict=True)]
    error = 100 * error_rate([digits_of(path) for path in paths], test.digits)
    error_alone = 100 * error_rate([[label - 1 for label in row] for row in alone], test.digits)
    return [
        Score("digit error, network and HMM, %", error, 5.0, at_least=False),
        Score("digit error, the network's own labels, %", error_alone),
        Score("points gained by the HMM over the network's own labels", error_alone - error, 0.0),
        Score.fall("states", history),
    ]
