"""What to say about recurrent calls that were refused. Runs after a refusal only: an accepted call pays nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pyseqnet.functional import _recurrent_reference as reference
from pyseqnet.functional._common import SUPPORTED_DTYPES, same_device
from pyseqnet.functional._recurrent_stack import unbatched_state

# Bound at import: replacing torch's by ours later cannot recurse.
_torch_layers: dict[str, Any] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}
_torch_cells: dict[str, Any] = {
    "LSTM": torch.lstm_cell,
    "GRU": torch.gru_cell,
    "RNN_TANH": torch.rnn_tanh_cell,
    "RNN_RELU": torch.rnn_relu_cell,
}
_CELL_NAMES = {"LSTM": "lstm_cell", "GRU": "gru_cell", "RNN_TANH": "rnn_cell", "RNN_RELU": "rnn_cell"}
_NAMES = {mode: mode.split("_")[0].lower() for mode in reference.GATES}

REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError)
"""What a call with wrong arguments may end in; whoever catches it asks `explain` for better words."""


def explain(
    error: Exception,
    mode: str,
    input: Any,
    hx: Any,
    params: Any,
    num_layers: Any,
    bidirectional: Any,
    dropout: Any,
    training: Any,
    batch_first: Any,
    lengths: Any,
    options: Any = None,
    torch_call: Callable[[], object] | None = None,
) -> NoReturn:
    """Raise for a call that was refused: in torch's words where torch refuses it as well, else in ours.

    `torch_call` is the same call of torch's layer, if the call came through a layer.
    """
    name = _NAMES[mode]
    if _says_enough(error):
        raise error
    if lengths is None and mode in _torch_layers:
        with torch.no_grad():
            if torch_call is not None:
                torch_call()
            _as_torch(mode, input, hx, params, num_layers, bidirectional, dropout, training, batch_first)
    states = hx if mode in reference.HAS_CELL and hx is not None else [hx]
    _explain_tensors(error, name, [input.data if isinstance(input, PackedSequence) else input, *states, *params])
    _check_shapes(name, mode, input, hx, params, num_layers, bidirectional, batch_first, lengths)
    raise error


def _says_enough(error: Exception) -> bool:
    """Not about the arguments: memory, or a functorch transform that our operations do not take part in."""
    return isinstance(error, torch.OutOfMemoryError) or "Batching rule" in str(error)


def _explain_tensors(error: Exception, name: str, tensors: Sequence[Any]) -> None:
    """TypeError for a dtype without kernels, NotImplementedError for such a device; RuntimeError for a mixture."""
    present = [t for t in tensors if isinstance(t, Tensor)]
    for tensor in present:
        if tensor.dtype not in SUPPORTED_DTYPES:
            wanted = ", ".join(str(d).removeprefix("torch.") for d in SUPPORTED_DTYPES)
            raise TypeError(f"pyseqnet {name}: expected one of {wanted}; got {tensor.dtype}") from None
    if len({t.dtype for t in present}) > 1:
        found = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in present}))
        raise RuntimeError(f"pyseqnet {name}: expected one dtype for input, hx and params; got {found}") from None
    same_device(f"pyseqnet {name}", *present)
    if isinstance(error, NotImplementedError) and "Could not run 'pyseqnet::" in str(error):
        raise NotImplementedError(
            f"pyseqnet {name}: no kernels for {present[0].device} in this build; see pyseqnet.build_info()"
        ) from error


def _as_torch(
    mode: str,
    input: Any,
    hx: Any,
    params: Any,
    num_layers: Any,
    bidirectional: Any,
    dropout: Any,
    training: Any,
    batch_first: Any,
) -> None:
    """The same call of torch's function; it knows neither unbatched input nor an absent state."""
    packed = isinstance(input, PackedSequence)
    data = input.data if packed else input
    if not packed and data.dim() == 2:
        data, batch_first = data.unsqueeze(1), False
        if hx is not None:
            hx = tuple(unbatched_state(h) for h in hx) if mode == "LSTM" else unbatched_state(hx)
    directions = 2 if bidirectional else 1
    each = len(params) // max(1, num_layers * directions)
    if hx is None:
        batch = int(input.batch_sizes[0]) if packed else data.shape[0 if batch_first else 1]
        hidden = params[0].shape[0] // reference.GATES[mode]
        h_0 = data.new_zeros(num_layers * directions, batch, params[1].shape[1])
        hx = (h_0, data.new_zeros(num_layers * directions, batch, hidden)) if mode == "LSTM" else h_0
    elif mode == "LSTM":
        hx = tuple(hx)
    form = (hx, list(params), each >= 4, num_layers, float(dropout), training, bidirectional)
    if packed:
        _torch_layers[mode](data, input.batch_sizes, *form)
    else:
        _torch_layers[mode](data, *form, batch_first)


def _check_shapes(
    name: str,
    mode: str,
    input: Any,
    hx: Any,
    params: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    lengths: Any,
) -> None:
    """ValueError naming the first argument that does not fit the others; RuntimeError for the input's features."""

    def expect(argument: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"pyseqnet {name}: {argument}: expected the shape {shape}, got {tuple(tensor.shape)}")

    data = input.data if isinstance(input, PackedSequence) else input
    directions = 2 if bidirectional else 1
    sets = num_layers * directions
    each, left = divmod(len(params), sets)
    wanted = {len(reference.weight_shapes(mode, 1, 2, r, b)) for r in (1, 2) for b in (False, True)}
    if mode in ("GRU", "RNN_TANH", "RNN_RELU"):
        wanted = {2, 4}
    if left or each not in wanted:
        raise ValueError(
            f"pyseqnet {name}: params: expected w_ih, w_hh[, b_ih, b_hh]{'[, w_hr]' if mode == 'LSTM' else ''} for "
            f"each of {num_layers} layers and {directions} directions, got {len(params)} tensors"
            if mode in _torch_layers
            else f"pyseqnet {name}: params: expected {' or '.join(map(str, sorted(wanted)))} tensors for each of "
            f"{num_layers} layers and {directions} directions, got {len(params)}"
        )
    rows = params[0].shape[0]
    hidden, rest = divmod(rows, reference.GATES[mode])
    if rest:
        raise ValueError(f"pyseqnet {name}: params[0]: expected a multiple of {reference.GATES[mode]} rows, got {rows}")
    if params[0].dim() == 2 and data.shape[-1] != params[0].shape[1]:
        raise RuntimeError(  # torch's words
            f"input.size(-1) must be equal to input_size. Expected {params[0].shape[1]}, got {data.shape[-1]}"
        )
    first = reference.by_direction(mode, params, sets)[0]
    features = hidden if first.w_hr is None else first.w_hr.shape[0]
    for number in range(sets):
        width = data.shape[-1] if number < directions else features * directions
        shapes = reference.weight_shapes(mode, width, hidden, features, first.b_ih is not None)
        for position, shape in enumerate(shapes.values(), number * each):
            expect(f"params[{position}]", params[position], shape)
    if isinstance(input, PackedSequence):
        batch: tuple[int, ...] = (int(input.batch_sizes[0]),)
    elif data.dim() == 3:
        batch = (data.shape[0 if batch_first else 1],)
    else:
        batch = ()
    if hx is not None:
        states = hx if mode in reference.HAS_CELL else [hx]
        for position, (state, size) in enumerate(zip(states, (features, hidden), strict=False)):
            expect(f"hx[{position}]" if mode in reference.HAS_CELL else "hx", state, (sets, *batch, size))


def explain_cell(
    error: Exception,
    mode: str,
    input: Any,
    hx: Any,
    w_ih: Any,
    w_hh: Any,
    b_ih: Any,
    b_hh: Any,
    torch_call: Callable[[], object] | None = None,
) -> NoReturn:
    """As `explain`."""
    name = _CELL_NAMES[mode]
    if _says_enough(error):
        raise error
    with torch.no_grad():
        if torch_call is not None:
            torch_call()
        _cell_as_torch(mode, input, hx, w_ih, w_hh, b_ih, b_hh)
    states = hx if mode == "LSTM" and hx is not None else [hx]
    _explain_tensors(error, name, [input, *states, w_ih, w_hh, b_ih, b_hh])
    raise error


def _cell_as_torch(mode: str, input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> None:
    """The same call of torch's function; it knows neither unbatched input nor an absent state."""
    data, state = input, hx
    if data.dim() == 1:
        data = data.unsqueeze(0)
        if hx is not None:
            state = tuple(h.unsqueeze(0) for h in hx) if mode == "LSTM" else hx.unsqueeze(0)
    if hx is None:
        zeros = data.new_zeros(data.shape[0], w_hh.shape[1])
        state = (zeros, zeros) if mode == "LSTM" else zeros
    _torch_cells[mode](data, state, w_ih, w_hh, b_ih, b_hh)
