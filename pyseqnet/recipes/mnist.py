"""Handwritten digits (MNIST) by a small CNN, and what turning and scaling does to it with and without augmentation.

LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition, 1998; Simard, Steinkraus,
Platt: Best practices for convolutional neural networks applied to visual document analysis, 2003.
"""

from __future__ import annotations

from pyseqnet.data import images
from pyseqnet.models import ImageClassifier
from pyseqnet.recipes import Score, Settings
from pyseqnet.recipes.classify_images import Trained, accuracy, draw_errors, train

EPOCHS = 2
QUICK_IMAGES = 2048
ROTATION, SCALES = 45.0, (0.6, 1.3)  # of the augmentation: up to that many degrees both ways


def run(settings: Settings) -> list[Score]:
    data = images.mnist()
    if settings.quick:
        data = images.first(data, QUICK_IMAGES)

    def trained(name: str, degrees: float, scales: tuple[float, float]) -> Trained:
        model = ImageClassifier(1, data.size, (16, 32), len(data.classes))
        epochs = 1 if settings.quick else EPOCHS
        return train(model, data, settings, epochs=epochs, name=name, degrees=degrees, scales=scales)

    plain = trained("mnist", 0.0, (1.0, 1.0))
    augmented = trained("mnist, augmented", ROTATION, SCALES)
    draw_errors(plain.model, data, settings.out / "errors.png")

    scores = [Score.fall("plain", plain.history)]
    drops = {}
    for name, one in (("plain", plain), ("augmented", augmented)):
        clean = accuracy(one.model, data.test_images, data.test_labels)
        turned = accuracy(one.model, images.turned_and_scaled(data.test_images, ROTATION, 1.0), data.test_labels)
        small = accuracy(one.model, images.turned_and_scaled(data.test_images, 0.0, SCALES[0]), data.test_labels)
        drops[name] = 100 * (clean - turned)
        scores.append(Score(f"accuracy, {name}, %", 100 * clean, 98.5 if name == "plain" else None))
        scores.append(Score(f"accuracy, {name}, at {SCALES[0]:g} of the size, %", 100 * small))
    scores.append(Score("points lost by turning 45 degrees, plain", drops["plain"], 20.0))
    scores.append(Score("points lost by turning 45 degrees, augmented", drops["augmented"], 8.0, at_least=False))
    return scores
