"""What tells attention the order of a sequence: positions by formula, or learned. torch has no such layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

WAVELENGTH = 10000.0  # of the slowest pair, in units of 2 pi positions (Vaswani et al., section 3.5)
LEARNED_DEVIATION = 0.02  # of learned positions at the start (Devlin et al., BERT, 2019)


def _sequence_dim(input: Tensor, features: int, batch_first: bool) -> int:
    if input.dim() not in (2, 3) or input.shape[-1] != features:
        layout = "(B, T, E)" if batch_first else "(T, B, E)"
        raise ValueError(f"input must be {layout} or (T, E) with E = {features}; got {tuple(input.shape)}")
    return 1 if input.dim() == 3 and batch_first else 0


def _first_position(offset: int) -> int:
    if isinstance(offset, bool) or not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"offset must be an int, not {type(offset).__name__}")
    if offset < 0:
        raise ValueError(f"offset must not be negative; got {offset}")
    return offset


def _added(input: Tensor, rows: Tensor, dim: int) -> Tensor:
    """input + rows (T, E), the latter repeated over the batch."""
    rows = rows.to(input.dtype)
    return input + (rows.unsqueeze(1) if input.dim() == 3 and dim == 0 else rows)


class SinusoidalPositions(torch.nn.Module):
    """Adds ``sin(p / 10000^(2i/E))`` to feature 2i and the cosine to feature 2i+1 of position p, then dropout.

    Shapes: (T, B, E) or with ``batch_first`` (B, T, E), or (T, E); the output has the input's. ``offset`` is the
    position of the first row: a decoder that adds one token at a time counts it up.

    There is nothing to learn and nothing in the ``state_dict``. The first `max_len` positions are kept as a table;
    later ones are computed when they come.

    >>> positions = SinusoidalPositions(4)
    >>> positions(torch.zeros(2, 4))
    tensor([[0.0000, 1.0000, 0.0000, 1.0000],
            [0.8415, 0.5403, 0.0100, 0.9999]])

    Paper: Vaswani et al., Attention is all you need, 2017.
    """

    table: Tensor

    def __init__(
        self,
        d_model: int,
        max_len: int = 1024,
        dropout: float = 0.0,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if d_model <= 0:
            raise ValueError(f"d_model must be positive; got {d_model}")
        if max_len < 0:
            raise ValueError(f"max_len must not be negative; got {max_len}")
        self.d_model = d_model
        self.batch_first = batch_first
        self.dropout = torch.nn.Dropout(dropout)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.register_buffer("table", self._rows(0, max_len, torch.empty(0, device=device, dtype=dtype)), False)

    def _rows(self, first: int, count: int, like: Tensor) -> Tensor:
        """(count, E), computed in float64: float32 has no fraction left at far positions."""
        position = torch.arange(first, first + count, device=like.device, dtype=torch.float64).unsqueeze(1)
        even = torch.arange(0, self.d_model, 2, device=like.device, dtype=torch.float64)
        angle = position * torch.exp(even * (-math.log(WAVELENGTH) / self.d_model))
        pairs = torch.stack([angle.sin(), angle.cos()], 2).flatten(1)
        return pairs[:, : self.d_model].to(like.dtype)

    def forward(self, input: Tensor, offset: int = 0) -> Tensor:
        dim = _sequence_dim(input, self.d_model, self.batch_first)
        first, count = _first_position(offset), input.shape[dim]
        known = first + count <= self.table.shape[0]
        rows = self.table[first : first + count] if known else self._rows(first, count, self.table)
        output: Tensor = self.dropout(_added(input, rows, dim))
        return output

    def extra_repr(self) -> str:
        return f"{self.d_model}, batch_first={self.batch_first}"


class LearnedPositions(torch.nn.Module):
    """Adds a learned vector to each position, then dropout. ``weight`` (max_len, E), as of `torch.nn.Embedding`.

    Shapes and ``offset`` as for `SinusoidalPositions`. Position `max_len` and later ones have no vector: ValueError.

    >>> positions = LearnedPositions(16, 4)
    >>> positions(torch.zeros(5, 3, 4), offset=11).shape
    torch.Size([5, 3, 4])

    Papers: Gehring et al., Convolutional sequence to sequence learning, 2017; Devlin et al., BERT, 2019.
    """

    def __init__(
        self,
        max_len: int,
        d_model: int,
        dropout: float = 0.0,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if max_len <= 0 or d_model <= 0:
            raise ValueError(f"max_len and d_model must be positive; got {max_len} and {d_model}")
        self.max_len = max_len
        self.d_model = d_model
        self.batch_first = batch_first
        self.dropout = torch.nn.Dropout(dropout)
        self.weight = torch.nn.Parameter(torch.empty(max_len, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.normal_(self.weight, std=LEARNED_DEVIATION)

    def forward(self, input: Tensor, offset: int = 0) -> Tensor:
        dim = _sequence_dim(input, self.d_model, self.batch_first)
        first, count = _first_position(offset), input.shape[dim]
        if first + count > self.max_len:
            raise ValueError(f"positions {first} to {first + count - 1} were asked for; max_len is {self.max_len}")
        output: Tensor = self.dropout(_added(input, self.weight[first : first + count], dim))
        return output

    def extra_repr(self) -> str:
        return f"{self.max_len}, {self.d_model}, batch_first={self.batch_first}"
