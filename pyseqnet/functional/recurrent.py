"""Recurrent networks: lstm, gru, rnn (Elman) and jordan. Single steps of them are in recurrent_cell.py.

Elman: Finding structure in time, 1990. Jordan: Serial order, 1986. Hochreiter & Schmidhuber: Long short-term memory,
1997. Gers, Schmidhuber & Cummins: Learning to forget, 2000. Sak, Senior & Beaufays (projection), 2014. Cho et al.
(GRU), 2014. Schuster & Paliwal: Bidirectional recurrent neural networks, 1997.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pyseqnet.functional._recurrent_layer import plain_layer
from pyseqnet.functional._recurrent_options import Rate, check_projection, elman_mode, layer_options, lstm_mode
from pyseqnet.functional._recurrent_refusals import REFUSALS, explain
from pyseqnet.functional._recurrent_stack import run_layers


def call(mode: str, *arguments: Any) -> Any:
    """`run_layers` by the kernels; a refusal is explained."""
    if torch.compiler.is_compiling():
        return run_layers(mode, *arguments)
    try:
        return run_layers(mode, *arguments)
    except REFUSALS as error:
        explain(error, mode, *arguments)


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
    peephole: str | None = None,
    layer_norm: bool = False,
    zoneout: Rate = 0.0,
    recurrent_dropout: float = 0.0,
    variational_dropout: Rate = 0.0,
    cell_clip: float | None = None,
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
        lengths: ``(B,)``, int64 on the CPU: how many steps each sequence really has, at least 1, in any order. Padding
            is never read, whatever it holds; outputs there are 0; the reverse direction starts at each sequence's own
            end, and h_n, c_n are each sequence's own last.
        proj_size: what the number of `params` tells as well; if given, it must agree.
        peephole: ``"diagonal"`` (Gers & Schmidhuber, 2000): i and f see ``p * c'``, o sees ``p * c``; params then end
            in w_ch ``(3H)``, for i, f, o. ``"full"``: all four gates see ``W_ch c'``, w_ch ``(4H, H)``.
        layer_norm: layer normalisation in the form of Ba et al., 2016 (as haste): ``LN(W_ih x) + LN(W_hh h')``, each
            over all 4H gates, then the biases; ``h = o * tanh(LN(c))``. Params then end in the gains gain_ih, gain_hh
            ``(4H)``, gain_c and the bias bias_c ``(H)``.
        zoneout: probability that a unit keeps its state of the step before, of h and c or ``(of h, of c)``; in
            evaluation states are mixed in this proportion (Krueger et al., 2017).
        recurrent_dropout: DropConnect of w_hh, one mask a call for all steps and sequences (Merity et al., 2018).
        variational_dropout: dropout with one mask for all steps of a sequence, of each layer's input and the last
            layer's output or ``(of inputs, of the output)`` (Gal & Ghahramani, 2016).
        cell_clip: clips c to ``[-cell_clip, cell_clip]`` before h is made of it.

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
    mode = lstm_mode(peephole, layer_norm)
    if proj_size is not None:
        check_projection(mode, params, num_layers * (2 if bidirectional else 1), proj_size)
    options = layer_options(cell_clip, zoneout, recurrent_dropout, variational_dropout, has_cell=True)
    return call(mode, input, hx, params, num_layers, bidirectional, dropout, training, batch_first, lengths, options)


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
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    variational_dropout: Rate = 0.0,
) -> Any:
    """Gated recurrent units, in layers and in one or two directions.

    Equivalent to::

        layer = torch.nn.GRU(...)                     # params = layer._flat_weights
        output, h_n = layer(input, hx)

    Each step of a layer, with ``W = (W_r, W_z, W_n)`` stacked in this order::

        r, z = sigmoid(W_ih x + b_ih + W_hh h' + b_hh)
        n = tanh(W_in x + b_in + r * (W_hn h' + b_hn))
        h = (1 - z) * n + z * h'

    Arguments, result and properties are those of `lstm`; w_ih is ``(3H, I)``, and hx one tensor. Of the options, those
    that concern h.

    Paper: Cho et al., Learning phrase representations using RNN encoder-decoder, 2014.
    """
    options = layer_options(None, zoneout, recurrent_dropout, variational_dropout)
    return call("GRU", input, hx, params, num_layers, bidirectional, dropout, training, batch_first, lengths, options)


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
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    variational_dropout: Rate = 0.0,
    clip: float | None = None,
) -> Any:
    """Elman's recurrent network, in layers and in one or two directions.

    Equivalent to::

        layer = torch.nn.RNN(..., nonlinearity=nonlinearity)   # params = layer._flat_weights
        output, h_n = layer(input, hx)

    Each step of a layer: ``h = tanh(W_ih x + b_ih + W_hh h' + b_hh)``, or ``relu``.

    Arguments, result and properties are those of `lstm`; w_ih is ``(H, I)``, and hx one tensor. Of the options, those
    that concern h; `clip` clips it (with ReLU: Hannun et al., Deep Speech, 2014).

    Paper: Elman, Finding structure in time, 1990.
    """
    mode = elman_mode(nonlinearity)
    options = layer_options(clip, zoneout, recurrent_dropout, variational_dropout)
    return call(mode, input, hx, params, num_layers, bidirectional, dropout, training, batch_first, lengths, options)


def jordan(
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
    output_nonlinearity: str = "identity",
    decay: float = 0.0,
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    variational_dropout: Rate = 0.0,
    clip: float | None = None,
) -> Any:
    """Jordan's recurrent network, which feeds back its output, in layers and in one or two directions.

    Equivalent to::

        for x in input:  # each layer of H hidden units and P outputs, from s = hx
            m = torch.tanh(x @ w_ih.T + b_ih + s @ w_hh.T + b_hh)  # nonlinearity: tanh or relu
            y = m @ w_ho.T + b_ho                   # output_nonlinearity: identity, tanh, relu or sigmoid of it
            s = decay * s + y                       # decay 0: the output itself is fed back

    Args:
        hx: s_0, ``(layers * directions, B, P)``; None for zeros.
        params: for each layer and in it for each direction w_ih ``(H, I)``, w_hh ``(H, P)``, then b_ih, b_hh ``(H)``
            unless there are none, then w_ho ``(P, H)`` and with biases b_ho ``(P)``.
        decay: of the state unit, Jordan's self-connection.

    The other arguments and properties are those of `lstm`; zoneout keeps units of s, `clip` clips m.

    Returns:
        ``output, s_n``: the outputs y, with ``directions * P`` features, and the last states.

    Paper: Jordan, Serial order: a parallel distributed processing approach, 1986.
    """
    mode = elman_mode(nonlinearity).replace("RNN", "JORDAN")
    options = layer_options(clip, zoneout, recurrent_dropout, variational_dropout, output_nonlinearity, decay)
    return call(mode, input, hx, params, num_layers, bidirectional, dropout, training, batch_first, lengths, options)


def jordan_reference(
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
    output_nonlinearity: str = "identity",
    decay: float = 0.0,
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    variational_dropout: Rate = 0.0,
    clip: float | None = None,
) -> Any:
    """`jordan` in plain torch: its definition, and what its double backward differentiates."""
    mode = elman_mode(nonlinearity).replace("RNN", "JORDAN")
    options = layer_options(clip, zoneout, recurrent_dropout, variational_dropout, output_nonlinearity, decay)
    form = num_layers, bidirectional, dropout, training, batch_first, lengths, options
    return run_layers(mode, input, hx, params, *form, plain_layer)


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
    peephole: str | None = None,
    layer_norm: bool = False,
    zoneout: Rate = 0.0,
    recurrent_dropout: float = 0.0,
    variational_dropout: Rate = 0.0,
    cell_clip: float | None = None,
) -> Any:
    """`lstm` in plain torch: its definition, and what its double backward differentiates."""
    mode = lstm_mode(peephole, layer_norm)
    if proj_size is not None:
        check_projection(mode, params, num_layers * (2 if bidirectional else 1), proj_size)
    options = layer_options(cell_clip, zoneout, recurrent_dropout, variational_dropout, has_cell=True)
    form = num_layers, bidirectional, dropout, training, batch_first, lengths, options
    return run_layers(mode, input, hx, params, *form, plain_layer)


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
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    variational_dropout: Rate = 0.0,
) -> Any:
    """`gru` in plain torch: its definition, and what its double backward differentiates."""
    options = layer_options(None, zoneout, recurrent_dropout, variational_dropout)
    form = num_layers, bidirectional, dropout, training, batch_first, lengths, options
    return run_layers("GRU", input, hx, params, *form, plain_layer)


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
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    variational_dropout: Rate = 0.0,
    clip: float | None = None,
) -> Any:
    """`rnn` in plain torch: its definition, and what its double backward differentiates."""
    mode = elman_mode(nonlinearity)
    options = layer_options(clip, zoneout, recurrent_dropout, variational_dropout)
    form = num_layers, bidirectional, dropout, training, batch_first, lengths, options
    return run_layers(mode, input, hx, params, *form, plain_layer)
