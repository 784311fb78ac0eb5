"""Layers with torch.nn's constructors, parameters and results, computed by pyseqnet's kernels."""

from pyseqnet.nn.additive import AdditiveAttention, LocationAwareAttention, LocationState
from pyseqnet.nn.attention import MultiheadAttention
from pyseqnet.nn.cache import (
    DecodingState,
    KeyValueCache,
    LayerState,
    MemoryCache,
    PreallocatedCache,
    RecurrentCache,
)
from pyseqnet.nn.chain import CRF, HMM, CTCLoss
from pyseqnet.nn.conv import Conv1d, Conv1dReLU, Conv2d, Conv2dReLU, Conv2dReLUMaxPool2d
from pyseqnet.nn.efficient import (
    BigBirdAttention,
    ClusteredAttention,
    EfficientAttention,
    FNetMixing,
    GatedMLPMixing,
    LinformerAttention,
    LocalAttention,
    MemoryCompressedAttention,
    MixedHeadAttention,
    MLPMixing,
    PerformerAttention,
    RandomFeatureAttention,
    ReformerAttention,
    RoutingAttention,
    SinkhornAttention,
    SynthesizerAttention,
    TopKAttention,
)
from pyseqnet.nn.graph_attention import GraphAttention
from pyseqnet.nn.image_attention import ImageSelfAttention, SelfAttention2d
from pyseqnet.nn.linear_attention import LinearAttention, LinearMultiheadAttention
from pyseqnet.nn.local_attention import LongformerSelfAttention, TruncatedSelfAttention
from pyseqnet.nn.locally_connected import LocallyConnected2d
from pyseqnet.nn.monotonic import MonotonicAttention
from pyseqnet.nn.norm import LayerNorm
from pyseqnet.nn.pointer import PointerGenerator, pointer_log_probs, pointer_loss
from pyseqnet.nn.pool import MaxPool1d, MaxPool2d
from pyseqnet.nn.position import LearnedPositions, SinusoidalPositions
from pyseqnet.nn.power_norm import PowerNorm
from pyseqnet.nn.random_features import PositiveRandomFeatures, RandomFourierFeatures, random_projection
from pyseqnet.nn.recurrent import GRU, LSTM, RNN, JordanRNN
from pyseqnet.nn.recurrent_cell import GRUCell, JordanRNNCell, LSTMCell, RNNCell
from pyseqnet.nn.sequential import Sequential
from pyseqnet.nn.transformer import Transformer, TransformerDecoder, TransformerEncoder
from pyseqnet.nn.transformer_layers import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "CRF",
    "GRU",
    "HMM",
    "LSTM",
    "RNN",
    "AdditiveAttention",
    "BigBirdAttention",
    "CTCLoss",
    "ClusteredAttention",
    "Conv1d",
    "Conv1dReLU",
    "Conv2d",
    "Conv2dReLU",
    "Conv2dReLUMaxPool2d",
    "DecodingState",
    "EfficientAttention",
    "FNetMixing",
    "GRUCell",
    "GatedMLPMixing",
    "GraphAttention",
    "ImageSelfAttention",
    "JordanRNN",
    "JordanRNNCell",
    "KeyValueCache",
    "LSTMCell",
    "LayerNorm",
    "LayerState",
    "LearnedPositions",
    "LinearAttention",
    "LinearMultiheadAttention",
    "LinformerAttention",
    "LocalAttention",
    "LocallyConnected2d",
    "LocationAwareAttention",
    "LocationState",
    "LongformerSelfAttention",
    "MLPMixing",
    "MaxPool1d",
    "MaxPool2d",
    "MemoryCache",
    "MemoryCompressedAttention",
    "MixedHeadAttention",
    "MonotonicAttention",
    "MultiheadAttention",
    "PerformerAttention",
    "PointerGenerator",
    "PositiveRandomFeatures",
    "PowerNorm",
    "PreallocatedCache",
    "RNNCell",
    "RandomFeatureAttention",
    "RandomFourierFeatures",
    "RecurrentCache",
    "ReformerAttention",
    "RoutingAttention",
    "SelfAttention2d",
    "Sequential",
    "SinkhornAttention",
    "SinusoidalPositions",
    "SynthesizerAttention",
    "TopKAttention",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "TruncatedSelfAttention",
    "pointer_log_probs",
    "pointer_loss",
    "random_projection",
]
