"""What torch's recurrent layers do around one layer: forms of input, initial states, layers with dropout between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pyseqnet.functional._common import autocast_cast, autocast_dtype
from pyseqnet.functional._recurrent_layer import fast_layer, fast_step, zero_state
from pyseqnet.functional._recurrent_reference import HAS_CELL

_dropout = torch.dropout  # bound at import: replacing torch's by ours later cannot recurse
OneLayer = Callable[..., tuple[Tensor, Tensor, Tensor | None]]


class Options(NamedTuple):
    """What a call asks for beyond torch's layers."""

    training: str = ""  # the cell's options in words, in training and in evaluation
    evaluation: str = ""
    zoneout: tuple[float, float] = (0.0, 0.0)  # of h, of c
    recurrent_dropout: float = 0.0  # of w_hh
    variational: tuple[float, float] = (0.0, 0.0)  # dropout of each layer's input, and of the last output


NO_OPTIONS = Options()


def run_layers(
    mode: str,
    input: Tensor | PackedSequence,
    hx: Any,
    params: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    dropout: float,
    training: bool,
    batch_first: bool,
    lengths: Tensor | Sequence[int] | None,
    options: Options = NO_OPTIONS,
    one_layer: OneLayer = fast_layer,
) -> Any:
    """What torch's layers compute. What a kernel would refuse anyhow is not checked here: see `explain`."""
    is_lstm = mode in HAS_CELL
    if hx is None:
        h_0 = c_0 = None
    elif is_lstm:
        h_0, c_0 = hx
    else:
        h_0, c_0 = hx, None
    batch_sizes = unsorted = None
    batched = True
    if isinstance(input, PackedSequence):
        if lengths is not None:
            raise ValueError("lengths: a PackedSequence has its own; expected None")
        data, batch_sizes, order, unsorted = input
        batch_first = False
        if h_0 is None:
            h_0, c_0 = zero_state(mode, num_layers * (2 if bidirectional else 1), data, int(batch_sizes[0]), params)
        elif order is not None:
            h_0 = h_0.index_select(1, order)
            c_0 = None if c_0 is None else c_0.index_select(1, order)
    else:
        data = input
        dims = data.dim()
        if dims == 2:
            batched = batch_first = False
            data = data.unsqueeze(1)
            h_0 = None if h_0 is None else unbatched_state(h_0)
            c_0 = None if c_0 is None else unbatched_state(c_0)
            if lengths is not None:
                raise ValueError("lengths: one sequence has no padding; expected None for an unbatched input")
        elif dims != 3:
            raise ValueError(f"input must have 2 or 3 dimensions, got {dims}")
        if data.shape[1 if batch_first else 0] == 0:
            raise ValueError("Expected sequence length to be larger than 0 in RNN")
        if lengths is not None:
            lengths = _read_lengths(lengths, *data.shape[:2][:: -1 if batch_first else 1])
    promoted = None
    if torch._C._is_any_autocast_enabled():
        dtype = autocast_dtype(data)
        if dtype is not None:
            promoted = _promoted_state(mode, data, h_0, c_0, dtype)
            data, params = autocast_cast(data, dtype), [autocast_cast(p, dtype) for p in params]
            h_0 = None if h_0 is None else autocast_cast(h_0, dtype)
            c_0 = None if c_0 is None else autocast_cast(c_0, dtype)
    directions = 2 if bidirectional else 1
    form = mode, directions, batch_first, lengths, batch_sizes
    if options is not NO_OPTIONS:
        one_layer = _with_options(options, one_layer, training)
    if num_layers == 1:
        output, h_n, c_n = one_layer(*form, "", None, None, data, h_0, c_0, *params)
    else:
        output, h_n, c_n = _stack(form, num_layers, dropout if training else 0.0, data, h_0, c_0, params, one_layer)
    if promoted is not None:
        if mode == "GRU":
            output, h_n = output.to(promoted), h_n.to(promoted)
        elif is_lstm and c_n is not None and h_n.shape[2] != c_n.shape[2]:
            c_n = c_n.to(promoted)
    if training and options.variational[1]:
        output = _drop_features(output, options.variational[1], batch_first, batch_sizes)
    if batch_sizes is not None:
        if unsorted is not None:
            h_n = h_n.index_select(1, unsorted)
            c_n = c_n.index_select(1, unsorted) if is_lstm and c_n is not None else None
        packed = PackedSequence(output, batch_sizes, input.sorted_indices, unsorted)  # type: ignore[union-attr]
        return packed, ((h_n, c_n) if is_lstm else h_n)
    if not batched:
        output, h_n = output.squeeze(1), h_n.squeeze(1)
        c_n = c_n.squeeze(1) if is_lstm and c_n is not None else None
    return output, ((h_n, c_n) if is_lstm else h_n)


def _promoted_state(
    mode: str, input: Tensor, h: Tensor | None, c: Tensor | None, low: torch.dtype
) -> torch.dtype | None:
    """The dtype of a state that is added to products of autocast's dtype: torch on the CPU autocasts the products of
    GRU, of single steps and of projections alone. (Its whole LSTM, and all of CUDA's, are cast with their states.)"""
    if input.device.type != "cpu" or input.dtype == torch.float64:
        return None
    kept = c if mode == "LSTM" else h
    return torch.promote_types(input.dtype if kept is None else kept.dtype, low)


def unbatched_state(state: Tensor) -> Tensor:
    """A state (rows, features) as one of a batch of 1; RuntimeError in torch's words for another shape."""
    if state.dim() != 2:
        raise RuntimeError(f"For unbatched 2-D input, hx should also be 2-D but got {state.dim()}-D tensor")
    return state.unsqueeze(1)


def _stack(
    form: tuple[str, int, bool, Any, Any],
    num_layers: int,
    dropout: float,
    data: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    params: Sequence[Tensor],
    one_layer: OneLayer,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Each layer reads the outputs of the one below; dropout between them, none after the last."""
    mode, directions = form[:2]
    if num_layers < 1 or len(params) % num_layers:
        raise ValueError(f"params: {len(params)} tensors do not divide into num_layers={num_layers} layers")
    each = len(params) // num_layers
    all_h, all_c = [], []
    for number in range(num_layers):
        if number and dropout:
            data = _dropout(data, dropout, True)
        rows = slice(number * directions, (number + 1) * directions)
        data, h_n, c_n = one_layer(
            *form,
            "",
            None,
            None,
            data,
            None if h_0 is None else h_0[rows],
            None if c_0 is None else c_0[rows],
            *params[number * each : (number + 1) * each],
        )
        all_h.append(h_n)
        all_c.append(c_n)
    c_n = torch.cat(all_c) if mode in HAS_CELL else None  # type: ignore[arg-type]
    return data, torch.cat(all_h), c_n


def _with_options(options: Options, one_layer: OneLayer, training: bool) -> OneLayer:
    """`one_layer` with the options: masks and dropped weights are drawn once a call, for all steps."""

    def run(
        mode: str,
        directions: int,
        batch_first: bool,
        lengths: Any,
        batch_sizes: Any,
        _: str,
        no_mask: None,
        none: None,
        data: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        zone_h = zone_c = None
        if training:
            if options.variational[0]:
                data = _drop_features(data, options.variational[0], batch_first, batch_sizes)
            if options.recurrent_dropout:
                each = len(weights) // directions
                weights = tuple(
                    _dropout(w, options.recurrent_dropout, True) if k % each == 1 else w for k, w in enumerate(weights)
                )
            rows = data.shape[0] if batch_sizes is not None else data.shape[0] * data.shape[1]
            rate_h, rate_c = options.zoneout
            if rate_h:
                zone_h = torch.rand(directions, rows, weights[1].shape[1], device=data.device) < rate_h
            if rate_c and mode in HAS_CELL:
                zone_c = torch.rand(directions, rows, weights[1].shape[0] // 4, device=data.device) < rate_c
        cell = options.training if training else options.evaluation
        form = mode, directions, batch_first, lengths, batch_sizes
        return one_layer(*form, cell, zone_h, zone_c, data, h_0, c_0, *weights)

    return run


def _drop_features(data: Tensor, p: float, batch_first: bool, batch_sizes: Tensor | None) -> Tensor:
    """Dropout with one mask for all steps of a sequence (Gal & Ghahramani, 2016)."""
    if batch_sizes is not None:
        mask = _dropout(data.new_ones(int(batch_sizes[0]), data.shape[1]), p, True)
        starts = (batch_sizes.cumsum(0) - batch_sizes).repeat_interleave(batch_sizes)
        sequence = torch.arange(data.shape[0]) - starts
        return data * mask.index_select(0, sequence.to(data.device))
    time = 1 if batch_first else 0
    shape = list(data.shape)
    shape[time] = 1
    return data * _dropout(data.new_ones(shape), p, True)


def _read_lengths(lengths: Any, steps: int, batch: int) -> Tensor:
    if not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths, dtype=torch.int64)
    if lengths.dtype != torch.int64 or lengths.device.type not in ("cpu", "meta") or lengths.dim() != 1:
        raise ValueError(
            f"lengths: expected a one-dimensional int64 tensor on the CPU, got {lengths.dtype} of shape "
            f"{tuple(lengths.shape)} on {lengths.device}"
        )
    if lengths.shape[0] != batch:
        raise ValueError(f"lengths: expected one for each of the {batch} sequences, got {lengths.shape[0]}")
    contiguous: Tensor = lengths.contiguous()
    if type(contiguous) is Tensor and not torch.compiler.is_compiling() and batch and contiguous.is_cpu:
        low, high = contiguous.aminmax()
        if low < 1 or high > steps:
            index = int(((contiguous < 1) | (contiguous > steps)).nonzero()[0])
            raise ValueError(
                f"lengths: expected values from 1 to the input's {steps} steps, got {contiguous.tolist()}: "
                f"{int(contiguous[index])} at index {index}"
            )
    return contiguous


def run_cell(
    mode: str,
    input: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    one_step: Callable[..., tuple[Tensor, Tensor | None]] = fast_step,
) -> Any:
    """One step with torch's forms of input and state, batched or not: h, in an LSTM (h, c)."""
    is_lstm = mode == "LSTM"
    h = c = None
    if hx is not None:
        h, c = hx if is_lstm else (hx, None)
    batched = input.dim() == 2
    if not batched:
        if input.dim() != 1:
            raise ValueError(f"input must have 1 or 2 dimensions, got {input.dim()}")
        input = input.unsqueeze(0)
        h, c = None if h is None else h.unsqueeze(0), None if c is None else c.unsqueeze(0)
    if b_ih is None and b_hh is None:
        weights: tuple[Tensor, ...] = (w_ih, w_hh)
    else:
        weights = (
            w_ih,
            w_hh,
            b_ih if b_ih is not None else w_ih.new_zeros(w_ih.shape[0]),
            b_hh if b_hh is not None else w_hh.new_zeros(w_hh.shape[0]),
        )
    promoted = None
    if torch._C._is_any_autocast_enabled():
        dtype = autocast_dtype(input)
        if dtype is not None:
            promoted = _promoted_state(mode, input, h, c, dtype)
            input, weights = autocast_cast(input, dtype), tuple(autocast_cast(w, dtype) for w in weights)
            h, c = None if h is None else autocast_cast(h, dtype), None if c is None else autocast_cast(c, dtype)
    h, c = one_step(mode, input, h, c, *weights)
    if promoted is not None and mode in ("GRU", "LSTM"):
        h, c = h.to(promoted), None if c is None else c.to(promoted)
    if not batched:
        h = h.squeeze(0)
        c = c.squeeze(0) if is_lstm and c is not None else None
    return (h, c) if is_lstm else h
