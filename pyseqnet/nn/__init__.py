"""Layers with torch.nn's constructors, parameters and results, computed by pyseqnet's kernels."""

from pyseqnet.nn.conv import Conv1d, Conv2d
from pyseqnet.nn.pool import MaxPool1d, MaxPool2d
from pyseqnet.nn.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Conv1d",
    "Conv2d",
    "GRUCell",
    "LSTMCell",
    "MaxPool1d",
    "MaxPool2d",
    "RNNCell",
]
