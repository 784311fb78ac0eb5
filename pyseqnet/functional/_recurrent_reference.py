"""Recurrent layers in plain torch: the definition of each cell, and what a double backward differentiates.

Only elementary operations, so that it can be differentiated any number of times on every device (torch's fused CUDA
kernels cannot). A step of the time loop is a handful of small operations: it is meant to be read, not to be fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Bound at import: replacing torch.nn.functional.linear by ours later cannot recurse.
from torch.nn.functional import linear as linear

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def step(
    mode: str, gates: Tensor, h: Tensor, c: Tensor | None, w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One step: `gates` is the input's part, ``x @ w_ih.T + b_ih``; returns h and c (None where the cell has none)."""
    recurrent = linear(h, w_hh, b_hh)
    if mode == "LSTM":
        assert c is not None
        i, f, g, o = (gates + recurrent).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h if w_hr is None else linear(h, w_hr)), c
    if mode == "GRU":
        (r, z, n), (hr, hz, hn) = gates.chunk(3, -1), recurrent.chunk(3, -1)
        n = (n + (r + hr).sigmoid() * hn).tanh()
        return n + (z + hz).sigmoid() * (h - n), None
    total = gates + recurrent
    return (total.tanh() if mode == "RNN_TANH" else total.relu()), None


def _time_mask(lengths: Tensor, steps: int, device: torch.device) -> Tensor:
    """(T, B, 1), True inside each sequence."""
    inside = torch.arange(steps).unsqueeze(1) < lengths.cpu().unsqueeze(0)
    return inside.unsqueeze(2).to(device)


def _lengths_of(batch_sizes: Tensor) -> Tensor:
    """The length of each of the sorted sequences of a PackedSequence."""
    rows = torch.arange(int(batch_sizes[0])).unsqueeze(0)
    return (rows < batch_sizes.unsqueeze(1)).sum(0)


def layer(
    mode: str,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Sequence[Tensor | None]],
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer in one or two directions.

    Args:
        input: ``(T, B, I)``, or with `batch_sizes` a PackedSequence's ``(N, I)``.
        h_0, c_0: ``(directions, B, H)``; c_0 only for LSTM.
        weights: for each direction w_ih, w_hh, b_ih, b_hh, w_hr; absent ones are None.
        lengths: ``(B,)``. A sequence's reverse direction starts at its own end; its padding is never read.

    Returns:
        The outputs (directions side by side, 0 in the padding) in the form of the input, h_n, c_n.
    """
    inside = None
    if batch_sizes is not None:
        inside = _time_mask(_lengths_of(batch_sizes), len(batch_sizes), input.device)
        rows = inside.squeeze(2).reshape(-1).cumsum(0).sub(1).clamp_min(0)
        input = input.index_select(0, rows).view(*inside.shape[:2], -1)
    elif lengths is not None:
        inside = _time_mask(lengths, input.shape[0], input.device)
    if inside is not None:  # where, not a product: padding may hold NaN
        input = torch.where(inside, input, torch.zeros((), dtype=input.dtype, device=input.device))
    outputs, last_h, last_c = [], [], []
    for direction, (w_ih, w_hh, b_ih, b_hh, w_hr) in enumerate(weights):
        assert w_ih is not None
        assert w_hh is not None
        h, c = h_0[direction], None if c_0 is None else c_0[direction]
        gates = linear(input, w_ih, b_ih)
        found: list[Tensor] = []
        for t in range(input.shape[0]) if direction == 0 else reversed(range(input.shape[0])):
            new_h, new_c = step(mode, gates[t], h, c, w_hh, b_hh, w_hr)
            if inside is None:
                h, c = new_h, new_c
                found.append(h)
            else:
                h = torch.where(inside[t], new_h, h)
                c = None if new_c is None or c is None else torch.where(inside[t], new_c, c)
                found.append(torch.where(inside[t], new_h, torch.zeros_like(new_h)))
        outputs.append(torch.stack(found if direction == 0 else found[::-1]))
        last_h.append(h)
        last_c.append(c)
    output = torch.cat(outputs, -1)
    if batch_sizes is not None:
        assert inside is not None
        output = output.flatten(0, 1).index_select(0, inside.flatten().nonzero().squeeze(1))
    c_n = None if last_c[0] is None else torch.stack([c for c in last_c if c is not None])
    return output, torch.stack(last_h), c_n
