"""Questions about three spoken digits, answered from the sound: which was second, which is largest, was there a seven?

Tseng, Shen, Lee, Lee: Towards machine comprehension of spoken content, 2016; data: Free Spoken Digit Dataset. Beside
it: the commonest answer to each question, which needs no listening.
"""

from __future__ import annotations

import collections
import random

import torch
from torch import Tensor

from pyseqnet.data import speech
from pyseqnet.data.text import Vocabulary, padded
from pyseqnet.models import SpokenQuestionAnswerer
from pyseqnet.recipes import Score, Settings
from pyseqnet.training import fit

SPOKEN = 3  # digits of a recording
ASKED = 4  # questions about one
BATCH = 12  # recordings
STEPS, QUICK_STEPS = 1500, 20
TESTED = 300  # held-out recordings
LEARNING_RATE = 1.5e-3
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANSWERS = (*NAMES, "yes", "no")
WORDS = Vocabulary(
    [["which", "was", "is", "the", "first", "second", "third", "largest", "smallest", "there", "a", *NAMES]]
)


def question(digits: list[int], chance: random.Random) -> tuple[list[str], str]:
    """A question about the digits, and its answer."""
    kind = chance.choice(("place", "size", "there"))
    if kind == "place":
        place = chance.randrange(SPOKEN)
        return ["which", "was", "the", ("first", "second", "third")[place]], NAMES[digits[place]]
    if kind == "size":
        choose, name = chance.choice(((max, "largest"), (min, "smallest")))
        return ["which", "is", "the", name], NAMES[choose(digits)]
    digit = chance.choice(digits) if chance.random() < 0.5 else chance.randrange(10)
    return ["was", "there", "a", NAMES[digit]], "yes" if digit in digits else "no"


class Asked:
    """Recordings with questions: words, the same as numbers side by side, and the numbers of the answers."""

    def __init__(self, strings: speech.Strings, chance: random.Random) -> None:
        pairs = [question(digits, chance) for digits in strings.digits for _ in range(ASKED)]
        self.strings = strings
        self.words = [words for words, _ in pairs]
        self.input, self.lengths = padded([WORDS.encode(words) for words in self.words])
        self.answers = torch.tensor([ANSWERS.index(answer) for _, answer in pairs])

    def score(self, model: SpokenQuestionAnswerer) -> Tensor:
        found: Tensor = model(self.strings.frames, self.strings.lengths, self.input, self.lengths)
        return found


def deaf(test: Asked, chance: random.Random) -> float:
    """The accuracy of the commonest answer to each question."""
    counts: dict[tuple[str, ...], collections.Counter[str]] = {}
    for _ in range(20000):
        words, answer = question([chance.randrange(10) for _ in range(SPOKEN)], chance)
        counts.setdefault(tuple(words), collections.Counter())[answer] += 1
    guesses = [ANSWERS.index(counts[tuple(words)].most_common(1)[0][0]) for words in test.words]
    return (torch.tensor(guesses) == test.answers).double().mean().item()


def run(settings: Settings) -> list[Score]:
    from pyseqnet.recipes import draw

    everything = speech.recordings()
    pool, held_out = ([one for one in everything if one.held_out is kept] for kept in (False, True))
    generator, chance = torch.Generator().manual_seed(settings.seed), random.Random(settings.seed)
    test = Asked(
        speech.strings(
            held_out, settings.steps(TESTED, 20), torch.Generator().manual_seed(settings.seed + 1), SPOKEN, SPOKEN
        ),
        random.Random(settings.seed + 1),
    )
    torch.manual_seed(settings.seed)
    model = SpokenQuestionAnswerer(speech.BANDS, len(WORDS), len(ANSWERS))

    def loss() -> Tensor:
        drawn = Asked(speech.strings(pool, BATCH, generator, SPOKEN, SPOKEN), chance)
        return torch.nn.functional.cross_entropy(drawn.score(model), drawn.answers)

    def accuracy() -> float:
        return (test.score(model).argmax(1) == test.answers).double().mean().item()

    history = fit(
        model,
        loss,
        settings.steps(STEPS, QUICK_STEPS),
        learning_rate=LEARNING_RATE,
        evaluate=lambda: {"accuracy": accuracy()},
        name="spoken questions",
        progress=settings.progress,
    )
    strings = test.strings
    with torch.no_grad():
        right = 100 * accuracy()
        _, weights = model(
            strings.frames[:1], strings.lengths[:1], test.input[:ASKED], test.lengths[:ASKED], need_weights=True
        )
    times = [f"{0.04 * step:.1f}" if step % 5 == 0 else "" for step in range(weights.shape[1])]
    said = " ".join(NAMES[digit] for digit in strings.digits[0])
    asked = [" ".join(words) for words in test.words[:ASKED]]
    draw.matrix(weights, asked, times, settings.out / "listening.png", f"{said}: where each question listens")
    guessed = 100 * deaf(test, random.Random(settings.seed + 2))
    return [
        Score("accuracy, %", right, 80.0),
        Score("accuracy of the commonest answer to each question, %", guessed),
        Score("points gained by listening", right - guessed, 0.0),
        Score.fall("spoken questions", history),
    ]
