"""Guided attention: alignments that should run along the diagonal are pulled there."""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 0.2  # of the diagonal band, as a share of the length (Tachibana et al.)


def guided_attention_loss(
    weights: Tensor,
    target_lengths: Tensor | None = None,
    source_lengths: Tensor | None = None,
    *,
    width: float = WIDTH,
) -> Tensor:
    """Mean of attention weights times ``1 - exp(-(t/T - s/S)^2 / (2 width^2))``: 0 on the diagonal, near 1 far off.

    For reading aloud and other monotonic tasks, added to the loss, mostly at the start of a training.

    Args:
        weights: ``(..., T, S)``, say ``(B, T, S)`` or ``(B, heads, T, S)``.
        target_lengths, source_lengths: ``(B,)``; T and S of each sequence, None for all. Padding does not count.
        width: of the band.

    Returns:
        A scalar; 0 for no positions.

    Equivalent to::

        W = 1 - exp(-(t / T - s / S) ** 2 / (2 * width ** 2))
        (weights * W).mean()

    Paper: Tachibana, Uenoyama, Aihara, Efficiently trainable text-to-speech system based on deep convolutional networks
    with guided attention, 2018.
    """
    if weights.dim() < 3:
        raise ValueError(f"weights must be (B, ..., T, S); got {tuple(weights.shape)}")
    if not width > 0:
        raise ValueError(f"width must be positive; got {width}")
    batch, steps, size = weights.shape[0], weights.shape[-2], weights.shape[-1]

    def places(count: int, lengths: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
        """(B, count) each: the place as a share of the length, and whether it is inside."""
        if lengths is None:
            lengths = torch.full((batch,), count, device=weights.device)
        if lengths.shape != (batch,):
            raise ValueError(f"{name} must be ({batch},); got {tuple(lengths.shape)}")
        at = torch.arange(count, device=weights.device)
        lengths = lengths.to(weights.device).unsqueeze(1)
        return at / lengths.clamp(min=1), at < lengths

    t, real_t = places(steps, target_lengths, "target_lengths")
    s, real_s = places(size, source_lengths, "source_lengths")
    penalty = 1 - torch.exp(-((t.unsqueeze(2) - s.unsqueeze(1)) ** 2) / (2 * width**2))
    real = real_t.unsqueeze(2) & real_s.unsqueeze(1)
    between = (batch, *[1] * (weights.dim() - 3), steps, size)
    kept = weights.masked_fill(~real.view(between), 0.0) * penalty.view(between).to(weights.dtype)
    return kept.sum() / (real.sum() * (weights[:1].numel() // max(1, steps * size))).clamp(min=1)
