"""scikit-learn's digits by a CNN and by a vision Transformer: the data come with the library.

LeCun et al., 1998; Dosovitskiy et al., 2021.
"""

from __future__ import annotations

from pyseqnet.data import images
from pyseqnet.recipes import Score, Settings
from pyseqnet.recipes.classify_images import compare

EPOCHS, QUICK_EPOCHS = 40, 2


def run(settings: Settings) -> list[Score]:
    data = images.digits(settings.seed)
    epochs = settings.steps(EPOCHS, QUICK_EPOCHS)
    transformer = {"patch_size": 2, "num_layers": 2}
    return compare(data, settings, epochs=epochs, dropout=0.2, transformer=transformer, goals=(98.0, 86.0))
