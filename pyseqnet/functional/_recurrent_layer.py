"""One recurrent layer, and one step of it: our kernels, tied to autograd and to compilers; the same in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyseqnet.functional import _recurrent_reference as reference
from pyseqnet.functional._common import aliases, creates_graph, same_device

_forward = torch.ops.pyseqnet.recurrent_forward.default
_backward = torch.ops.pyseqnet.recurrent_backward.default
_step = torch.ops.pyseqnet.recurrent_step.default
_HAS_CELL = reference.HAS_CELL
_CELLS = {mode: mode.lower() for mode in reference.GATES}  # the kernels' names of the cells
_SLOTS = {**dict.fromkeys(_HAS_CELL, 4), "LSTM_LAYER_NORM": 12, "GRU": 4}  # kept for backward, others: see the fake
_STATIC_ARGUMENTS = 8  # of _Layer, before its tensors
_NO_GRADIENTS = (None,) * _STATIC_ARGUMENTS


class _Layer(torch.autograd.Function):
    """One layer, all its directions. ctx in forward on purpose: setup_context costs 14 us a call.

    Keeps the activated gates and the cell states of every step (Elman: nothing but the output).
    """

    @staticmethod
    def forward(
        ctx: Any,
        mode: str,
        directions: int,
        batch_first: bool,
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
        extras: str,
        zone_h: Tensor | None,
        zone_c: Tensor | None,
        input: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        options = _CELLS[mode], directions, reference.has_biases(mode, len(weights), directions), batch_first
        output, h_n, c_n, gates, cells = _forward(
            input, h_0, c_0, weights, lengths, batch_sizes, *options, True, zone_h, zone_c, extras
        )
        ctx.save_for_backward(
            input, output, h_0, c_0, gates, cells, lengths, batch_sizes, zone_h, zone_c, *weights
        )  # fmt: skip
        ctx.mode, ctx.options, ctx.extras = mode, options, extras
        ctx.set_materialize_grads(False)
        return (output, h_n, c_n) if mode in _HAS_CELL else (output, h_n)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        input, output, h_0, c_0, gates, cells, lengths, batch_sizes, zone_h, zone_c, *weights = ctx.saved_tensors
        need = ctx.needs_input_grad[_STATIC_ARGUMENTS:]
        if creates_graph():
            static = ctx.mode, ctx.options[1], ctx.options[3], lengths, batch_sizes, ctx.extras, zone_h, zone_c
            found = _differentiable_backward(plain_layer, static, (input, h_0, c_0, *weights), grads, need)
            return (*_NO_GRADIENTS, *found)
        grad_output, grad_h, grad_c = grads if ctx.mode in _HAS_CELL else (*grads, None)
        need_input, need_h, need_c, *need_each = need
        gx, gh, gc, gw = _backward(
            grad_output, grad_h, grad_c, input, output, h_0, c_0, weights, gates, cells, lengths, batch_sizes,
            *ctx.options, need_input, need_h, need_c, True in need_each, zone_h, zone_c, ctx.extras,
        )  # fmt: skip
        return (
            *_NO_GRADIENTS,
            gx if need_input else None,
            gh if need_h else None,
            gc if need_c else None,
            *([g if n else None for g, n in zip(gw, need_each, strict=True)] if gw else [None] * len(need_each)),
        )


def plain_layer(
    mode: str,
    directions: int,
    batch_first: bool,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    extras: str,
    zone_h: Tensor | None,
    zone_c: Tensor | None,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    *weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`_Layer` in plain torch."""
    if batch_first:
        input = input.transpose(0, 1)
    if h_0 is None:
        h_0, c_0 = zero_state(mode, directions, input, input.shape[1], weights)
    sets = reference.by_direction(mode, weights, directions)
    output, h_n, c_n = reference.layer(mode, input, h_0, c_0, sets, lengths, batch_sizes, extras, zone_h, zone_c)
    return (output.transpose(0, 1) if batch_first else output), h_n, c_n


def zero_state(
    mode: str, rows: int, input: Tensor, batch: int, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Zeros for h and, in an LSTM, c: (rows, batch, features) each."""
    h_0 = input.new_zeros(rows, batch, weights[1].shape[1])
    hidden = weights[1].shape[0] // reference.GATES[mode]
    return h_0, (input.new_zeros(rows, batch, hidden) if mode in _HAS_CELL else None)


def _differentiable_backward(
    function: Callable[..., tuple[Tensor | None, ...]],
    static: tuple[Any, ...],
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    need: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients through `function` in plain torch, so that they can be differentiated again.

    Every input is an alias of its own: the input may itself be computed from the weights (the layer below, or the
    step before, in a cell), and a gradient asked of the tensors themselves would take those paths, too.
    """
    views = aliases(*tensors)
    results = function(*static, *views)
    # a cell without c has no gradient of one
    pairs = [(r, g) for r, g in zip(results, grads, strict=False) if r is not None and g is not None]
    wanted = [a for a, n in zip(views, need, strict=True) if n and a is not None]
    found = iter(
        torch.autograd.grad([r for r, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True)
    )
    return [next(found) if n else None for n in need]


def _wants_gradient(input: Tensor, h_0: Tensor | None, c_0: Tensor | None, weights: Sequence[Tensor]) -> bool:
    """Whether a call must be recorded; see `_common.needs_autograd`."""
    if forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    if input.requires_grad or (h_0 is not None and h_0.requires_grad) or (c_0 is not None and c_0.requires_grad):
        return True
    for weight in weights:  # noqa: SIM110 - a generator costs more than the loop
        if weight.requires_grad:
            return True
    return False


def fast_layer(
    mode: str,
    directions: int,
    batch_first: bool,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    extras: str,
    zone_h: Tensor | None,
    zone_c: Tensor | None,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    *weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer by the kernels: output, h_n and, in an LSTM, c_n; recorded only where a gradient is wanted."""
    if _wants_gradient(input, h_0, c_0, weights):
        found = _Layer.apply(
            mode, directions, batch_first, lengths, batch_sizes, extras, zone_h, zone_c, input, h_0, c_0, *weights
        )
        return found if mode in _HAS_CELL else (*found, None)
    biases = reference.has_biases(mode, len(weights), directions)
    result: tuple[Tensor, ...] = _forward(
        input, h_0, c_0, weights, lengths, batch_sizes, _CELLS[mode], directions, biases, batch_first, False,
        zone_h, zone_c, extras,
    )  # fmt: skip
    return result[0], result[1], result[2]


class _Step(torch.autograd.Function):
    """One step of one layer: `_Layer` with T = 1, without views that autograd would have to record."""

    @staticmethod
    def forward(ctx: Any, mode: str, input: Tensor, h: Tensor | None, c: Tensor | None, *weights: Tensor) -> Any:
        ctx.mode, ctx.options = mode, (_CELLS[mode], 1, len(weights) == 4, False)
        output, _, c_n, gates, cells = _forward(
            input.unsqueeze(0), None if h is None else h.unsqueeze(0), None if c is None else c.unsqueeze(0), weights,
            None, None, *ctx.options, True,
        )  # fmt: skip
        ctx.save_for_backward(input, h, c, output, gates, cells, *weights)
        ctx.set_materialize_grads(False)
        return (output.squeeze(0), c_n.squeeze(0)) if mode == "LSTM" else output.squeeze(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        input, h, c, output, gates, cells, *weights = ctx.saved_tensors
        _, need_input, need_h, need_c, *need_each = ctx.needs_input_grad
        if creates_graph():
            need = ctx.needs_input_grad[1:]
            return (None, *_differentiable_backward(plain_step, (ctx.mode,), (input, h, c, *weights), grads, need))
        grad_h, grad_c = grads if ctx.mode == "LSTM" else (*grads, None)
        gx, gh, gc, gw = _backward(
            None if grad_h is None else grad_h.unsqueeze(0),
            None,
            None if grad_c is None else grad_c.unsqueeze(0),
            input.unsqueeze(0),
            output,
            None if h is None else h.unsqueeze(0),
            None if c is None else c.unsqueeze(0),
            weights,
            gates,
            cells,
            None,
            None,
            *ctx.options,
            need_input,
            need_h,
            need_c,
            True in need_each,
        )
        return (
            None,
            gx.squeeze(0) if need_input else None,
            gh.squeeze(0) if need_h else None,
            gc.squeeze(0) if need_c else None,
            *([g if n else None for g, n in zip(gw, need_each, strict=True)] if gw else [None] * len(need_each)),
        )


def plain_step(
    mode: str, input: Tensor, h: Tensor | None, c: Tensor | None, *weights: Tensor
) -> tuple[Tensor, Tensor | None]:
    """`_Step` in plain torch."""
    w = reference.by_direction(mode, weights, 1)[0]
    if h is None:
        h_0, c_0 = zero_state(mode, 1, input, input.shape[0], weights)
        h, c = h_0[0], None if c_0 is None else c_0[0]
    return reference.step(mode, reference.input_part(mode, input, w), h, c, w)[1:]


def fast_step(
    mode: str, input: Tensor, h: Tensor | None, c: Tensor | None, *weights: Tensor
) -> tuple[Tensor, Tensor | None]:
    """One step of one layer by the kernels: h and, in an LSTM, c."""
    if _wants_gradient(input, h, c, weights):
        found = _Step.apply(mode, input, h, c, *weights)
        return found if mode == "LSTM" else (found, None)
    if len(weights) == 4:
        return _step(input, h, c, *weights, _CELLS[mode])
    return _step(input, h, c, *weights, None, None, _CELLS[mode])


@torch.library.register_fake("pyseqnet::recurrent_step")
def _recurrent_step_fake(
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    cell: str,
) -> tuple[Tensor, Tensor]:
    same_device("recurrent", input, h, c, w_ih, w_hh, b_ih, b_hh)
    if input.shape[1] != w_ih.shape[1]:
        raise RuntimeError(f"input has inconsistent input_size: got {input.shape[1]} expected {w_ih.shape[1]}")
    batch, hidden = input.shape[0], w_hh.shape[1]
    return input.new_empty((batch, hidden)), input.new_empty((batch, hidden) if cell == "lstm" else (0, 0))


@torch.library.register_fake("pyseqnet::recurrent_forward")
def _recurrent_forward_fake(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    cell: str,
    directions: int,
    has_biases: bool,
    batch_first: bool,
    reserve: bool,
    zone_h: Tensor | None = None,
    zone_c: Tensor | None = None,
    options: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    same_device("recurrent", input, h0, c0, *weights)
    w_ih, w_hh = weights[0], weights[1]
    hidden, features = w_hh.shape[0] // reference.GATES[cell.upper()], w_hh.shape[1]
    if input.shape[-1] != w_ih.shape[1]:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {w_ih.shape[1]}, got {input.shape[-1]}"
        )
    mode = cell.upper()
    if batch_sizes is not None:
        assert h0 is not None, "h0 tells the batch of packed sequences"
        rows, batch = input.shape[0], h0.shape[1]
    else:
        rows, batch = input.shape[0] * input.shape[1], input.shape[0 if batch_first else 1]
    kept = torch.float64 if input.dtype == torch.float64 else torch.float32
    zoneout = zone_h is not None or zone_c is not None or reference.zones(options)
    slots = _SLOTS.get(mode, 1 if zoneout or mode in reference.IS_JORDAN else 0) if reserve else 0
    width = hidden if mode in _HAS_CELL else features if mode in reference.IS_JORDAN else 0
    return (
        input.new_empty((*input.shape[:-1], directions * features)),
        input.new_empty((directions, batch, features)),
        input.new_empty((directions, batch, hidden) if mode in _HAS_CELL else (0,)),
        input.new_empty((directions, rows, slots, hidden) if slots else (0,), dtype=kept),
        input.new_empty((directions, rows, width) if reserve and width else (0,), dtype=kept),
    )


@torch.library.register_fake("pyseqnet::recurrent_backward")
def _recurrent_backward_fake(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    result: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    gates: Tensor,
    cells: Tensor,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    cell: str,
    directions: int,
    has_biases: bool,
    batch_first: bool,
    need_input: bool,
    need_h0: bool,
    need_c0: bool,
    need_weights: bool,
    zone_h: Tensor | None = None,
    zone_c: Tensor | None = None,
    options: str = "",
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    same_device("recurrent", grad_output, grad_h_n, grad_c_n, input, result, h0, c0, *weights)
    if batch_sizes is not None:
        assert h0 is not None, "h0 tells the batch of packed sequences"
        batch = h0.shape[1]
    else:
        batch = input.shape[0 if batch_first else 1]
    hidden, features = weights[1].shape[0] // reference.GATES[cell.upper()], weights[1].shape[1]
    return (
        input.new_empty(input.shape if need_input else (0,)),
        input.new_empty((directions, batch, features) if need_h0 else (0,)),
        input.new_empty((directions, batch, hidden) if need_c0 else (0,)),
        [w.new_empty(w.shape) for w in weights] if need_weights else [],
    )
