"""What recurrent functions take beyond torch's arguments: read, checked, and brought into the kernels' terms."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyseqnet.functional._recurrent_reference import Options as CellOptions
from pyseqnet.functional._recurrent_reference import by_direction
from pyseqnet.functional._recurrent_stack import NO_OPTIONS, Options

Rate = float | tuple[float, float]


def _rate(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a probability between 0 and 1, got {value}")
    return float(value)


def _rates(name: str, value: Rate) -> tuple[float, float]:
    first, second = value if isinstance(value, (tuple, list)) else (value, value)
    return _rate(name, first), _rate(name, second)


def layer_options(
    clip: float | None = None,
    zoneout: Rate = 0.0,
    recurrent_dropout: float = 0.0,
    variational_dropout: Rate = 0.0,
    output: str = "identity",
    decay: float = 0.0,
    has_cell: bool = False,
) -> Options:
    """The options of a call, checked; `NO_OPTIONS` where there are none."""
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: expected a positive limit or None, got {clip}")
    if output not in ("identity", "tanh", "relu", "sigmoid"):
        raise ValueError(f"output_nonlinearity: expected identity, tanh, relu or sigmoid, got {output!r}")
    rates = _rates("zoneout", zoneout)
    cell = CellOptions(output, float(decay), float(clip or 0.0))
    options = Options(
        cell.words(),
        cell._replace(zone_h=rates[0], zone_c=rates[1] if has_cell else 0.0).words(),
        rates,
        _rate("recurrent_dropout", recurrent_dropout),
        _rates("variational_dropout", variational_dropout),
    )
    return NO_OPTIONS if options == NO_OPTIONS else options


def lstm_mode(peephole: str | None, layer_norm: bool) -> str:
    """The mode of an LSTM with these options; ValueError for a combination that does not exist."""
    if peephole not in (None, "diagonal", "full"):
        raise ValueError(f"peephole: expected None, 'diagonal' or 'full', got {peephole!r}")
    if layer_norm:
        if peephole is not None:
            raise ValueError("layer_norm: not together with peephole; no published LSTM has both")
        return "LSTM_LAYER_NORM"
    return {None: "LSTM", "diagonal": "LSTM_PEEPHOLE", "full": "LSTM_FULL_PEEPHOLE"}[peephole]


def elman_mode(nonlinearity: str) -> str:
    """The mode of an Elman network with this nonlinearity; ValueError for another."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return "RNN_TANH" if nonlinearity == "tanh" else "RNN_RELU"


def check_projection(mode: str, params: Sequence[Tensor], sets: int, proj_size: int) -> None:
    """ValueError where `proj_size` is not what the number of `params` tells."""
    w_hr = by_direction(mode, params, max(1, sets))[0].w_hr
    found = 0 if w_hr is None else w_hr.shape[0]
    if proj_size != found:
        raise ValueError(f"proj_size: params hold a projection to {found} features (0: none), got {proj_size}")
