"""Recurrent cells, one step each: torch's parameters and errors, computed by our kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Bound at import: replacing torch.nn.LSTMCell by ours later cannot make a cell call itself.
from torch.nn import GRUCell as _TorchGRUCell
from torch.nn import LSTMCell as _TorchLSTMCell
from torch.nn import RNNCell as _TorchRNNCell
from torch.nn import RNNCellBase as _TorchRNNCellBase

from pyseqnet.functional._recurrent_options import Rate, layer_options, lstm_mode
from pyseqnet.functional._recurrent_reference import weight_shapes
from pyseqnet.functional._recurrent_refusals import REFUSALS, explain_cell
from pyseqnet.functional._recurrent_stack import NO_OPTIONS, Options, run_cell
from pyseqnet.functional.recurrent_cell import one_step
from pyseqnet.nn._recurrent_parameters import JORDAN_NAMES, NAMES, open_forget_gates, reset, stated


class _Cell(_TorchRNNCellBase):
    _twin: Any
    _mode: str
    # what a cell that was converted from torch's has
    _options: Options = NO_OPTIONS
    _stated: dict[str, Any] = {}  # noqa: RUF012 - never changed: the options that differ from their defaults, for repr

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *(f"{name}={value!r}" for name, value in self._stated.items())])

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        if self._options is not NO_OPTIONS:
            params = [w for w in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh) if w is not None]
            return one_step(self._mode, input, hx, params, self._options, self.training)[1]
        own = self._parameters
        try:  # a parametrised or pruned weight is not among the parameters
            weights: tuple[Any, Any, Any, Any] = own["weight_ih"], own["weight_hh"], own["bias_ih"], own["bias_hh"]
        except KeyError:
            weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        if torch.compiler.is_compiling():
            return run_cell(self._mode, input, hx, *weights)
        try:
            return run_cell(self._mode, input, hx, *weights)
        except REFUSALS as error:
            twin = self._twin
            explain_cell(error, self._mode, input, hx, *weights, torch_call=lambda: twin.forward(self, input, hx))


class RNNCell(_Cell):
    """Drop-in for `torch.nn.RNNCell`: one step of Elman's network. See `pyseqnet.functional.rnn_cell`.

    Keywords beyond torch's: zoneout, clip.
    """

    __constants__ = ["input_size", "hidden_size", "bias", "nonlinearity"]  # noqa: RUF012 - torch's declaration
    _twin = _TorchRNNCell
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
        *,
        zoneout: float = 0.0,
        clip: float | None = None,
    ) -> None:
        options = layer_options(clip, zoneout)
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity, self._options = nonlinearity, options
        self._stated = stated(zoneout=zoneout, clip=clip)

    @property
    def _mode(self) -> str:  # type: ignore[override]
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return "RNN_TANH" if self.nonlinearity == "tanh" else "RNN_RELU"


class LSTMCell(_Cell):
    """Drop-in for `torch.nn.LSTMCell`: one step. See `pyseqnet.functional.lstm_cell`.

    Keywords beyond torch's are those of `LSTM` that a single step has, with the same parameters, without ``_l0``:
    streaming with a trained layer's weights gives the layer's outputs.
    """

    _twin = _TorchLSTMCell
    _mode = "LSTM"
    # what a cell that was converted from torch's has
    proj_size = 0
    _forget_bias: float | None = None
    _is_plain = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        proj_size: int = 0,
        peephole: str | None = None,
        layer_norm: bool = False,
        zoneout: Rate = 0.0,
        cell_clip: float | None = None,
        forget_bias: float | None = None,
    ) -> None:
        mode = lstm_mode(peephole, layer_norm)
        if not 0 <= proj_size < hidden_size:
            raise ValueError(f"proj_size: expected an integer from 0 to less than hidden_size, got {proj_size}")
        if forget_bias is not None and not bias:
            raise ValueError("forget_bias: expected None where bias is False")
        self._forget_bias = None
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        self.proj_size, self._mode, self._forget_bias = proj_size, mode, forget_bias
        self._options = layer_options(cell_clip, zoneout, has_cell=True)
        self._stated = stated(
            proj_size=proj_size, peephole=peephole, layer_norm=layer_norm, zoneout=zoneout, cell_clip=cell_clip,
            forget_bias=forget_bias,
        )  # fmt: skip
        self._is_plain = mode == "LSTM" and not proj_size and self._options is NO_OPTIONS
        shapes = weight_shapes(mode, input_size, hidden_size, proj_size or hidden_size, bias)
        self._names = [NAMES[name] for name in shapes]
        if not self._is_plain:
            for name, shape in zip(self._names, shapes.values(), strict=True):
                setattr(self, name, torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        if not self._is_plain or forget_bias is not None:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        reset(self, self.hidden_size)
        if self._forget_bias is not None:
            open_forget_gates(self, self.hidden_size, self._forget_bias)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        if self._is_plain:
            return super().forward(input, hx)
        params = [getattr(self, name) for name in self._names]
        return one_step(self._mode, input, hx, params, self._options, self.training)[1]


class JordanRNNCell(torch.nn.Module):
    """One step of `JordanRNN`: ``(B, I)`` and s ``(B, P)`` to the output and the next s.

    See `pyseqnet.functional.jordan_cell`. Parameters are those of the layer, without ``_l0``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        nonlinearity: str = "tanh",
        output_nonlinearity: str = "identity",
        decay: float = 0.0,
        bias: bool = True,
        *,
        zoneout: float = 0.0,
        clip: float | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.input_size, self.hidden_size, self.output_size = input_size, hidden_size, output_size
        self.nonlinearity, self.output_nonlinearity, self.decay = nonlinearity, output_nonlinearity, decay
        self._options = layer_options(clip, zoneout, output=output_nonlinearity, decay=decay)
        self._mode = f"JORDAN_{nonlinearity.upper()}"
        shapes = weight_shapes(self._mode, input_size, hidden_size, output_size, bias)
        self._names = [JORDAN_NAMES[name] for name in shapes]
        for name, shape in zip(self._names, shapes.values(), strict=True):
            setattr(self, name, torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset(self, self.hidden_size)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, {self.output_size}"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        params = [getattr(self, name) for name in self._names]
        result: tuple[Tensor, Tensor] = one_step(self._mode, input, hx, params, self._options, self.training)
        return result


class GRUCell(_Cell):
    """Drop-in for `torch.nn.GRUCell`: one step. See `pyseqnet.functional.gru_cell`.

    Keyword beyond torch's: zoneout.
    """

    _twin = _TorchGRUCell
    _mode = "GRU"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        zoneout: float = 0.0,
    ) -> None:
        options = layer_options(None, zoneout)
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)
        self._options, self._stated = options, stated(zoneout=zoneout)
