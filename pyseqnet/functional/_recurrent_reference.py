"""Recurrent layers in plain torch: the definition of each cell, and what a double backward differentiates.

Only elementary operations, so that it can be differentiated any number of times on every device (torch's fused CUDA
kernels cannot). A step of the time loop is a handful of small operations: it is meant to be read, not to be fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Bound at import: replacing torch.nn.functional.linear by ours later cannot recurse.
from torch.nn.functional import layer_norm as _layer_norm
from torch.nn.functional import linear as linear

GATES = {
    "LSTM": 4,
    "LSTM_PEEPHOLE": 4,
    "LSTM_FULL_PEEPHOLE": 4,
    "LSTM_LAYER_NORM": 4,
    "GRU": 3,
    "RNN_TANH": 1,
    "RNN_RELU": 1,
    "JORDAN_TANH": 1,
    "JORDAN_RELU": 1,
}
"""Modes, and the blocks of rows in their w_ih and w_hh. In lower case they are the kernels' names of the cells."""
HAS_CELL = frozenset(mode for mode in GATES if mode.startswith("LSTM"))
IS_JORDAN = frozenset(mode for mode in GATES if mode.startswith("JORDAN"))
# Weights of one direction beside w_ih, w_hh, the biases and a projection; a Jordan net's w_hr is one of them.
_EXTRA_WEIGHTS = {
    **dict.fromkeys(GATES, 0), "LSTM_PEEPHOLE": 1, "LSTM_FULL_PEEPHOLE": 1, "LSTM_LAYER_NORM": 4,
    "JORDAN_TANH": 1, "JORDAN_RELU": 1,
}  # fmt: skip


class Weights(NamedTuple):
    """The weights of one direction of one layer; absent ones are None."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None
    b_hr: Tensor | None = None  # Jordan
    w_ch: Tensor | None = None  # peepholes: (3H) or (4H, H)
    gain_ih: Tensor | None = None  # layer normalisation
    gain_hh: Tensor | None = None
    gain_c: Tensor | None = None
    bias_c: Tensor | None = None


class Options(NamedTuple):
    """What a layer does beside its cell, as the kernels take it."""

    output: str = "identity"  # a Jordan net's output units
    decay: float = 0.0  # and of its state
    limit: float = 0.0  # of clipping: c, or an Elman unit; 0: none
    zone_h: float = 0.0  # rates of zoneout where there is no mask
    zone_c: float = 0.0

    def words(self) -> str:
        """As operations take them: a compiler that makes sizes symbolic would do the same to numbers."""
        return "" if self == PLAIN else " ".join(map(str, self))


PLAIN = Options()


def _read(options: str) -> Options:
    if not options:
        return PLAIN
    output, *numbers = options.split()
    return Options(output, *map(float, numbers))


def zones(options: str) -> bool:
    """Whether these options have a rate of zoneout."""
    return any(_read(options)[3:])


def has_biases(mode: str, count: int, directions: int) -> bool:
    """Whether `count` weights of one layer hold biases."""
    return count >= (4 + _EXTRA_WEIGHTS[mode]) * directions


def by_direction(mode: str, weights: Sequence[Tensor], directions: int) -> list[Weights]:
    """The flat weights of one layer: w_ih, w_hh[, b_ih, b_hh][, w_hr], then what the cell has, for each direction."""
    each = len(weights) // directions
    biases = has_biases(mode, len(weights), directions)
    found = []
    for first in range(0, len(weights), each):
        own = list(weights[first : first + each])
        names = ["w_ih", "w_hh", *(["b_ih", "b_hh"] if biases else [])]
        if mode in IS_JORDAN:
            names += ["w_hr", *(["b_hr"] if biases else [])]
        elif each == len(names) + _EXTRA_WEIGHTS[mode] + 1:
            names.append("w_hr")
        if mode in ("LSTM_PEEPHOLE", "LSTM_FULL_PEEPHOLE"):
            names.append("w_ch")
        elif mode == "LSTM_LAYER_NORM":
            names += ["gain_ih", "gain_hh", "gain_c", "bias_c"]
        found.append(Weights(**dict(zip(names, own, strict=True))))
    return found


def weight_shapes(mode: str, inputs: int, hidden: int, features: int, biases: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of `Weights` of one direction, those that exist. A projection exists where features != hidden."""
    rows = GATES[mode] * hidden
    shapes: dict[str, tuple[int, ...]] = {"w_ih": (rows, inputs), "w_hh": (rows, features)}
    if biases:
        shapes |= {"b_ih": (rows,), "b_hh": (rows,)}
    if mode in IS_JORDAN or features != hidden:
        shapes["w_hr"] = (features, hidden)
    if mode in IS_JORDAN and biases:
        shapes["b_hr"] = (features,)
    if mode == "LSTM_PEEPHOLE":
        shapes["w_ch"] = (3 * hidden,)
    if mode == "LSTM_FULL_PEEPHOLE":
        shapes["w_ch"] = (rows, hidden)
    if mode == "LSTM_LAYER_NORM":
        shapes |= {"gain_ih": (rows,), "gain_hh": (rows,), "gain_c": (hidden,), "bias_c": (hidden,)}
    return shapes


def input_part(mode: str, input: Tensor, w: Weights) -> Tensor:
    """The input's part of the gates, of all steps at once."""
    if mode == "LSTM_LAYER_NORM":
        products = linear(input, w.w_ih)
        return _layer_norm(products, products.shape[-1:], w.gain_ih, w.b_ih)
    return linear(input, w.w_ih, w.b_ih)


def _lstm(mode: str, gates: Tensor, h: Tensor, c: Tensor, w: Weights, limit: float) -> tuple[Tensor, Tensor]:
    """What a projection sees, and c."""
    if mode == "LSTM_LAYER_NORM":
        products = linear(h, w.w_hh)
        gates = gates + _layer_norm(products, products.shape[-1:], w.gain_hh, w.b_hh)
    else:
        gates = gates + linear(h, w.w_hh, w.b_hh)
    if mode == "LSTM_FULL_PEEPHOLE":
        assert w.w_ch is not None
        gates = gates + linear(c, w.w_ch)
    i, f, g, o = gates.chunk(4, -1)
    if mode == "LSTM_PEEPHOLE":
        assert w.w_ch is not None
        of_i, of_f, of_o = w.w_ch.chunk(3)
        i, f = i + of_i * c, f + of_f * c
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    if limit:
        c = c.clamp(-limit, limit)
    if mode == "LSTM_PEEPHOLE":
        o = o + of_o * c
    shown = _layer_norm(c, c.shape[-1:], w.gain_c, w.bias_c) if mode == "LSTM_LAYER_NORM" else c
    return o.sigmoid() * shown.tanh(), c


def _candidate(
    mode: str, gates: Tensor, h: Tensor, c: Tensor | None, w: Weights, options: Options
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, and the states before zoneout."""
    if mode in HAS_CELL:
        assert c is not None
        m, c = _lstm(mode, gates, h, c, w, options.limit)
        h = m if w.w_hr is None else linear(m, w.w_hr)
        return h, h, c
    recurrent = linear(h, w.w_hh, w.b_hh)
    if mode == "GRU":
        (r, z, n), (hr, hz, hn) = gates.chunk(3, -1), recurrent.chunk(3, -1)
        n = (n + (r + hr).sigmoid() * hn).tanh()
        h = n + (z + hz).sigmoid() * (h - n)
        return h, h, None
    m = (gates + recurrent).tanh() if mode.endswith("TANH") else (gates + recurrent).relu()
    if options.limit:
        m = m.clamp(-options.limit, options.limit)
    if mode not in IS_JORDAN:
        return m, m, None
    assert w.w_hr is not None
    y = linear(m, w.w_hr, w.b_hr)
    y = y if options.output == "identity" else getattr(y, options.output)()
    return y, (options.decay * h + y if options.decay else y), None


def _zoned(before: Tensor, after: Tensor, mask: Tensor | None, rate: float) -> Tensor:
    if mask is not None:
        return torch.where(mask, before, after)
    return after + rate * (before - after) if rate else after


def step(
    mode: str,
    gates: Tensor,
    h: Tensor,
    c: Tensor | None,
    w: Weights,
    options: Options = PLAIN,
    zone_h: Tensor | None = None,
    zone_c: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One step; `gates` is the input's part. Returns the output, h (Jordan: the state s) and c, None if it has none."""
    output, new_h, new_c = _candidate(mode, gates, h, c, w, options)
    new_h = _zoned(h, new_h, zone_h, options.zone_h)
    if new_c is not None and c is not None:
        new_c = _zoned(c, new_c, zone_c, options.zone_c)
    return (output if mode in IS_JORDAN else new_h), new_h, new_c


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
    weights: Sequence[Weights],
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    options: str = "",
    zone_h: Tensor | None = None,
    zone_c: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer in one or two directions.

    Args:
        input: ``(T, B, I)``, or with `batch_sizes` a PackedSequence's ``(N, I)``.
        h_0, c_0: ``(directions, B, H)``; c_0 only for LSTM.
        weights: of each direction.
        lengths: ``(B,)``. A sequence's reverse direction starts at its own end; its padding is never read.
        options: `Options` in words.
        zone_h, zone_c: masks of zoneout, ``(directions, T * B or N, features)``, True where a state is kept.

    Returns:
        The outputs (directions side by side, 0 in the padding) in the form of the input, h_n, c_n.
    """
    cell = _read(options)
    inside = rows = None
    if batch_sizes is not None:
        inside = _time_mask(_lengths_of(batch_sizes), len(batch_sizes), input.device)
        rows = inside.squeeze(2).reshape(-1).cumsum(0).sub(1).clamp_min(0)
        input = input.index_select(0, rows).view(*inside.shape[:2], -1)
    elif lengths is not None:
        inside = _time_mask(lengths, input.shape[0], input.device)
    if inside is not None:  # where, not a product: padding may hold NaN
        input = torch.where(inside, input, torch.zeros((), dtype=input.dtype, device=input.device))

    def of_steps(mask: Tensor | None, direction: int) -> Sequence[Tensor | None]:
        if mask is None:
            return [None] * input.shape[0]
        mask = mask[direction] if rows is None else mask[direction].index_select(0, rows)
        return list(mask.view(*input.shape[:2], -1))

    outputs, last_h, last_c = [], [], []
    for direction, w in enumerate(weights):
        h, c = h_0[direction], None if c_0 is None else c_0[direction]
        gates = input_part(mode, input, w)
        zones_h, zones_c = of_steps(zone_h, direction), of_steps(zone_c, direction)
        found: list[Tensor] = []
        for t in range(input.shape[0]) if direction == 0 else reversed(range(input.shape[0])):
            y, new_h, new_c = step(mode, gates[t], h, c, w, cell, zones_h[t], zones_c[t])
            if inside is None:
                h, c = new_h, new_c
                found.append(y)
            else:
                h = torch.where(inside[t], new_h, h)
                c = None if new_c is None or c is None else torch.where(inside[t], new_c, c)
                found.append(torch.where(inside[t], y, torch.zeros_like(y)))
        outputs.append(torch.stack(found if direction == 0 else found[::-1]))
        last_h.append(h)
        last_c.append(c)
    output = torch.cat(outputs, -1)
    if batch_sizes is not None:
        assert inside is not None
        output = output.flatten(0, 1).index_select(0, inside.flatten().nonzero().squeeze(1))
    c_n = None if last_c[0] is None else torch.stack([c for c in last_c if c is not None])
    return output, torch.stack(last_h), c_n
