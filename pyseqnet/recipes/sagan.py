"""Drawing digits: a GAN with self-attention learns scikit-learn's digits; beside it the same without attention.

Zhang, Goodfellow, Metaxas, Odena: Self-attention generative adversarial networks, 2019. The quality is the Fréchet
distance (Heusel et al., 2017) between the features of real and drawn images, here those of a small CNN that tells the
digits: far smaller than Inception's, so the numbers compare only with each other.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pyseqnet import nn
from pyseqnet.data import images
from pyseqnet.models import ImageClassifier, ImageDiscriminator, ImageGenerator
from pyseqnet.recipes import Score, Settings
from pyseqnet.recipes.classify_images import train as train_classifier
from pyseqnet.training import History, batches, fit

BATCH = 64
STEPS, QUICK_STEPS = 2500, 12
GENERATOR_RATE, DISCRIMINATOR_RATE = 2e-4, 4e-4  # two time scales, as in the paper
BETAS = (0.0, 0.9)
DRAWN = 1000  # for a distance
SHOWN = 32


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Between the normal distributions that fit features (N, F) and (M, F):
    ``|m - n|^2 + tr(C + D - 2 (C D)^(1/2))`` of their means and covariances."""
    one, other = one.double(), other.double()
    apart = (one.mean(0) - other.mean(0)).square().sum()
    first, second = torch.cov(one.t()), torch.cov(other.t())
    # the root's trace: C D has the eigenvalues of a positive semidefinite matrix
    root = torch.linalg.eigvals(first @ second).real.clamp_min(0).sqrt().sum()
    return (apart + first.trace() + second.trace() - 2 * root).item()


@torch.no_grad()
def distance(judge: ImageClassifier, drawn: Tensor, real: Tensor) -> float:
    return frechet_distance(*(judge.features(part).flatten(1) for part in (drawn, real)))


@torch.no_grad()
def sample(generator: ImageGenerator, count: int, settings: Settings) -> Tensor:
    """Images from the same noise every time."""
    noise = torch.randn(count, generator.noise, generator=torch.Generator().manual_seed(settings.seed))
    images: Tensor = generator(noise)
    return images


def train_pair(
    attention: bool, real: Tensor, judge: ImageClassifier, settings: Settings
) -> tuple[ImageGenerator, History]:
    """Hinge loss; the discriminator takes a step of its own before each of the generator's."""
    torch.manual_seed(settings.seed)
    size = real.shape[-1]
    generator, discriminator = ImageGenerator(size, attention=attention), ImageDiscriminator(size, attention=attention)
    own = torch.optim.Adam(discriminator.parameters(), DISCRIMINATOR_RATE, BETAS)
    draw_batch = batches(len(real), BATCH, settings.seed)

    def loss() -> tuple[Tensor, dict[str, float]]:
        drawn = generator(torch.randn(BATCH, generator.noise))
        own.zero_grad()  # of what the generator's step left there, too
        told = (1 - discriminator(real[draw_batch()])).relu().mean() + (1 + discriminator(drawn.detach())).relu().mean()
        told.backward()
        own.step()
        return -discriminator(drawn).mean(), {"discriminator": told.item()}

    history = fit(
        generator,
        loss,
        settings.steps(STEPS, QUICK_STEPS),
        optimizer=torch.optim.Adam(generator.parameters(), GENERATOR_RATE, BETAS),
        cycle=False,
        evaluate=lambda: {"distance": distance(judge, sample(generator, DRAWN, settings), real)},
        name="with attention" if attention else "without attention",
        progress=settings.progress,
    )
    return generator, history


def run(settings: Settings) -> list[Score]:
    from pyseqnet.recipes import draw

    data = images.digits(settings.seed)
    low, high = data.train_images.min(), data.train_images.max()
    train, test = (2 * (part - low) / (high - low) - 1 for part in (data.train_images, data.test_images))
    data = dataclasses.replace(data, train_images=train, test_images=test)
    judge = ImageClassifier(1, data.size, (32, 64), len(data.classes))
    train_classifier(judge, data, settings, epochs=settings.steps(20, 2), name="judge", shift=1)

    block, probe = nn.SelfAttention2d(16), torch.randn(2, 16, 8, 8)
    scores = [Score("what the block changes at the start", (block(probe) - probe).abs().max().item(), 0.0, False, True)]
    # each pixel as often as bright as in the digits, but without regard to the others
    shuffled = torch.stack([column[torch.randperm(len(train))] for column in train.flatten(1).t()], 1).view_as(train)
    baseline = distance(judge, shuffled, train)
    for attention, name in ((True, "with attention"), (False, "without attention")):
        generator, history = train_pair(attention, train, judge, settings)
        final, first = history.scores["distance"][-1], history.scores["distance"][0]
        goal = baseline / 2 if attention else None
        scores.append(Score(f"distance of what is drawn, {name}", final, goal, at_least=False))
        scores.append(Score(f"fall of the distance, {name}", first - final, 0.0, always=attention))
        drawn = sample(generator, SHOWN, settings)[:, 0]
        draw.images(drawn, [""] * SHOWN, settings.out / f"{name.replace(' ', '_')}.png")
        if generator.attention is not None:
            scores.append(Score("gamma after the training", generator.attention.gamma.item()))
    return [
        *scores,
        Score("distance of digits whose pixels are independent", baseline),
        Score("distance of held-out digits", distance(judge, test, train)),
    ]
