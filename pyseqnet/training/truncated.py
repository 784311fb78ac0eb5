"""Truncated back-propagation through time (Williams & Peng, 1990): gradients stop every so many steps, states go on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def detach(state: Any) -> Any:
    """The state, or each tensor of nested tuples and lists of states, cut off from the graph that made it."""
    if isinstance(state, Tensor):
        return state.detach()
    if isinstance(state, (tuple, list)):
        return type(state)(detach(part) for part in state)
    if state is None:
        return None
    raise TypeError(f"state: expected tensors, tuples, lists or None, got {type(state).__name__}")


def truncated_bptt(
    layer: torch.nn.Module, input: Tensor, steps: int, hx: Any = None, *, lengths: Tensor | None = None
) -> Iterator[tuple[slice, Tensor, Any]]:
    """Runs a recurrent layer over `input` in pieces; gradients do not pass from a piece to the one before.

    Use::

        for part, output, state in truncated_bptt(layer, input, 35):
            loss(output, target[part]).backward()
            optimizer.step(); optimizer.zero_grad()

    Each piece runs when it is asked for, with the weights of that moment. With ``steps >= T`` it is the whole layer.

    Args:
        layer: RNN, LSTM, GRU or JordanRNN, ours or torch's.
        input: ``(T, B, I)``, with ``layer.batch_first`` ``(B, T, I)``, or ``(T, I)``.
        steps: of a piece, at least 1; the last one may be shorter.
        hx: the state to begin with; None for zeros.
        lengths: ``(B,)``, int64 on the CPU: as the layer takes them (our layers only), each at least 1.

    Yields:
        The piece's steps as a slice of the time axis, its output, and the state after it, detached: each sequence's
        own, wherever it ended.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    time = 1 if input.dim() == 3 and getattr(layer, "batch_first", False) else 0
    state = detach(hx)
    for start in range(0, input.shape[time], steps):
        count = min(steps, input.shape[time] - start)
        piece = input.narrow(time, start, count)
        if lengths is None:
            output, state = layer(piece, state)
        else:
            output, state = _run_those_that_go_on(layer, piece, 1 - time, lengths - start, state)
        state = detach(state)
        yield slice(start, start + count), output, state


def _run_those_that_go_on(
    layer: torch.nn.Module, piece: Tensor, batch: int, left: Tensor, state: Any
) -> tuple[Tensor, Any]:
    """The layer on the sequences that have steps left; the others give zeros and keep their state."""
    count = piece.shape[1 - batch]
    if bool((left > 0).all()):
        result: tuple[Tensor, Any] = layer(piece, state, lengths=left.clamp(max=count))
        return result
    running = (left > 0).nonzero().squeeze(1)
    if len(running) == 0:
        width = layer(piece[:1, :1])[0].shape[-1]
        return piece.new_zeros(*piece.shape[:2], width), state
    places = running.to(piece.device)
    states = state if isinstance(state, tuple) else (state,)
    own = tuple(s.index_select(1, places) for s in states)
    output, new = layer(
        piece.index_select(batch, places),
        own if isinstance(state, tuple) else own[0],
        lengths=left.index_select(0, running).clamp(max=count),
    )
    shape = [*piece.shape[:2], output.shape[-1]]
    whole = output.new_zeros(shape).index_copy(batch, places, output)
    new = new if isinstance(new, tuple) else (new,)
    merged = tuple(s.index_copy(1, places, n) for s, n in zip(states, new, strict=True))
    return whole, merged if isinstance(state, tuple) else merged[0]
