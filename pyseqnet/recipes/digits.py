"""scikit-learn's digits by a CNN and by a vision Transformer: the data come with the library.

LeCun et al., 1998; Dosovitskiy et al., 2021.
"""

from __future__ import annotations

from pyseqnet.data import images
from pyseqnet.models import ImageClassifier, VisionTransformer
from pyseqnet.recipes import Score, Settings
from pyseqnet.recipes.classify_images import accuracy, draw_errors, train

EPOCHS, QUICK_EPOCHS = 40, 2


def run(settings: Settings) -> list[Score]:
    data = images.digits(settings.seed)
    epochs = settings.steps(EPOCHS, QUICK_EPOCHS)
    cnn = train(ImageClassifier(1, 8, (32, 64), 10, dropout=0.2), data, settings, epochs=epochs, name="CNN", shift=1)
    vit = VisionTransformer(10, image_size=8, patch_size=2, channels=1, num_layers=2)
    transformer = train(vit, data, settings, epochs=epochs, name="vision Transformer", shift=1)
    draw_errors(cnn.model, data, settings.out / "errors.png")
    return [
        Score("accuracy of the CNN, %", 100 * accuracy(cnn.model, data.test_images, data.test_labels), 98.0),
        Score(
            "accuracy of the vision Transformer, %",
            100 * accuracy(transformer.model, data.test_images, data.test_labels),
            86.0,
        ),
        Score.fall("CNN", cnn.history),
    ]
