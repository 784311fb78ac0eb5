"""English speech to German text: two spoken digits become the number that they write, in German words.

"four seven" is "sieben und vierzig": the order changes, and 11 and 12 have words of their own. With and without
attention. Weiss et al., Sequence-to-sequence models can directly translate foreign speech, 2017; data: Free Spoken
Digit Dataset.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet.data import speech
from pyseqnet.data.text import Vocabulary, padded
from pyseqnet.models import SpeechTranslator
from pyseqnet.recipes import Score, Settings
from pyseqnet.recipes.sequence_pairs import BEGIN, END, SPECIAL, cross_entropy, symbols
from pyseqnet.training import History, fit

BATCH = 32
STEPS, QUICK_STEPS = 1500, 25
TESTED = 400  # strings of held-out recordings
LONGEST = 4  # words
LEARNING_RATE = 3e-3
ONES = ("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun")
TENS = ("", "zehn", "zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig")
OWN = {11: "elf", 12: "zwölf"}


def german(digits: list[int]) -> list[str]:
    """The words of the number with these two digits.

    >>> german([4, 7]), german([1, 3]), german([0, 5]), german([2, 0])
    (['sieben', 'und', 'vierzig'], ['drei', 'zehn'], ['fünf'], ['zwanzig'])
    """
    tens, ones = digits
    number = 10 * tens + ones
    if number in OWN:
        return [OWN[number]]
    if tens == 0:
        return [ONES[ones]]
    if ones == 0:
        return [TENS[tens]]
    if tens == 1:
        return [ONES[ones], TENS[1]]
    return ["ein" if ones == 1 else ONES[ones], "und", TENS[tens]]


def train(
    attention: str, pool: list[speech.Recording], test: speech.Strings, words: Vocabulary, settings: Settings
) -> tuple[SpeechTranslator, History]:
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    model = SpeechTranslator(
        speech.BANDS, len(words), attention=attention, dropout=0.1, **symbols(words)
    )  # fmt: skip

    def loss() -> Tensor:
        drawn = speech.strings(pool, BATCH, generator, 2, 2)
        target, _ = padded([words.encode([BEGIN, *german(digits), END]) for digits in drawn.digits])
        return cross_entropy(model(drawn.frames, target[:, :-1]), target, smoothing=0.05)

    history = fit(
        model,
        loss,
        settings.steps(STEPS, QUICK_STEPS),
        learning_rate=LEARNING_RATE,
        evaluate=lambda: {"right": right(model, test, words)},
        looks=5,
        name=f"speech translation, attention: {attention}",
        progress=settings.progress,
    )
    return model, history


def write(model: SpeechTranslator, strings: speech.Strings, words: Vocabulary) -> list[list[str]]:
    found = model.search(strings.frames, LONGEST).sequences(end=words[END])
    return [[str(word) for word in words.decode(best)] for (best,) in found]


def right(model: SpeechTranslator, strings: speech.Strings, words: Vocabulary) -> float:
    """The share of numbers that are written without a fault."""
    found = write(model, strings, words)
    return sum(a == german(digits) for a, digits in zip(found, strings.digits, strict=True)) / len(found)


def run(settings: Settings) -> list[Score]:
    from pyseqnet.recipes import draw

    everything = speech.recordings()
    pool = [one for one in everything if not one.held_out]
    generator = torch.Generator().manual_seed(settings.seed + 1)
    test = speech.strings(
        [one for one in everything if one.held_out], settings.steps(TESTED, 20), generator, 2, 2
    )  # fmt: skip
    words = Vocabulary((german([i // 10, i % 10]) for i in range(100)), special=SPECIAL)
    scores, histories = [], {}
    for attention, name in (("additive", "attention"), ("none", "one vector")):
        model, histories[name] = train(attention, pool, test, words, settings)
        goal = 85.0 if name == "attention" else None
        scores.append(Score(f"numbers written right, {name}, %", 100 * right(model, test, words), goal))
        if name == "attention":
            found = model.search(test.frames[:1], LONGEST, return_alignments=True)
            said = " ".join(str(digit) for digit in test.digits[0])
            written = [str(word) for word in words.decode(found.tokens[0, 0].tolist())]
            assert found.alignments is not None
            weights = found.alignments[0, 0]
            times = [f"{0.04 * step:.1f}" if step % 5 == 0 else "" for step in range(weights.shape[1])]
            draw.matrix(weights, written, times, settings.out / "attention.png", f"{said}: where each word is heard")
    commonest = max(sum(one == other for one in test.digits) for other in test.digits) / len(test.digits)
    draw.curves(histories, settings.out / "learning_curves.png")
    return [
        *scores,
        Score("the commonest number, %", 100 * commonest),
        Score.fall("attention", histories["attention"]),
    ]
