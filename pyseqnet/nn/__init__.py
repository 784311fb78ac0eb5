"""Layers with torch.nn's constructors, parameters and results, computed by pyseqnet's kernels."""

from pyseqnet.nn.attention import MultiheadAttention
from pyseqnet.nn.conv import Conv1d, Conv1dReLU, Conv2d, Conv2dReLU, Conv2dReLUMaxPool2d
from pyseqnet.nn.linear_attention import LinearAttention
from pyseqnet.nn.norm import LayerNorm
from pyseqnet.nn.pool import MaxPool1d, MaxPool2d
from pyseqnet.nn.position import LearnedPositions, SinusoidalPositions
from pyseqnet.nn.recurrent import GRU, LSTM, RNN, GRUCell, JordanRNN, JordanRNNCell, LSTMCell, RNNCell
from pyseqnet.nn.sequential import Sequential
from pyseqnet.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Conv1d",
    "Conv1dReLU",
    "Conv2d",
    "Conv2dReLU",
    "Conv2dReLUMaxPool2d",
    "GRUCell",
    "JordanRNN",
    "JordanRNNCell",
    "LSTMCell",
    "LayerNorm",
    "LearnedPositions",
    "LinearAttention",
    "MaxPool1d",
    "MaxPool2d",
    "MultiheadAttention",
    "RNNCell",
    "Sequential",
    "SinusoidalPositions",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
