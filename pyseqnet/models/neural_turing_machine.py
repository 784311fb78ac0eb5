"""The neural Turing machine: a controller with heads that read and write the rows of a memory.

Graves, Wayne, Danihelka: Neural Turing machines, 2014.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, softplus

from pyseqnet import nn

SHIFTS = 3  # a head moves by -1, 0 or 1 row
EMPTY = 1e-6  # of the memory at the start; at 0 a cosine would have no gradient


class Address(NamedTuple):
    """How a head finds its rows: of each sequence of a batch."""

    key: Tensor  # (B, M) what to look for
    strength: Tensor  # (B, 1) >= 0, how sharply
    gate: Tensor  # (B, 1) 1: by content, 0: from where it was
    shift: Tensor  # (B, 3) how likely it moves by -1, 0, 1
    sharpness: Tensor  # (B, 1) >= 1


def address(memory: Tensor, found: Address, previous: Tensor) -> Tensor:
    """The weights of the rows (B, N), from memory (B, N, M) and the weights of the step before (B, N).

    Equivalent to::

        content = softmax(strength * cos(key, memory))
        gated = gate * content + (1 - gate) * previous
        shifted[i] = sum_j shift[j] * gated[i - j]  # j = -1, 0, 1, round the end
        shifted ** sharpness / (shifted ** sharpness).sum()
    """
    likeness = cosine_similarity(memory, found.key.unsqueeze(1), dim=2)
    content = (found.strength * likeness).softmax(1)
    gated = found.gate * content + (1 - found.gate) * previous
    moved = torch.stack([gated.roll(step, 1) for step in (-1, 0, 1)], 2)
    shifted = (moved * found.shift.unsqueeze(1)).sum(2)
    sharp = (shifted + EMPTY) ** found.sharpness
    return sharp / sharp.sum(1, keepdim=True)


def read(memory: Tensor, weights: Tensor) -> Tensor:
    """(B, M): the mean of the rows (B, N, M) by their weights (B, N)."""
    return torch.einsum("bn,bnm->bm", weights, memory)


def write(memory: Tensor, weights: Tensor, erased: Tensor, added: Tensor) -> Tensor:
    """The memory after ``M_i (1 - w_i e) + w_i a``; e in [0, 1] and a are (B, M)."""
    weights = weights.unsqueeze(2)
    return memory * (1 - weights * erased.unsqueeze(1)) + weights * added.unsqueeze(1)


class Head(torch.nn.Module):
    """From the controller's state (B, H) to an `Address`."""

    def __init__(self, state: int, width: int) -> None:
        super().__init__()
        self.sizes = [width, 1, 1, SHIFTS, 1]
        self.linear = torch.nn.Linear(state, sum(self.sizes))

    def forward(self, state: Tensor) -> Address:
        key, strength, gate, shift, sharpness = self.linear(state).split(self.sizes, 1)
        return Address(key.tanh(), softplus(strength), gate.sigmoid(), shift.softmax(1), 1 + softplus(sharpness))


class NeuralTuringMachine(torch.nn.Module):
    """A recurrent network with a memory of `rows` rows of `width` numbers: one writing head, one reading head.

    Both heads begin at the first row of an empty memory. At each step the controller, an LSTM, sees the input and what
    was read last; it writes, then reads, then answers.

    Shapes of ``forward(input)``: (B, T, inputs) to (B, T, outputs), before any activation; with ``need_weights=True``
    also where it wrote and read, (2, B, T, rows).

    >>> NeuralTuringMachine(9, 8, rows=16)(torch.zeros(2, 5, 9)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, inputs: int, outputs: int, *, rows: int = 64, width: int = 16, controller: int = 96) -> None:
        super().__init__()
        if rows < SHIFTS:
            raise ValueError(f"rows must be at least {SHIFTS}, got {rows}")
        self.rows, self.width = rows, width
        self.cell = nn.LSTMCell(inputs + width, controller)
        self.writer, self.reader = Head(controller, width), Head(controller, width)
        self.erase, self.add = torch.nn.Linear(controller, width), torch.nn.Linear(controller, width)
        self.head = torch.nn.Linear(controller + width, outputs)

    def forward(self, input: Tensor, *, need_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        batch = input.shape[0]
        memory = input.new_full((batch, self.rows, self.width), EMPTY)
        written = read_at = torch.nn.functional.one_hot(torch.zeros(batch, dtype=torch.int64), self.rows).to(input)
        found, state = read(memory, read_at), None
        outputs, weights = [], []
        for step in input.unbind(1):
            hidden, _ = state = self.cell(torch.cat([step, found], 1), state)
            written = address(memory, self.writer(hidden), written)
            memory = write(memory, written, self.erase(hidden).sigmoid(), self.add(hidden).tanh())
            read_at = address(memory, self.reader(hidden), read_at)
            found = read(memory, read_at)
            outputs.append(self.head(torch.cat([hidden, found], 1)))
            if need_weights:
                weights.append(torch.stack([written, read_at]))
        output = torch.stack(outputs, 1)
        return (output, torch.stack(weights, 2)) if need_weights else output
