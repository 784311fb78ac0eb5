"""Every public function and layer once, with inputs: what tests of torch's features go through."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from support import normal
from torch import Tensor

import pyseqnet.functional as F
from pyseqnet import nn
from pyseqnet.masks import Causal, Local

T, B, I, H, L, D = 6, 3, 5, 4, 9, 8  # noqa: E741 - the house's letter


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        return [tensor for part in result.values() for tensor in flat(part)]
    return [tensor for part in result for tensor in flat(part)] if isinstance(result, (tuple, list)) else []


def floating(result: Any) -> list[Tensor]:
    return [tensor for tensor in flat(result) if tensor.is_floating_point()]


@dataclass(frozen=True)
class Function:
    """`call(function, *tensors)`, where `function` is ours or its reference in plain torch."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    call: Callable[..., Any] = lambda f, *tensors: f(*tensors)
    differentiable: bool = True
    scale: float = 1.0

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
        return [self.scale * normal(shape, seed + k, dtype) for k, shape in enumerate(self.shapes)]

    def run(self, *tensors: Tensor) -> list[Tensor]:
        return flat(self.call(getattr(F, self.name), *tensors))

    def reference(self, *tensors: Tensor) -> list[Tensor]:
        return flat(self.call(getattr(F, f"{self.name}_reference"), *tensors))


IMAGE, FILTERS = (2, 4, 9, 10), ((6, 4, 3, 3), (6,))
LINE, TAPS = (2, 4, 21), ((6, 4, 3), (6,))
ATTENDED = ((2, 2, L, D),) * 3
TAGS = torch.tensor([[0, 2, 1, 1, 3, 0], [3, 3, 0, 1, 2, 2], [1, 0, 2, 2, 0, 3]])
CHAIN = ((B, T, 4), (4,), (4,), (4, 4))
KEPT = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]).bool()


def _weights(gates: int, *more: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return ((T, B, I), (gates * H, I), (gates * H, H), (gates * H,), (gates * H,), *more)


def _cell(gates: int, states: int = 1) -> tuple[tuple[int, ...], ...]:
    return ((B, I), *((B, H),) * states, (gates * H, I), (gates * H, H), (gates * H,), (gates * H,))


def _layer(f: Callable[..., Any], x: Tensor, *params: Tensor) -> Any:
    return f(x, None, list(params), lengths=[6, 2, 4])


FUNCTIONS = [
    Function("conv1d", (LINE, *TAPS), lambda f, x, w, b: f(x, w, b, stride=2, padding=1)),
    Function("conv2d", (IMAGE, *FILTERS), lambda f, x, w, b: f(x, w, b, padding="same")),
    Function("conv1d_relu", (LINE, *TAPS), lambda f, x, w, b: f(x, w, b, padding=1)),
    Function("conv2d_relu", (IMAGE, *FILTERS), lambda f, x, w, b: f(x, w, b, padding=1)),
    Function("conv2d_relu_max_pool2d", (IMAGE, *FILTERS), lambda f, x, w, b: f(x, w, b, padding=1)),
    Function("locally_connected2d", ((2, 3, 6, 5), (4, 3, 4, 3, 3, 3), (4, 4, 3))),
    Function("max_pool1d", (LINE,), lambda f, x: f(x, 3, 2, 1)),
    Function("max_pool2d", (IMAGE,), lambda f, x: f(x, 3, 2, 1, return_indices=True)),
    Function("rnn", _weights(1), _layer),
    Function("gru", _weights(3), _layer),
    Function("lstm", _weights(4), _layer),
    Function("jordan", ((T, B, I), (H, I), (H, 3), (H,), (H,), (3, H), (3,)), _layer),
    Function("rnn_cell", _cell(1)),
    Function("gru_cell", _cell(3)),
    Function("lstm_cell", _cell(4, 2), lambda f, x, h, c, *params: f(x, (h, c), *params)),
    Function("jordan_cell", ((B, I), (B, 3), (H, I), (H, 3), (3, H), (H,), (H,), (3,))),
    Function(
        "scaled_dot_product_attention", ATTENDED,
        lambda f, q, k, v: f(
            q, k, v, pattern=Causal() & Local(4), key_lengths=torch.tensor([L, 5], device=q.device), return_lse=True
        ),
    ),
    Function(
        "additive_attention", ((2, L, D), (2, 7, D), (2, 7, 6), (D,)),
        lambda f, q, k, v, w: f(
            q, k, v, w, key_lengths=torch.tensor([7, 3], device=q.device), return_weights=True
        ),
    ),
    Function(
        "linear_attention", ATTENDED, lambda f, q, k, v: f(q, k, v, causal=True, return_state=True),
    ),
    Function("linear_attention_step", ((2, 2, D), (2, 2, D), (2, 2, D), (2, 2, D, D), (2, 2, D)),
        lambda f, q, k, v, s, n: f(q, k, v, (s.abs(), n.abs() + 1)),
    ),
    Function(
        "ctc_loss", ((T, B, 4),),
        lambda f, x: f(x, TAGS[:, :2].to(x.device) % 3 + 1, (6, 5, 6), (2, 1, 2), from_logits=True),
    ),
    Function(
        "crf_log_likelihood", CHAIN, lambda f, x, *p: f(x, TAGS.to(x.device), KEPT.to(x.device), *p),
    ),
    Function("crf_log_partition", CHAIN, lambda f, x, *p: f(x, KEPT.to(x.device), *p)),
    Function("crf_marginals", CHAIN, lambda f, x, *p: f(x, KEPT.to(x.device), *p)),
    Function(
        "crf_decode", CHAIN, lambda f, x, *p: torch.cat([torch.tensor(path) for path in f(x, KEPT, *p)]),
        differentiable=False,
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A constructor's arguments, and shapes of what the layer is called with."""

    name: str
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = ((T, B, D),)
    call: Callable[..., Any] = lambda layer, *tensors: layer(*tensors)

    def build(self) -> torch.nn.Module:
        torch.manual_seed(0)
        return getattr(nn, self.name)(*copy.deepcopy(self.args), **self.options).eval()

    def twin(self) -> torch.nn.Module | None:
        """torch's, with the same parameters; None where torch has none."""
        if not hasattr(torch.nn, self.name) or self.name == "Sequential":
            return None
        args = self.args
        if self.name in ("TransformerEncoder", "TransformerDecoder"):
            args = (getattr(torch.nn, f"{self.name}Layer")(D, 2, 16, 0.0), *args[1:])
        twin = getattr(torch.nn, self.name)(*args, **self.options).eval()
        twin.load_state_dict(self.build().state_dict())
        return twin

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
        return [normal(shape, seed + k, dtype) for k, shape in enumerate(self.shapes)]

    def run(self, layer: torch.nn.Module, *tensors: Tensor) -> list[Tensor]:
        return flat(self.call(layer, *tensors))


SEQUENCE, THREE, TWO = ((T, B, D),), ((T, B, D),) * 3, ((T, B, D),) * 2
PROJECTION = normal((6, D), 5, torch.float32)
EDGES = torch.tensor([[0, 1, 2, 3, 1], [1, 2, 3, 0, 3]])


def _mixer(name: str, **options: Any) -> Layer:
    return Layer(name, (D, 2), options, ((T, B, D),), lambda layer, x: layer(x, x, x)[0])


_MIXERS = [
    _mixer("LocalAttention", window=2),
    _mixer("BigBirdAttention", window=1, global_tokens=1, random_blocks=1, block=2),
    _mixer("MixedHeadAttention", patterns=[Local(1), Causal()]),
    _mixer("TopKAttention", k=3),
    _mixer("ClusteredAttention", clusters=2),
    _mixer("ReformerAttention", bucket_size=2, n_hashes=2),
    _mixer("RoutingAttention", clusters=2),
    _mixer("SinkhornAttention", block_size=2),
    _mixer("MemoryCompressedAttention"),
    _mixer("LinformerAttention", seq_len=T, k=3),
    _mixer("EfficientAttention"),
    _mixer("RandomFeatureAttention", num_features=8),
    _mixer("PerformerAttention", num_features=8),
    _mixer("SynthesizerAttention", seq_len=T),
    _mixer("FNetMixing"),
    _mixer("GatedMLPMixing", seq_len=T),
    _mixer("MLPMixing", seq_len=T),
]


LAYERS = [
    Layer("Conv1d", (4, 6, 3), {"padding": 1}, (LINE,)),
    Layer("Conv2d", (4, 6, 3), {"stride": 2}, (IMAGE,)),
    Layer("Conv1dReLU", (4, 6, 3), {}, (LINE,)),
    Layer("Conv2dReLU", (4, 6, 3), {}, (IMAGE,)),
    Layer("Conv2dReLUMaxPool2d", (4, 6, 3), {"padding": 1}, (IMAGE,)),
    Layer("LocallyConnected2d", (4, 3, 3, (9, 10)), {}, (IMAGE,)),
    Layer("MaxPool1d", (3,), {}, (LINE,)),
    Layer("MaxPool2d", (3, 2, 1), {}, (IMAGE,)),
    Layer("Sequential", (nn.Conv2d(4, 6, 3), torch.nn.ReLU(), nn.MaxPool2d(2)), {}, (IMAGE,)),
    Layer("RNN", (D, H), {"bidirectional": True}),
    Layer("LSTM", (D, H, 2), {"proj_size": 3}),
    Layer("GRU", (D, H), {"batch_first": True}),
    Layer("JordanRNN", (D, H, 3)),
    Layer("RNNCell", (D, H), {}, ((B, D),)),
    Layer("LSTMCell", (D, H), {}, ((B, D),)),
    Layer("GRUCell", (D, H), {}, ((B, D),)),
    Layer("JordanRNNCell", (D, H, 3), {}, ((B, D),)),
    Layer("MultiheadAttention", (D, 2), {}, THREE),
    Layer("AdditiveAttention", (D, D, H), {}, THREE[:2]),
    Layer("LocationAwareAttention", (D, D, H), {}, THREE[:2]),
    Layer("LinearAttention", (D, 2), {"causal": True}, THREE),
    Layer("LinearMultiheadAttention", (D, 2), {}, THREE),
    Layer("PositiveRandomFeatures", (PROJECTION,), {}, ((2, 2, L, D),)),
    Layer("RandomFourierFeatures", (PROJECTION,), {}, ((2, 2, L, D),)),
    Layer("TruncatedSelfAttention", (D, 2), {"left": 2, "right": 1}, SEQUENCE, lambda layer, x: layer(x, x, x)),
    Layer(
        "LongformerSelfAttention", (D, 2), {"window": 2}, SEQUENCE,
        lambda layer, x: layer(x, x, x, need_weights=False),
    ),
    Layer("GraphAttention", (D, H, 2), {}, ((4, D),), lambda layer, x: layer(x, EDGES.to(x.device))),
    Layer("ImageSelfAttention", (4, 2), {}, ((2, 4, 3, 5),)),
    Layer("SelfAttention2d", (8, False), {}, ((2, 8, 3, 5),)),
    Layer("TransformerEncoderLayer", (D, 2, 16, 0.0)),
    Layer("TransformerDecoderLayer", (D, 2, 16, 0.0), {}, TWO),
    Layer("TransformerEncoder", (nn.TransformerEncoderLayer(D, 2, 16, 0.0), 2)),
    Layer("TransformerDecoder", (nn.TransformerDecoderLayer(D, 2, 16, 0.0), 2), {}, TWO),
    Layer("Transformer", (D, 2, 1, 1, 16, 0.0), {}, TWO),
    Layer("SinusoidalPositions", (D,)),
    Layer("LearnedPositions", (20, D)),
    Layer("LayerNorm", (D,)),
    Layer("PowerNorm", (D,)),
    Layer(
        "CTCLoss", (), {}, ((T, B, 4),),
        lambda layer, x: layer(x.log_softmax(-1), TAGS[:, :2].to(x.device) % 3 + 1, (6, 5, 6), (2, 1, 2)),
    ),
    Layer("CRF", (4,), {}, ((T, B, 4),), lambda layer, x: layer(x, TAGS.T.to(x.device), KEPT.T.to(x.device))),
    Layer("HMM", (4,), {}, ((B, T, 4),), lambda layer, x: layer(x, KEPT.to(x.device))),
    *_MIXERS,
    Layer("MonotonicAttention", (2,), {"noise": 0.0}, ((B, 5, T), (B, T, 3)), lambda layer, *x: layer(*x)),
]  # fmt: skip

# Not layers: states and caches of decoding, helpers.
HELD = {
    "DecodingState", "KeyValueCache", "LayerState", "LocationState", "MemoryCache", "PreallocatedCache",
    "RecurrentCache", "random_projection",
}  # fmt: skip

# Beginnings of modules whose layers are made of those above and have tests of their own, but no entry here yet.
ELSEWHERE = ("pyseqnet.nn.pointer",)
