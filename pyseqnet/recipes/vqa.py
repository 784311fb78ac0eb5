"""Questions about an image (easy-VQA): the question reads the regions that convolutions find.

Xu, Saenko, 2015; Yang et al., 2016; data by Zhou, 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet.data import easy_vqa
from pyseqnet.data.text import Vocabulary, padded
from pyseqnet.models.visual_question_answerer import VisualQuestionAnswerer
from pyseqnet.recipes import Score, Settings
from pyseqnet.training import batches, fit

BATCH = 64
STEPS, QUICK_STEPS = 2400, 30
LEARNING_RATE = 1e-3  # chosen, as what is normalised, on questions about 400 of the training images
GLANCE = 1000  # test questions that are looked at during the training
SHOWN = 16


def run(settings: Settings) -> list[Score]:
    train, test, answers = easy_vqa.load()
    vocabulary = Vocabulary(train.questions)
    model = VisualQuestionAnswerer(len(vocabulary), len(answers))
    deviation, mean = torch.std_mean(train.images, (0, 2, 3), keepdim=True)
    draw_batch = batches(len(train.questions), BATCH, settings.seed)
    encoded = {id(part): [vocabulary.encode(question) for question in part.questions] for part in (train, test)}

    def score(part: easy_vqa.Part, chosen: Tensor) -> Tensor:
        asked, lengths = padded([encoded[id(part)][i] for i in chosen.tolist()])
        found: Tensor = model((part.images[part.image[chosen]] - mean) / deviation, asked, lengths)
        return found

    def loss() -> Tensor:
        chosen = draw_batch()
        return torch.nn.functional.cross_entropy(score(train, chosen), train.answers[chosen])

    def accuracy(chosen: Tensor) -> float:
        right = sum(int((score(test, part).argmax(1) == test.answers[part]).sum()) for part in chosen.split(BATCH))
        return right / len(chosen)

    glance = torch.arange(len(test.questions))[:: max(1, len(test.questions) // settings.steps(GLANCE, 100))]
    history = fit(
        model,
        loss,
        settings.steps(STEPS, QUICK_STEPS),
        learning_rate=LEARNING_RATE,
        evaluate=lambda: {"accuracy": accuracy(glance)},
        name="visual questions",
        progress=settings.progress,
    )
    with torch.no_grad():
        everything = torch.arange(len(test.questions)) if not settings.quick else glance
        right = 100 * accuracy(everything)
        _draw(model, (mean, deviation), test, encoded[id(test)], answers, settings)
    return [Score("accuracy, %", right, 95.0), Score.fall("visual questions", history)]


def _draw(
    model: VisualQuestionAnswerer,
    scale: tuple[Tensor, Tensor],
    test: easy_vqa.Part,
    encoded: list[Tensor],
    answers: list[str],
    settings: Settings,
) -> None:
    """Questions with what was answered; the image is bright where it was read."""
    from pyseqnet.recipes import draw

    chosen = torch.linspace(0, len(test.questions) - 1, SHOWN).long()
    images = test.images[test.image[chosen]]
    asked, lengths = padded([encoded[i] for i in chosen.tolist()])
    scores, weights = model((images - scale[0]) / scale[1], asked, lengths, need_weights=True)
    bright = torch.nn.functional.interpolate(weights.unsqueeze(1), images.shape[2:], mode="nearest")
    bright = bright / bright.amax((2, 3), keepdim=True)
    shown = (images * (0.35 + 0.65 * bright)).permute(0, 2, 3, 1)
    titles = [
        f"{' '.join(test.questions[i])}\n{answers[found]}"
        for i, found in zip(chosen.tolist(), scores.argmax(1).tolist(), strict=True)
    ]
    draw.images(shown, titles, settings.out / "read.png", columns=4)
