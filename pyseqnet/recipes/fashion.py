"""Clothing (900 images of Fashion-MNIST) by a CNN and by a vision Transformer.

Xiao, Rasul, Vollgraf: Fashion-MNIST, 2017; Dosovitskiy et al.: An image is worth 16x16 words, 2021.
"""

from __future__ import annotations

from pyseqnet.data import images
from pyseqnet.models import ImageClassifier, VisionTransformer
from pyseqnet.recipes import Score, Settings
from pyseqnet.recipes.classify_images import accuracy, draw_errors, train

EPOCHS, QUICK_EPOCHS = 30, 3


def run(settings: Settings) -> list[Score]:
    data = images.fashion(settings.seed)
    epochs = settings.steps(EPOCHS, QUICK_EPOCHS)
    cnn = train(ImageClassifier(1, 28, (32, 64), 10, dropout=0.3), data, settings, epochs=epochs, name="CNN", shift=1)
    vit = VisionTransformer(10, image_size=28, patch_size=7, channels=1, dropout=0.1)
    transformer = train(vit, data, settings, epochs=epochs, name="vision Transformer", shift=1)
    draw_errors(cnn.model, data, settings.out / "errors.png")
    cnn_right = 100 * accuracy(cnn.model, data.test_images, data.test_labels)
    vit_right = 100 * accuracy(transformer.model, data.test_images, data.test_labels)
    # 675 training images: numbers for this subset alone, no published ones beside them
    return [
        Score("accuracy of the CNN, %", cnn_right, 78.0),
        Score("accuracy of the vision Transformer, %", vit_right, 65.0),
        Score.fall("CNN", cnn.history),
        Score.fall("vision Transformer", transformer.history),
    ]
