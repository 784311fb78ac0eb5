"""Speech in one language to text in another, with no text of the first one in between.

Weiss, Chorowski, Jaitly, Wu, Chen: Sequence-to-sequence models can directly translate foreign speech, 2017.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyseqnet import nn
from pyseqnet.models.recurrent_translator import RecurrentTranslator


class SpeechTranslator(RecurrentTranslator):
    """`RecurrentTranslator` whose source are frames of speech; two convolutions with stride 2 shorten them.

    Args:
        bands, target_symbols: features of a frame, symbols to write.
        **options: as of `RecurrentTranslator`.

    Shapes: source (B, T, bands), filled up with frames of zeros; target (B, L) int64; output (B, L, target_symbols).

    >>> model = SpeechTranslator(40, 14).eval()
    >>> frames = torch.randn(2, 50, 40)
    >>> model(frames, torch.tensor([[1, 4], [1, 3]])).shape
    torch.Size([2, 2, 14])
    >>> model.search(frames, 6).tokens.shape[:2]
    torch.Size([2, 1])
    """

    def __init__(self, bands: int, target_symbols: int, *, embedding_size: int = 64, **options: Any) -> None:
        super().__init__(1, target_symbols, embedding_size=embedding_size, **options)
        self.source_embedding: Any = torch.nn.ModuleList(
            nn.Conv1dReLU(size, embedding_size, 3, stride=2, padding=1) for size in (bands, embedding_size)
        )

    def embed(self, source: Tensor) -> tuple[Tensor, Tensor]:
        lengths = (source != 0).any(2).sum(1)
        planes = source.transpose(1, 2)
        for layer in self.source_embedding:
            inside = torch.arange(planes.shape[2], device=source.device) < lengths.unsqueeze(1)
            # what stands behind an end is not read as if it were sound
            planes = layer(planes * inside.unsqueeze(1).to(planes))
            lengths = (lengths + 1) // 2
        return planes.transpose(1, 2), lengths
