"""Recurrent networks: lstm, gru, rnn (Elman), and single steps of them.

Elman: Finding structure in time, 1990. Hochreiter & Schmidhuber: Long short-term memory, 1997. Gers, Schmidhuber &
Cummins: Learning to forget, 2000. Sak, Senior & Beaufays (projection), 2014. Cho et al. (GRU), 2014. Schuster &
Paliwal: Bidirectional recurrent neural networks, 1997.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pyseqnet.functional._recurrent_layer import plain_layer, plain_step
from pyseqnet.functional._recurrent_refusals import REFUSALS, explain, explain_cell
from pyseqnet.functional._recurrent_stack import run_cell, run_layers


def _call(mode: str, *arguments: Any) -> Any:
    if torch.compiler.is_compiling():
        return run_layers(mode, *arguments)
    try:
        return run_layers(mode, *arguments)
    except REFUSALS as error:
        explain(error, mode, *arguments)


def _call_cell(mode: str, *arguments: Any) -> Any:
    if torch.compiler.is_compiling():
        return run_cell(mode, *arguments)
    try:
        return run_cell(mode, *arguments)
    except REFUSALS as error:
        explain_cell(error, mode, *arguments)


def lstm(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    proj_size: int | None = None,
) -> Any:
    """Long short-term memory, in layers and in one or two directions.

    Equivalent to::

        layer = torch.nn.LSTM(...)                    # params = layer._flat_weights
        output, (h_n, c_n) = layer(input, hx)         # with lengths: layer(pack_padded_sequence(input, lengths, ...))

    Each step of a layer::

        i, f, g, o = W_ih x + b_ih + W_hh h' + b_hh   # sigmoid; g: tanh
        c = f * c' + i * g
        h = o * tanh(c)                               # with a projection: W_hr (o * tanh(c))

    Args:
        input: ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, ``(T, I)`` or a PackedSequence; float32, bfloat16,
            float16 or float64; CPU or CUDA.
        hx: ``(h_0, c_0)``, ``(layers * directions, B, H)`` each; None for zeros. With a projection h has its size.
        params: for each layer and in it for each direction w_ih ``(4H, I)``, w_hh ``(4H, H)``, then b_ih, b_hh
            ``(4H)`` unless there are none, then w_hr ``(P, H)`` if there is a projection. Rows in the order i, f, g, o.
        dropout: of the outputs of every layer but the last, if ``training``.
        lengths: ``(B,)``, int64 on the CPU: how many steps each sequence really has, in any order. Padding is never
            read, whatever it holds; outputs there are 0; the reverse direction starts at each sequence's own end, and
            h_n, c_n are each sequence's own last.
        proj_size: what the number of `params` tells as well; if given, it must agree.

    Returns:
        ``output, (h_n, c_n)``: the output in the form of the input, with ``directions * H`` features.

    Raises:
        What torch raises for the same arguments; TypeError for a dtype outside the four; ValueError naming what does
        not fit.

    Under autocast computes in its dtype and returns it, as torch's LSTM. Differentiable twice; torch.compile sees one
    node a layer. Sums and states are float32 (float64 for float64)
    within a layer. Deterministic, and on the CPU bitwise equal for any number of threads.

    Papers: Hochreiter & Schmidhuber, Long short-term memory, 1997; Gers et al., Learning to forget, 2000; Sak et al.,
    Long short-term memory recurrent neural network architectures for large scale acoustic modeling, 2014.
    """
    if proj_size is not None:
        _check_projection(params, num_layers * (2 if bidirectional else 1), proj_size)
    return _call(
        "LSTM", input, hx, params, num_layers, bidirectional, dropout, training, batch_first, lengths
    )  # fmt: skip


def gru(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
) -> Any:
    """Gated recurrent units, in layers and in one or two directions.

    Equivalent to::

        layer = torch.nn.GRU(...)                     # params = layer._flat_weights
        output, h_n = layer(input, hx)

    Each step of a layer, with ``W = (W_r, W_z, W_n)`` stacked in this order::

        r, z = sigmoid(W_ih x + b_ih + W_hh h' + b_hh)
        n = tanh(W_in x + b_in + r * (W_hn h' + b_hn))
        h = (1 - z) * n + z * h'

    Arguments, result and properties are those of `lstm`; w_ih is ``(3H, I)``, and hx one tensor.

    Paper: Cho et al., Learning phrase representations using RNN encoder-decoder, 2014.
    """
    return _call("GRU", input, hx, params, num_layers, bidirectional, dropout, training, batch_first, lengths)


def rnn(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    nonlinearity: str = "tanh",
) -> Any:
    """Elman's recurrent network, in layers and in one or two directions.

    Equivalent to::

        layer = torch.nn.RNN(..., nonlinearity=nonlinearity)   # params = layer._flat_weights
        output, h_n = layer(input, hx)

    Each step of a layer: ``h = tanh(W_ih x + b_ih + W_hh h' + b_hh)``, or ``relu``.

    Arguments, result and properties are those of `lstm`; w_ih is ``(H, I)``, and hx one tensor.

    Paper: Elman, Finding structure in time, 1990.
    """
    mode = _elman_mode(nonlinearity)
    return _call(mode, input, hx, params, num_layers, bidirectional, dropout, training, batch_first, lengths)


def _elman_mode(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return "RNN_TANH" if nonlinearity == "tanh" else "RNN_RELU"


def _check_projection(params: Sequence[Tensor], sets: int, proj_size: int) -> None:
    each = len(params) // max(1, sets)
    found = params[each - 1].shape[0] if each % 2 else 0
    if proj_size != found:
        raise ValueError(f"proj_size: params hold a projection to {found} features (0: none), got {proj_size}")


def lstm_reference(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    proj_size: int | None = None,
) -> Any:
    """`lstm` in plain torch: its definition, and what its double backward differentiates."""
    if proj_size is not None:
        _check_projection(params, num_layers * (2 if bidirectional else 1), proj_size)
    return run_layers(
        "LSTM", input, hx, params, num_layers, bidirectional, dropout, training, batch_first, lengths, plain_layer
    )


def gru_reference(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
) -> Any:
    """`gru` in plain torch: its definition, and what its double backward differentiates."""
    return run_layers(
        "GRU", input, hx, params, num_layers, bidirectional, dropout, training, batch_first, lengths, plain_layer
    )


def rnn_reference(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    nonlinearity: str = "tanh",
) -> Any:
    """`rnn` in plain torch: its definition, and what its double backward differentiates."""
    mode = _elman_mode(nonlinearity)
    return run_layers(
        mode, input, hx, params, num_layers, bidirectional, dropout, training, batch_first, lengths, plain_layer
    )


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `lstm`: ``(B, I)`` and ``(h, c)``, ``(B, H)`` each (or without B), to the next ``(h, c)``.

    Equivalent to::

        torch.lstm_cell(input, hx, w_ih, w_hh, b_ih, b_hh)

    None for `hx` is zeros.
    """
    result: tuple[Tensor, Tensor] = _call_cell("LSTM", input, hx, w_ih, w_hh, b_ih, b_hh)
    return result


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of `gru`: ``(B, I)`` and ``(B, H)`` (or without B) to the next ``(B, H)``.

    Equivalent to::

        torch.gru_cell(input, hx, w_ih, w_hh, b_ih, b_hh)

    None for `hx` is zeros.
    """
    result: Tensor = _call_cell("GRU", input, hx, w_ih, w_hh, b_ih, b_hh)
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
) -> Tensor:
    """One step of `rnn`: ``(B, I)`` and ``(B, H)`` (or without B) to the next ``(B, H)``.

    Equivalent to::

        torch.rnn_tanh_cell(input, hx, w_ih, w_hh, b_ih, b_hh)  # or torch.rnn_relu_cell

    None for `hx` is zeros.
    """
    result: Tensor = _call_cell(_elman_mode(nonlinearity), input, hx, w_ih, w_hh, b_ih, b_hh)
    return result


def lstm_cell_reference(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`lstm_cell` in plain torch."""
    result: tuple[Tensor, Tensor] = run_cell("LSTM", input, hx, w_ih, w_hh, b_ih, b_hh, plain_step)
    return result


def gru_cell_reference(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """`gru_cell` in plain torch."""
    result: Tensor = run_cell("GRU", input, hx, w_ih, w_hh, b_ih, b_hh, plain_step)
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
) -> Tensor:
    """`rnn_cell` in plain torch."""
    result: Tensor = run_cell(_elman_mode(nonlinearity), input, hx, w_ih, w_hh, b_ih, b_hh, plain_step)
    return result
