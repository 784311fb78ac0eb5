"""Strings of spoken digits: with CTC by a BiLSTM and by truncated self-attention, and by a network with an HMM.

Graves, Fernández, Gomez, Schmidhuber, 2006; Yeh et al., 2019; Bourlard, Morgan, 1994; data: Free Spoken Digit Dataset.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet import nn
from pyseqnet.data import speech
from pyseqnet.decoding import ctc_beam_search, ctc_greedy_search
from pyseqnet.models.speech_recognizer import ENCODERS, SpeechRecognizer
from pyseqnet.recipes import Score, Settings, hybrid_digits
from pyseqnet.recipes.edit_distance import error_rate
from pyseqnet.training import History, fit

BLANK = 0  # the digit d has label d + 1
LONGEST = 5  # digits of a string
BATCH = 16
STEPS, QUICK_STEPS = 2400, 40
TESTED = 200  # strings
LEARNING_RATE = 1.5e-3


def labels_of(strings: speech.Strings) -> list[list[int]]:
    return [[digit + 1 for digit in one] for one in strings.digits]


def train(
    encoder: str, pool: list[speech.Recording], test: speech.Strings, settings: Settings
) -> tuple[SpeechRecognizer, History]:
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    model = SpeechRecognizer(speech.BANDS, 11, encoder=encoder)
    criterion = nn.CTCLoss(BLANK, from_logits=True, zero_infinity=True)

    def loss() -> Tensor:
        drawn = speech.strings(pool, BATCH, generator, 2 if settings.quick else LONGEST)
        scores, steps = model(drawn.frames, drawn.lengths)
        labels = labels_of(drawn)
        targets = torch.tensor([label for one in labels for label in one])
        value: Tensor = criterion(scores, targets, steps, torch.tensor([len(one) for one in labels]))
        return value

    history = fit(
        model,
        loss,
        settings.steps(STEPS, QUICK_STEPS),
        learning_rate=LEARNING_RATE,
        cycle=encoder == "attention",  # a BiLSTM whose rate begins low stays for long where only blanks are said
        evaluate=lambda: {"digit error": error_rate(recognise(model, test), labels_of(test))},
        name=f"spoken digits, {encoder}",
        progress=settings.progress,
    )
    return model, history


def recognise(model: SpeechRecognizer, strings: speech.Strings, beam: int = 0) -> list[list[int]]:
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
    test = speech.strings([one for one in everything if one.held_out], settings.steps(TESTED, 20), generator, LONGEST)
    truth = labels_of(test)
    scores = []
    for encoder in ENCODERS:
        model, history = train(encoder, pool, test, settings)
        greedy = 100 * error_rate(recognise(model, test), truth)
        beam = 100 * error_rate(recognise(model, test, beam=8), truth)
        scores += [
            Score(f"digit error, {encoder}, best path, %", greedy, 5.0, at_least=False),
            Score(f"digit error, {encoder}, prefix beam of 8, %", beam, 5.0, at_least=False),
            Score.fall(encoder, history),
        ]
        with torch.no_grad():
            found, steps = model(test.frames[:1], test.lengths[:1])
        probabilities = found.softmax(2)[: int(steps[0]), 0].t()
        said = " ".join(str(digit) for digit in test.digits[0])
        names = ["blank", *(str(digit) for digit in range(10))]
        times = [f"{0.04 * step:.1f}" if step % 5 == 0 else "" for step in range(int(steps[0]))]
        draw.matrix(probabilities, names, times, settings.out / f"{encoder}.png", f"{said}: probabilities over seconds")
    return scores + hybrid_digits.compare(pool, test, settings, LONGEST)
