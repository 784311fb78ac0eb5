"""Clothing (900 images of Fashion-MNIST) by a CNN and by a vision Transformer.

Xiao, Rasul, Vollgraf: Fashion-MNIST, 2017; Dosovitskiy et al.: An image is worth 16x16 words, 2021.
"""

from __future__ import annotations

from pyseqnet.data import images
from pyseqnet.recipes import Score, Settings
from pyseqnet.recipes.classify_images import compare

EPOCHS, QUICK_EPOCHS = 30, 3


def run(settings: Settings) -> list[Score]:
    data = images.fashion(settings.seed)
    epochs = settings.steps(EPOCHS, QUICK_EPOCHS)
    transformer = {"patch_size": 7, "dropout": 0.1}
    # 675 training images: numbers for this subset alone, no published ones beside them
    return compare(data, settings, epochs=epochs, dropout=0.3, transformer=transformer, goals=(78.0, 65.0))
