"""Recurrent layers: torch's parameters, helper methods and errors, computed by our kernels. Cells: recurrent_cell.py.

The layers derive from `torch.nn.RNNBase`, not from `torch.nn.LSTM`: torch.compile refuses subclasses of that in a
full graph. What `torch.nn.LSTM` adds to its base is bound here by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Bound at import: replacing torch.nn.LSTM by ours later cannot make a class its own base, or call itself.
from torch.nn import GRU as _TorchGRU
from torch.nn import LSTM as _TorchLSTM
from torch.nn import RNN as _TorchRNN
from torch.nn import RNNBase as _TorchRNNBase
from torch.nn.utils.rnn import PackedSequence

from pyseqnet.functional._recurrent_options import Rate, layer_options, lstm_mode
from pyseqnet.functional._recurrent_reference import weight_shapes
from pyseqnet.functional._recurrent_refusals import REFUSALS, explain
from pyseqnet.functional._recurrent_stack import NO_OPTIONS, Options, run_layers
from pyseqnet.nn._recurrent_parameters import JORDAN_NAMES, NAMES, open_forget_gates, reset, stated

_PROJECTION_REFUSED = "proj_size argument is only supported for LSTM, not RNN or GRU"


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
        self._stated = stated(
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
        self._stated = stated(
            peephole=peephole, layer_norm=layer_norm, zoneout=zoneout, recurrent_dropout=recurrent_dropout,
            variational_dropout=variational_dropout, cell_clip=cell_clip, forget_bias=forget_bias,
        )  # fmt: skip
        if mode != "LSTM":
            own = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
            factory = {"device": self.weight_ih_l0.device, "dtype": self.weight_ih_l0.dtype}
            self._add_weights(mode, NAMES, own, **factory)
        elif forget_bias is not None:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        reset(self, self.hidden_size)
        if self._forget_bias is not None:
            open_forget_gates(self, self.hidden_size, self._forget_bias)


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
        self._stated = stated(
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
        self._stated = stated(
            zoneout=zoneout, recurrent_dropout=recurrent_dropout, variational_dropout=variational_dropout, clip=clip
        )
        self._add_weights(self.mode, JORDAN_NAMES, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        reset(self, self.hidden_size)

    def extra_repr(self) -> str:
        words = [f"{self.input_size}, {self.hidden_size}, {self.proj_size}"]
        defaults = {
            "num_layers": 1, "nonlinearity": "tanh", "output_nonlinearity": "identity", "decay": 0.0, "bias": True,
            "batch_first": False, "dropout": 0.0, "bidirectional": False,
        }  # fmt: skip
        own = {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        return ", ".join([*words, *(f"{name}={value!r}" for name, value in {**own, **self._stated}.items())])
