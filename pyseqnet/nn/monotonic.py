"""Monotonic attention as a layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyseqnet import chain


class MonotonicAttention(torch.nn.Module):
    """Attention that never steps back: expected alignments in training, hard ones in evaluation.

    Args:
        chunk: 1 reads the place the alignment looks at; more, a chunk that ends there, by soft attention (MoChA);
            None, everything up to there.
        noise: standard deviation of what is added to energies before the sigmoid in training, so that it learns to
            decide clearly.

    Papers: Raffel et al., Online and linear-time attention by enforcing monotonic alignments, 2017; Chiu and Raffel,
    Monotonic chunkwise attention, 2018.
    """

    def __init__(self, chunk: int | None = 1, noise: float = 1.0) -> None:
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be positive, got {chunk}")
        super().__init__()
        self.chunk, self.noise = chunk, noise

    def extra_repr(self) -> str:
        return f"chunk={self.chunk}, noise={self.noise}"

    def forward(
        self, energies: Tensor, values: Tensor, chunk_energies: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Contexts ``(..., I, D)`` and weights ``(..., I, J)``.

        Args:
            energies: ``(..., I, J)`` of stopping at place j for output i.
            values: ``(..., J, D)``.
            chunk_energies: ``(..., I, J)`` of the soft attention inside a chunk; None: ``energies``.
            mask: bool, broadcast to ``(..., I, J)``: on for places that exist. None: all. What stands where it is off
                for every output is never looked at, NaN included.
        """
        soft = energies if chunk_energies is None else chunk_energies
        if mask is not None:
            # In front of everything: a weight of 0, or a gradient of 0, times NaN would be NaN.
            hidden = ~mask.expand(energies.shape)
            energies, soft = energies.masked_fill(hidden, 0), soft.masked_fill(hidden, -math.inf)
            values = values.masked_fill(hidden.all(-2).unsqueeze(-1), 0)
        if self.training and self.noise:
            noisy = energies + self.noise * torch.randn_like(energies)
        else:
            noisy = energies
        p = noisy.sigmoid()
        if mask is not None:
            p = p.masked_fill(hidden, 0)
        weights = chain.monotonic_alignment(p) if self.training else chain.hard_monotonic_alignment(p)
        if self.chunk != 1:
            weights = chain.chunkwise_alignment(weights, soft, self.chunk)
        return weights @ values, weights
