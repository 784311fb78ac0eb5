"""Recurrent layers and cells: torch's parameters, helper methods and errors, computed by our kernels.

The layers derive from `torch.nn.RNNBase`, not from `torch.nn.LSTM`: torch.compile refuses subclasses of that in a
full graph. What `torch.nn.LSTM` adds to its base is bound here by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Bound at import: replacing torch.nn.LSTM by ours later cannot make a class its own base, or call itself.
from torch.nn import GRU as _TorchGRU
from torch.nn import LSTM as _TorchLSTM
from torch.nn import RNN as _TorchRNN
from torch.nn import GRUCell as _TorchGRUCell
from torch.nn import LSTMCell as _TorchLSTMCell
from torch.nn import RNNBase as _TorchRNNBase
from torch.nn import RNNCell as _TorchRNNCell
from torch.nn import RNNCellBase as _TorchRNNCellBase
from torch.nn.utils.rnn import PackedSequence

from pyseqnet.functional._recurrent_reference import weight_shapes
from pyseqnet.functional._recurrent_refusals import REFUSALS, explain, explain_cell
from pyseqnet.functional._recurrent_stack import NO_OPTIONS, Options, run_cell, run_layers
from pyseqnet.functional.recurrent import Rate, layer_options, lstm_mode, one_step

_PROJECTION_REFUSED = "proj_size argument is only supported for LSTM, not RNN or GRU"


# Of `Weights`, what a parameter is called in state_dict, before _l0, _l1, ... and _reverse.
_NAMES = {
    "w_ih": "weight_ih", "w_hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh", "w_hr": "weight_hr",
    "w_ch": "weight_ch", "gain_ih": "gain_ih", "gain_hh": "gain_hh", "gain_c": "gain_c", "bias_c": "bias_c",
}  # fmt: skip
_JORDAN_NAMES = {**_NAMES, "w_hr": "weight_ho", "b_hr": "bias_ho"}


def _reset(layer: torch.nn.Module, hidden_size: int) -> None:
    """As torch's layers begin; normalisations as the identity."""
    bound = 1 / math.sqrt(hidden_size) if hidden_size > 0 else 0
    for name, parameter in layer.named_parameters():
        if name.startswith("gain"):
            torch.nn.init.ones_(parameter)
        elif name.startswith("bias_c"):
            torch.nn.init.zeros_(parameter)
        else:
            torch.nn.init.uniform_(parameter, -bound, bound)


def _open_forget_gates(layer: torch.nn.Module, hidden_size: int, forget_bias: float) -> None:
    """The sum of both biases of every forget gate (Jozefowicz et al., 2015)."""
    forget = slice(hidden_size, 2 * hidden_size)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("bias_ih"):
                parameter[forget] = forget_bias
            elif name.startswith("bias_hh"):
                parameter[forget] = 0


class _Recurrent(_TorchRNNBase):
    """What RNN, LSTM, GRU and JordanRNN share: the call."""

    _twin: Any  # torch's layer, whose forward says what is wrong with refused arguments; None: there is none
    _kernel_mode: str | None = None  # where it is not torch's mode
    _options: Options = NO_OPTIONS
    _stated: dict[str, Any] = {}  # noqa: RUF012 - never changed: the options that differ from their defaults, for repr

    def _add_weights(self, mode: str, names: dict[str, str], without: Sequence[str] = (), **factory: Any) -> None:
        """Registers the parameters of this mode, but for those there are, in the order in which functions take them."""
        directions = 2 if self.bidirectional else 1
        features = self.proj_size or self.hidden_size
        all_names: list[list[str]] = []
        for layer in range(self.num_layers):
            inputs = self.input_size if layer == 0 else features * directions
            for direction in range(directions):
                shapes = weight_shapes(mode, inputs, self.hidden_size, features, self.bias)
                suffix = f"_l{layer}{'_reverse' if direction else ''}"
                for name, shape in shapes.items():
                    if name not in without:
                        parameter = torch.nn.Parameter(torch.empty(shape, **factory))
                        setattr(self, names[name] + suffix, parameter)
                all_names.append([names[name] + suffix for name in shapes])
        self._all_weights = all_names
        self._flat_weights_names = [name for own in all_names for name in own]
        self._kernel_mode = mode
        self._init_flat_weights()
        self.reset_parameters()

    def flatten_parameters(self) -> None:
        """Torch's, for cuDNN; our kernels read weights where they lie, and torch's other layers keep the call."""
        if self._kernel_mode is None:
            super().flatten_parameters()

    def _weights(self) -> list[Tensor]:
        """`_flat_weights`, brought up to date as torch does where a parameter was replaced or is computed."""
        if torch.compiler.is_compiling():
            return [getattr(self, name) for name in self._flat_weights_names]
        own = self._parameters
        flat: list[Tensor] = self._flat_weights  # type: ignore[assignment]
        for name, weight in zip(self._flat_weights_names, flat, strict=True):
            if own.get(name) is not weight:
                self._update_flat_weights()
                return self._flat_weights  # type: ignore[return-value]
        return flat

    def forward(self, input: Tensor | PackedSequence, hx: Any = None, *, lengths: Tensor | None = None) -> Any:
        """Torch's forward; ``lengths=`` is ours.

        Args:
            input: ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, ``(T, I)``, or a PackedSequence.
            hx: the initial state, for LSTM a pair; None for zeros.
            lengths: ``(B,)``, int64 on the CPU: the real length of each sequence of a padded batch, in any order.
                Padding is never read, and the output there is 0; the reverse direction starts at each sequence's
                own end, and the final state is each sequence's own.

        Returns:
            The output in the form of the input, and the final state.
        """
        arguments = (
            self._kernel_mode or self.mode,
            input,
            hx,
            self._weights(),
            self.num_layers,
            self.bidirectional,
            self.dropout,
            self.training,
            self.batch_first,
            lengths,
            self._options,
        )
        if torch.compiler.is_compiling():
            return run_layers(*arguments)
        try:
            return run_layers(*arguments)
        except REFUSALS as error:
            torch_call = None if self._kernel_mode else lambda: self._twin.forward(self, input, hx)
            explain(error, *arguments, torch_call=torch_call)

    def extra_repr(self) -> str:
        words: str = super().extra_repr()
        return ", ".join([words, *(f"{name}={value!r}" for name, value in self._stated.items())])


def _stated(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value not in (None, False, 0.0)}


class RNN(_Recurrent):
    """Drop-in for `torch.nn.RNN`: Elman's network, tanh or relu. See `pyseqnet.functional.rnn`.

    Keywords beyond torch's: zoneout, recurrent_dropout, variational_dropout, clip.
    """

    _twin = _TorchRNN

    def __init__(
        self,
        *args: Any,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        variational_dropout: Rate = 0.0,
        clip: float | None = None,
        **kwargs: Any,
    ) -> None:
        if "proj_size" in kwargs:
            raise ValueError(_PROJECTION_REFUSED)
        options = layer_options(clip, zoneout, recurrent_dropout, variational_dropout)
        if len(args) > 3:  # torch's fourth positional argument is the nonlinearity, not its base's bias
            self.nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)
        self._options = options
        self._stated = _stated(
            zoneout=zoneout, recurrent_dropout=recurrent_dropout, variational_dropout=variational_dropout, clip=clip
        )


class LSTM(_Recurrent):
    """Drop-in for `torch.nn.LSTM`, projections included. See `pyseqnet.functional.lstm`.

    Args:
        peephole: ``"diagonal"``: parameters ``weight_ch_l0`` ``(3H)`` for i, f, o; ``"full"``: ``(4H, H)``.
        layer_norm: parameters ``gain_ih_l0``, ``gain_hh_l0`` ``(4H)``, ``gain_c_l0``, ``bias_c_l0`` ``(H)``.
        zoneout, recurrent_dropout, variational_dropout, cell_clip: as of the function; dropped only in training.
        forget_bias: what the two biases of every forget gate begin with in sum (Jozefowicz et al., 2015, found 1
            best); None: as torch.

    The other arguments are torch's, and without these options so are the parameters and their names.
    """

    _forget_bias: float | None = None  # a layer converted from torch's has none
    _twin = _TorchLSTM
    get_expected_cell_size = _TorchLSTM.get_expected_cell_size
    check_forward_args = _TorchLSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = _TorchLSTM.permute_hidden  # type: ignore[assignment]

    def __init__(
        self,
        *args: Any,
        peephole: str | None = None,
        layer_norm: bool = False,
        zoneout: Rate = 0.0,
        recurrent_dropout: float = 0.0,
        variational_dropout: Rate = 0.0,
        cell_clip: float | None = None,
        forget_bias: float | None = None,
        **kwargs: Any,
    ) -> None:
        mode = lstm_mode(peephole, layer_norm)
        options = layer_options(cell_clip, zoneout, recurrent_dropout, variational_dropout, has_cell=True)
        self._forget_bias = None  # torch's constructor resets the parameters
        super().__init__("LSTM", *args, **kwargs)
        if forget_bias is not None and not self.bias:
            raise ValueError("forget_bias: expected None where bias is False")
        self._options, self._forget_bias = options, forget_bias
        self._stated = _stated(
            peephole=peephole, layer_norm=layer_norm, zoneout=zoneout, recurrent_dropout=recurrent_dropout,
            variational_dropout=variational_dropout, cell_clip=cell_clip, forget_bias=forget_bias,
        )  # fmt: skip
        if mode != "LSTM":
            own = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
            factory = {"device": self.weight_ih_l0.device, "dtype": self.weight_ih_l0.dtype}
            self._add_weights(mode, _NAMES, own, **factory)
        elif forget_bias is not None:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        _reset(self, self.hidden_size)
        if self._forget_bias is not None:
            _open_forget_gates(self, self.hidden_size, self._forget_bias)


class GRU(_Recurrent):
    """Drop-in for `torch.nn.GRU`. See `pyseqnet.functional.gru`.

    Keywords beyond torch's: zoneout, recurrent_dropout, variational_dropout.
    """

    _twin = _TorchGRU

    def __init__(
        self,
        *args: Any,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        variational_dropout: Rate = 0.0,
        **kwargs: Any,
    ) -> None:
        if "proj_size" in kwargs:
            raise ValueError(_PROJECTION_REFUSED)
        options = layer_options(None, zoneout, recurrent_dropout, variational_dropout)
        super().__init__("GRU", *args, **kwargs)
        self._options = options
        self._stated = _stated(
            zoneout=zoneout, recurrent_dropout=recurrent_dropout, variational_dropout=variational_dropout
        )


class JordanRNN(_Recurrent):
    """Jordan's recurrent network, which feeds back its output. See `pyseqnet.functional.jordan`.

    Args:
        input_size, hidden_size, output_size: I, H and P.
        nonlinearity: of the hidden units, ``"tanh"`` or ``"relu"``.
        output_nonlinearity: of the output units, ``"identity"``, ``"tanh"``, ``"relu"`` or ``"sigmoid"``.
        decay: of the state unit, ``s = decay * s' + y``; 0: the output itself is fed back.
        num_layers, bias, batch_first, dropout, bidirectional: as of `torch.nn.RNN`.
        zoneout, recurrent_dropout, variational_dropout, clip: as of the function.

    Parameters: ``weight_ih_l0`` ``(H, I)``, ``weight_hh_l0`` ``(H, P)``, ``bias_ih_l0``, ``bias_hh_l0`` ``(H)``,
    ``weight_ho_l0`` ``(P, H)``, ``bias_ho_l0`` ``(P)``, and so on for other layers and ``_reverse``.

    Shapes: input as of `torch.nn.RNN`; hx ``(layers * directions, B, P)``; returns the outputs, with
    ``directions * P`` features, and the last states s.
    """

    _twin = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        output_nonlinearity: str = "identity",
        decay: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        variational_dropout: Rate = 0.0,
        clip: float | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        torch.nn.Module.__init__(self)  # torch's base knows no output layer
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        for name, size in {"input_size": input_size, "hidden_size": hidden_size, "output_size": output_size}.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected a positive integer, got {size!r}")
        if num_layers < 1:
            raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
        self._options = layer_options(clip, zoneout, recurrent_dropout, variational_dropout, output_nonlinearity, decay)
        self.mode = f"JORDAN_{nonlinearity.upper()}"
        self.input_size, self.hidden_size, self.proj_size = input_size, hidden_size, output_size
        self.num_layers, self.bias, self.batch_first = num_layers, bias, batch_first
        self.dropout, self.bidirectional = float(dropout), bidirectional
        self.nonlinearity, self.output_nonlinearity, self.decay = nonlinearity, output_nonlinearity, decay
        self._stated = _stated(
            zoneout=zoneout, recurrent_dropout=recurrent_dropout, variational_dropout=variational_dropout, clip=clip
        )
        self._add_weights(self.mode, _JORDAN_NAMES, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        _reset(self, self.hidden_size)

    def extra_repr(self) -> str:
        words = [f"{self.input_size}, {self.hidden_size}, {self.proj_size}"]
        defaults = {
            "num_layers": 1, "nonlinearity": "tanh", "output_nonlinearity": "identity", "decay": 0.0, "bias": True,
            "batch_first": False, "dropout": 0.0, "bidirectional": False,
        }  # fmt: skip
        own = {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        return ", ".join([*words, *(f"{name}={value!r}" for name, value in {**own, **self._stated}.items())])


class _Cell(_TorchRNNCellBase):
    _twin: Any
    _mode: str

    def forward(self, input: Tensor, hx: Any = None) -> Any:
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
    """Drop-in for `torch.nn.RNNCell`: one step of Elman's network. See `pyseqnet.functional.rnn_cell`."""

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
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

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
    _options: Options = NO_OPTIONS
    _stated: dict[str, Any] = {}  # noqa: RUF012 - never changed
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
        self._stated = _stated(
            proj_size=proj_size, peephole=peephole, layer_norm=layer_norm, zoneout=zoneout, cell_clip=cell_clip,
            forget_bias=forget_bias,
        )  # fmt: skip
        self._is_plain = mode == "LSTM" and not proj_size and self._options is NO_OPTIONS
        shapes = weight_shapes(mode, input_size, hidden_size, proj_size or hidden_size, bias)
        self._names = [_NAMES[name] for name in shapes]
        if not self._is_plain:
            for name, shape in zip(self._names, shapes.values(), strict=True):
                setattr(self, name, torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        if not self._is_plain or forget_bias is not None:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        _reset(self, self.hidden_size)
        if self._forget_bias is not None:
            _open_forget_gates(self, self.hidden_size, self._forget_bias)

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *(f"{name}={value!r}" for name, value in self._stated.items())])

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
        self._names = [_JORDAN_NAMES[name] for name in shapes]
        for name, shape in zip(self._names, shapes.values(), strict=True):
            setattr(self, name, torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _reset(self, self.hidden_size)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, {self.output_size}"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        params = [getattr(self, name) for name in self._names]
        result: tuple[Tensor, Tensor] = one_step(self._mode, input, hx, params, self._options, self.training)
        return result


class GRUCell(_Cell):
    """Drop-in for `torch.nn.GRUCell`: one step. See `pyseqnet.functional.gru_cell`."""

    _twin = _TorchGRUCell
    _mode = "GRU"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)
