"""Recurrent layers and cells: torch's parameters, helper methods and errors, computed by our kernels.

The layers derive from `torch.nn.RNNBase`, not from `torch.nn.LSTM`: torch.compile refuses subclasses of that in a
full graph. What `torch.nn.LSTM` adds to its base is bound here by name.
"""

from __future__ import annotations

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

from pyseqnet.functional._recurrent_refusals import REFUSALS, explain, explain_cell
from pyseqnet.functional._recurrent_stack import run_cell, run_layers

_PROJECTION_REFUSED = "proj_size argument is only supported for LSTM, not RNN or GRU"


class _Recurrent(_TorchRNNBase):
    """What RNN, LSTM and GRU share: the call."""

    _twin: Any  # torch's layer, whose forward says what is wrong with refused arguments

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
            self.mode,
            input,
            hx,
            self._weights(),
            self.num_layers,
            self.bidirectional,
            self.dropout,
            self.training,
            self.batch_first,
            lengths,
        )
        if torch.compiler.is_compiling():
            return run_layers(*arguments)
        try:
            return run_layers(*arguments)
        except REFUSALS as error:
            explain(error, *arguments, torch_call=lambda: self._twin.forward(self, input, hx))


class RNN(_Recurrent):
    """Drop-in for `torch.nn.RNN`: Elman's network, tanh or relu. See `pyseqnet.functional.rnn`."""

    _twin = _TorchRNN

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError(_PROJECTION_REFUSED)
        if len(args) > 3:  # torch's fourth positional argument is the nonlinearity, not its base's bias
            self.nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)


class LSTM(_Recurrent):
    """Drop-in for `torch.nn.LSTM`, projections included. See `pyseqnet.functional.lstm`."""

    _twin = _TorchLSTM
    get_expected_cell_size = _TorchLSTM.get_expected_cell_size
    check_forward_args = _TorchLSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = _TorchLSTM.permute_hidden  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)


class GRU(_Recurrent):
    """Drop-in for `torch.nn.GRU`. See `pyseqnet.functional.gru`."""

    _twin = _TorchGRU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError(_PROJECTION_REFUSED)
        super().__init__("GRU", *args, **kwargs)


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
    """Drop-in for `torch.nn.LSTMCell`: one step. See `pyseqnet.functional.lstm_cell`."""

    _twin = _TorchLSTMCell
    _mode = "LSTM"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)


class GRUCell(_Cell):
    """Drop-in for `torch.nn.GRUCell`: one step. See `pyseqnet.functional.gru_cell`."""

    _twin = _TorchGRUCell
    _mode = "GRU"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)
