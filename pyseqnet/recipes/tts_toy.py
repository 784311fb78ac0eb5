"""Speaking digits: one or two written digits become the mel frames of one speaker, with guided attention.

Wang et al., 2017; Shen et al., 2018; Tachibana, Uenoyama, Aihara, 2018; data: Free Spoken Digit Dataset. What is spoken
from the text alone is recognised by the nearest mean of the speaker's digits, each recording stretched to one length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet.data import speech
from pyseqnet.data.text import Vocabulary, padded
from pyseqnet.models import SpeechSynthesizer
from pyseqnet.models.speech_synthesizer import Spoken
from pyseqnet.recipes import Score, Settings
from pyseqnet.recipes.spoken_qa import NAMES
from pyseqnet.training import batches, fit, guided_attention_loss

SPEAKER = 0
STRINGS, TESTED = 1500, 100  # of one or two digits
BATCH = 24
EPOCHS, QUICK_STEPS = 20, 15
LEARNING_RATE = 3e-3
GUIDE = 5.0  # weight of the guided attention, beside the absolute error of the frames
STEPS = 12  # spoken from one digit's name
STRETCHED = 16  # frames
LETTERS = Vocabulary([*NAMES, " "])


class Read:
    """Strings with their text as numbers; frames filled up to whole steps."""

    def __init__(self, strings: speech.Strings, step: int) -> None:
        self.texts = [LETTERS.encode(" ".join(NAMES[digit] for digit in digits)) for digits in strings.digits]
        self.steps = (strings.lengths + step - 1) // step
        self.frames = [row[:length] for row, length in zip(strings.frames, strings.lengths.tolist(), strict=True)]
        self.step = step

    def batch(self, chosen: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Text, its lengths, frames (B, T, bands), which of them are real (B, T), steps (B,)."""
        text, lengths = padded([self.texts[i] for i in chosen])
        frames, counts = padded([self.frames[i] for i in chosen])
        frames = torch.nn.functional.pad(frames, (0, 0, 0, -frames.shape[1] % self.step))
        return text, lengths, frames, torch.arange(frames.shape[1]) < counts.unsqueeze(1), self.steps[chosen]


def stretched(frames: Tensor) -> Tensor:
    """(T, bands) as `STRETCHED` frames, in one row."""
    return torch.nn.functional.interpolate(frames.t().unsqueeze(0), STRETCHED, mode="linear")[0].t().flatten()


def ends(spoken: Spoken, step: int) -> list[int]:
    """How many frames each row has up to the first step that says it is the last."""
    last = torch.cat([spoken.stop > 0, torch.ones(len(spoken.stop), 1, dtype=torch.bool)], 1).int().argmax(1)
    return ((last + 1).clamp_max(spoken.stop.shape[1]) * step).tolist()


def run(settings: Settings) -> list[Score]:
    from pyseqnet.recipes import draw

    own = [one for one in speech.recordings() if one.speaker == SPEAKER]
    pool, held_out = ([one for one in own if one.held_out is kept] for kept in (False, True))
    generator = torch.Generator().manual_seed(settings.seed)
    torch.manual_seed(settings.seed)
    model = SpeechSynthesizer(len(LETTERS), speech.BANDS)
    step = model.frames_a_step
    train = Read(speech.strings(pool, settings.steps(STRINGS, 60), generator, 2), step)
    test = Read(speech.strings(held_out, settings.steps(TESTED, 10), generator, 2), step)
    draw_batch = batches(len(train.texts), BATCH, settings.seed, lengths=train.steps.tolist())

    def loss() -> tuple[Tensor, dict[str, float]]:
        text, lengths, frames, real, steps = train.batch(draw_batch().tolist())
        spoken = model(text, lengths, frames)
        apart = (spoken.frames - frames).abs().mean(2)[real].mean()
        at = torch.arange(spoken.stop.shape[1])
        inside, last = at < steps.unsqueeze(1), at == steps.unsqueeze(1) - 1
        stop = torch.nn.functional.binary_cross_entropy_with_logits(spoken.stop[inside], last[inside].float())
        guide = guided_attention_loss(spoken.weights, steps, lengths)
        return apart + stop + GUIDE * guide, {"error": apart.item(), "off the diagonal": guide.item()}

    history = fit(
        model,
        loss,
        settings.steps(EPOCHS * len(draw_batch), QUICK_STEPS),
        learning_rate=LEARNING_RATE,
        name="speaking",
        progress=settings.progress,
    )
    text, lengths, frames, real, steps = test.batch(list(range(len(test.texts))))
    mean = torch.cat(train.frames).mean(0)
    means = torch.stack(
        [
            torch.stack([stretched(speech.log_mel(one.samples)) for one in pool if one.digit == d]).mean(0)
            for d in range(10)
        ]
    )
    words, sizes = padded([LETTERS.encode(name) for name in NAMES])
    with torch.no_grad():
        told = model(text, lengths, frames)
        error, error_of_mean = ((found - frames).abs().mean(2)[real].mean().item() for found in (told.frames, mean))
        spoken = model.speak(words, sizes, STEPS)
    focus = told.weights.argmax(2)
    inside = torch.arange(1, focus.shape[1]) < steps.unsqueeze(1)
    forward = (focus.diff(dim=1) >= 0)[inside].double().mean().item()
    heard = torch.stack([stretched(row[:end]) for row, end in zip(spoken.frames, ends(spoken, step), strict=True)])
    own_means = torch.stack([stretched(speech.log_mel(one.samples)) for one in held_out])
    judged = (torch.cdist(own_means, means).argmin(1) == torch.tensor([one.digit for one in held_out])).double().mean()
    right = (torch.cdist(heard, means).argmin(1) == torch.arange(10)).double().mean().item()
    draw.images(
        spoken.frames[:, : ends(spoken, step)[0]].transpose(1, 2).flip(1), NAMES, settings.out / "spoken.png", 5
    )
    places = [f"{0.04 * i:.1f}" for i in range(int(steps[0]))]
    letters = [str(letter) for letter in LETTERS.decode(text[0, : int(lengths[0])].tolist())]
    draw.matrix(told.weights[0, : len(places), : len(letters)].t(), letters, places, settings.out / "attention.png")
    return [
        Score("error of the frames (mean frame: 1)", error / error_of_mean, 0.8, at_least=False),
        Score("steps at which attention does not go back, %", 100 * forward, 90.0),
        Score("digits recognised that were spoken from text alone, %", 100 * right, 70.0),
        Score("held-out recordings recognised in the same way, %", 100 * judged.item()),
        Score.fall("speaking", history),
    ]
