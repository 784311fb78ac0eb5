"""Strings of spoken digits, recognised with CTC by a BiLSTM and by truncated self-attention.

Graves, Fernández, Gomez, Schmidhuber, 2006; Yeh et al., 2019; data: Free Spoken Digit Dataset.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyseqnet import nn
from pyseqnet.data import speech
from pyseqnet.data.text import padded
from pyseqnet.decoding import ctc_beam_search, ctc_greedy_search
from pyseqnet.models.speech_recognizer import ENCODERS, SpeechRecognizer
from pyseqnet.recipes import Score, Settings
from pyseqnet.recipes.edit_distance import error_rate
from pyseqnet.training import History, fit

BLANK = 0  # the digit d has label d + 1
LONGEST = 5  # digits of a string
BATCH = 16
STEPS, QUICK_STEPS = 2400, 40
TESTED = 200  # strings
LEARNING_RATE = 1.5e-3


class Strings(NamedTuple):
    frames: Tensor  # (B, T, bands)
    lengths: Tensor
    labels: list[list[int]]


def draw_strings(
    pool: list[speech.Recording], count: int, generator: torch.Generator, longest: int = LONGEST
) -> Strings:
    """Strings of 1 to ``longest`` recordings of one speaker, with gaps."""
    speakers: dict[int, list[speech.Recording]] = {}
    for recording in pool:
        speakers.setdefault(recording.speaker, []).append(recording)
    frames, labels = [], []
    for _ in range(count):
        own = list(speakers.values())[int(torch.randint(len(speakers), (1,), generator=generator))]
        size = int(torch.randint(1, longest + 1, (1,), generator=generator))
        chosen = [own[i] for i in torch.randint(len(own), (size,), generator=generator).tolist()]
        frames.append(speech.log_mel(speech.joined([one.samples for one in chosen], generator)))
        labels.append([one.digit + 1 for one in chosen])
    return Strings(*padded(frames), labels)


def train(
    encoder: str, pool: list[speech.Recording], test: Strings, settings: Settings
) -> tuple[SpeechRecognizer, History]:
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    model = SpeechRecognizer(speech.BANDS, 11, encoder=encoder)
    criterion = nn.CTCLoss(BLANK, from_logits=True, zero_infinity=True)

    def loss() -> Tensor:
        frames, lengths, labels = draw_strings(pool, BATCH, generator, 2 if settings.quick else LONGEST)
        scores, steps = model(frames, lengths)
        targets = torch.tensor([label for one in labels for label in one])
        value: Tensor = criterion(scores, targets, steps, torch.tensor([len(one) for one in labels]))
        return value

    history = fit(
        model,
        loss,
        settings.steps(STEPS, QUICK_STEPS),
        learning_rate=LEARNING_RATE,
        cycle=encoder == "attention",  # a BiLSTM whose rate begins low stays for long where only blanks are said
        evaluate=lambda: {"digit error": error_rate(recognise(model, test), test.labels)},
        name=f"spoken digits, {encoder}",
        progress=settings.progress,
    )
    return model, history


def recognise(model: SpeechRecognizer, strings: Strings, beam: int = 0) -> list[list[int]]:
    """Labels of each string: the best path, or a prefix beam search of that width."""
    with torch.no_grad():
        scores, steps = model(strings.frames, strings.lengths)
    log_probs = scores.log_softmax(2)
    if beam:
        return [found[0].labels for found in ctc_beam_search(log_probs, steps, BLANK, beam_width=beam)]
    return [found.labels for found in ctc_greedy_search(log_probs, steps, BLANK)]


def run(settings: Settings) -> list[Score]:
    from pyseqnet.recipes import draw

    everything = speech.recordings()
    pool = [one for one in everything if not one.held_out]
    generator = torch.Generator().manual_seed(settings.seed + 1)
    test = draw_strings([one for one in everything if one.held_out], settings.steps(TESTED, 20), generator)
    scores = []
    for encoder in ENCODERS:
        model, history = train(encoder, pool, test, settings)
        greedy = 100 * error_rate(recognise(model, test), test.labels)
        beam = 100 * error_rate(recognise(model, test, beam=8), test.labels)
        scores += [
            Score(f"digit error, {encoder}, best path, %", greedy, 5.0, at_least=False),
            Score(f"digit error, {encoder}, prefix beam of 8, %", beam, 5.0, at_least=False),
            Score.fall(encoder, history),
        ]
        with torch.no_grad():
            found, steps = model(test.frames[:1], test.lengths[:1])
        probabilities = found.softmax(2)[: int(steps[0]), 0].t()
        said = " ".join(str(label - 1) for label in test.labels[0])
        names = ["blank", *(str(digit) for digit in range(10))]
        times = [f"{0.04 * step:.1f}" if step % 5 == 0 else "" for step in range(int(steps[0]))]
        draw.matrix(probabilities, names, times, settings.out / f"{encoder}.png", f"{said}: probabilities over seconds")
    return scores
