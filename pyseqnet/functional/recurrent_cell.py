"""Single steps of recurrent networks: lstm_cell, gru_cell, rnn_cell and jordan_cell, for streaming and decoders.

With a layer's weights, steps one after the other give the layer's outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyseqnet.functional._recurrent_layer import plain_layer
from pyseqnet.functional._recurrent_options import Rate, elman_mode, layer_options, lstm_mode
from pyseqnet.functional._recurrent_refusals import REFUSALS, explain_cell
from pyseqnet.functional._recurrent_stack import Options, run_cell, run_layers
from pyseqnet.functional.recurrent import call


def _call_cell(mode: str, *arguments: Any) -> Any:
    if torch.compiler.is_compiling():
        return run_cell(mode, *arguments)
    try:
        return run_cell(mode, *arguments)
    except REFUSALS as error:
        explain_cell(error, mode, *arguments)


def one_step(
    mode: str, input: Tensor, hx: Any, params: Sequence[Tensor], options: Options, training: bool, plain: bool = False
) -> Any:
    """A layer's step on ``(B, I)`` or ``(I)``: the output and h, in an LSTM the output and (h, c)."""
    _check_step(mode, input, hx, params)
    state: Any = None
    if hx is not None:
        state = tuple(s.unsqueeze(0) for s in hx) if mode.startswith("LSTM") else hx.unsqueeze(0)
    arguments = mode, input.unsqueeze(0), state, params, 1, False, 0.0, training, False, None, options
    output, state = run_layers(*arguments, plain_layer) if plain else call(*arguments)
    last = tuple(s.squeeze(0) for s in state) if mode.startswith("LSTM") else state.squeeze(0)
    return output.squeeze(0), last


def _check_step(mode: str, input: Tensor, hx: Any, params: Sequence[Tensor]) -> None:
    """What a layer of one step would refuse in a sequence's words, in those of torch's cells."""
    if input.dim() not in (1, 2):
        raise ValueError(f"input must have 1 or 2 dimensions, got {input.dim()}")
    w_ih, w_hh = params[:2]
    if input.shape[-1] != w_ih.shape[-1]:
        raise RuntimeError(f"input has inconsistent input_size: got {input.shape[-1]} expected {w_ih.shape[-1]}")
    if hx is None:
        return
    states, sizes = (hx, (w_hh.shape[1], w_hh.shape[0] // 4)) if mode.startswith("LSTM") else ([hx], (w_hh.shape[1],))
    for number, (state, size) in enumerate(zip(states, sizes, strict=False)):
        if state.dim() != input.dim():
            raise ValueError(f"hx: expected as many dimensions as of the input, {input.dim()}, got {state.dim()}")
        if state.shape[:-1] != input.shape[:-1]:
            raise RuntimeError(
                f"Input batch size {input.shape[0]} doesn't match hidden{number} batch size {state.shape[0]}"
            )
        if state.shape[-1] != size:
            raise RuntimeError(f"hidden{number} has inconsistent hidden_size: got {state.shape[-1]}, expected {size}")


def _params(
    w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, *others: Tensor | None
) -> list[Tensor]:
    """As layers take them: both biases or none."""
    if b_ih is not None and b_hh is None:
        b_hh = torch.zeros_like(b_ih)
    elif b_hh is not None and b_ih is None:
        b_ih = torch.zeros_like(b_hh)
    return [w for w in (w_ih, w_hh, b_ih, b_hh, *others) if w is not None]


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    w_hr: Tensor | None = None,
    w_ch: Tensor | None = None,
    layer_norm: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    zoneout: Rate = 0.0,
    training: bool = False,
    cell_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `lstm`: ``(B, I)`` and ``(h, c)``, ``(B, H)`` each (or without B), to the next ``(h, c)``.

    Equivalent to::

        torch.lstm_cell(input, hx, w_ih, w_hh, b_ih, b_hh)

    None for `hx` is zeros. Keywords: a projection w_hr ``(P, H)``, peepholes w_ch ``(3H)`` or ``(4H, H)``, the gains
    and bias of layer normalisation, and the options of `lstm` that a single step has.
    """
    result: tuple[Tensor, Tensor]
    if w_hr is None and w_ch is None and layer_norm is None and cell_clip is None and not zoneout:
        result = _call_cell("LSTM", input, hx, w_ih, w_hh, b_ih, b_hh)
        return result
    mode, params = _lstm_form(w_ih, w_hh, b_ih, b_hh, w_hr, w_ch, layer_norm)
    options = layer_options(cell_clip, zoneout, has_cell=True)
    _, result = one_step(mode, input, hx, params, options, training)
    return result


def lstm_cell_reference(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    w_hr: Tensor | None = None,
    w_ch: Tensor | None = None,
    layer_norm: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    zoneout: Rate = 0.0,
    training: bool = False,
    cell_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`lstm_cell` in plain torch."""
    mode, params = _lstm_form(w_ih, w_hh, b_ih, b_hh, w_hr, w_ch, layer_norm)
    options = layer_options(cell_clip, zoneout, has_cell=True)
    result: tuple[Tensor, Tensor] = one_step(mode, input, hx, params, options, training, plain=True)[1]
    return result


def _lstm_form(
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    w_ch: Tensor | None,
    layer_norm: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> tuple[str, list[Tensor]]:
    """The mode of an LSTM with these weights, and its params."""
    peephole = None if w_ch is None else "diagonal" if w_ch.dim() == 1 else "full"
    mode = lstm_mode(peephole, layer_norm is not None)
    return mode, _params(w_ih, w_hh, b_ih, b_hh, w_hr, w_ch, *(layer_norm or ()))


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    zoneout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """One step of `gru`: ``(B, I)`` and ``(B, H)`` (or without B) to the next ``(B, H)``.

    Equivalent to::

        torch.gru_cell(input, hx, w_ih, w_hh, b_ih, b_hh)

    None for `hx` is zeros. Zoneout is that of `gru`.
    """
    result: Tensor
    if not zoneout:
        result = _call_cell("GRU", input, hx, w_ih, w_hh, b_ih, b_hh)
    else:
        params = _params(w_ih, w_hh, b_ih, b_hh)
        _, result = one_step("GRU", input, hx, params, layer_options(None, zoneout), training)
    return result


def gru_cell_reference(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    zoneout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """`gru_cell` in plain torch."""
    params = _params(w_ih, w_hh, b_ih, b_hh)
    result: Tensor = one_step("GRU", input, hx, params, layer_options(None, zoneout), training, plain=True)[1]
    return result


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    zoneout: float = 0.0,
    training: bool = False,
    clip: float | None = None,
) -> Tensor:
    """One step of `rnn`: ``(B, I)`` and ``(B, H)`` (or without B) to the next ``(B, H)``.

    Equivalent to::

        torch.rnn_tanh_cell(input, hx, w_ih, w_hh, b_ih, b_hh)  # or torch.rnn_relu_cell

    None for `hx` is zeros. Zoneout and `clip` are those of `rnn`.
    """
    mode = elman_mode(nonlinearity)
    result: Tensor
    if not zoneout and clip is None:
        result = _call_cell(mode, input, hx, w_ih, w_hh, b_ih, b_hh)
    else:
        params = _params(w_ih, w_hh, b_ih, b_hh)
        _, result = one_step(mode, input, hx, params, layer_options(clip, zoneout), training)
    return result


def rnn_cell_reference(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    zoneout: float = 0.0,
    training: bool = False,
    clip: float | None = None,
) -> Tensor:
    """`rnn_cell` in plain torch."""
    mode, params = elman_mode(nonlinearity), _params(w_ih, w_hh, b_ih, b_hh)
    result: Tensor = one_step(mode, input, hx, params, layer_options(clip, zoneout), training, plain=True)[1]
    return result


def jordan_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    w_ho: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    b_ho: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    output_nonlinearity: str = "identity",
    decay: float = 0.0,
    zoneout: float = 0.0,
    training: bool = False,
    clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `jordan`: ``(B, I)`` and s ``(B, P)`` (or without B) to the output y and the next s, ``(B, P)`` each.

    Equivalent to::

        y = torch.tanh(input @ w_ih.T + b_ih + hx @ w_hh.T + b_hh) @ w_ho.T + b_ho
        y, decay * hx + y

    Either all biases are given or none. None for `hx` is zeros.
    """
    params = _jordan_params(w_ih, w_hh, b_ih, b_hh, w_ho, b_ho)
    mode = elman_mode(nonlinearity).replace("RNN", "JORDAN")
    options = layer_options(clip, zoneout, output=output_nonlinearity, decay=decay)
    result: tuple[Tensor, Tensor] = one_step(mode, input, hx, params, options, training)
    return result


def jordan_cell_reference(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    w_ho: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    b_ho: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    output_nonlinearity: str = "identity",
    decay: float = 0.0,
    zoneout: float = 0.0,
    training: bool = False,
    clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`jordan_cell` in plain torch."""
    params = _jordan_params(w_ih, w_hh, b_ih, b_hh, w_ho, b_ho)
    mode = elman_mode(nonlinearity).replace("RNN", "JORDAN")
    options = layer_options(clip, zoneout, output=output_nonlinearity, decay=decay)
    result: tuple[Tensor, Tensor] = one_step(mode, input, hx, params, options, training, plain=True)
    return result


def _jordan_params(*weights: Tensor | None) -> list[Tensor]:
    params = [w for w in weights if w is not None]
    if len(params) not in (3, 6):
        raise ValueError("b_ih, b_hh, b_ho: expected all three biases or none")
    return params
