"""Random problems for every public function: what `make fuzz` draws. tests/fuzz.py runs them.

A problem is drawn as plain numbers, so that hypothesis can shrink it and print it, and built by `build`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from support import view_as
from torch import Tensor

import pyseqnet.functional as F
from pyseqnet import masks
from pyseqnet.functional._linear_attention_call import KERNEL_MAPS
from pyseqnet.functional._linear_attention_reference import _features

MAPS = ("elu", "relu", "exp", "identity", "softmax")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VIEWS = ("contiguous", "contiguous", "channels_last", "narrowed", "transposed", "offset", "step", "expanded")


@dataclass(frozen=True)
class Problem:
    function: str
    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any]  # plain values; `build` turns them into arguments
    dtype: torch.dtype
    views: tuple[str, ...]
    seed: int
    kernel: str  # "operation:kernel" or nothing
    threads: int
    call: Callable[..., Any] = field(repr=False)
    integers: bool = False  # small integers: sums are exact, so that ReLUs and maxima fall alike

    def tensors(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        most = 1 if torch.finfo(self.dtype).bits == 16 else 2  # bfloat16 holds integers up to 256
        found = []
        for shape, view in zip(self.shapes, self.views, strict=True):
            if self.integers:
                values = torch.randint(-most, most + 1, shape, generator=generator).to(self.dtype)
            else:
                values = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)
            found.append(view_as(values, "contiguous" if view == "transposed" and len(shape) < 2 else view))
        return found


def small(most: int, least: int = 1) -> st.SearchStrategy[int]:
    """Mostly few, now and then as many as a vector or a block of them holds."""
    edges = [n for n in (7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65) if least <= n <= most]
    plain = st.integers(least, max(least, min(most, 6)))
    return st.one_of(plain, st.sampled_from(edges)) if edges else plain


@st.composite
def convolution(draw: Any, name: str) -> tuple:
    dims = 1 if "1d" in name else 2
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    depthwise = draw(st.integers(0, 5)) == 0
    c = 1 if depthwise else draw(small(33))
    k = draw(st.integers(1, 2)) if depthwise else draw(small(33))
    groups = draw(small(17)) if depthwise else groups
    kernel = [draw(st.integers(1, 5 if dims == 2 else 9)) for _ in range(dims)]
    dilation = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in range(dims)]
    same = draw(st.integers(0, 4)) == 0
    stride = [1 if same else draw(st.sampled_from([1, 1, 2, 3])) for _ in range(dims)]
    padding: Any = "same" if same else [draw(st.integers(0, 3)) for _ in range(dims)]
    sizes = []
    pool = draw(st.integers(1, 3)) if "pool" in name else 1
    for n in range(dims):
        reach = dilation[n] * (kernel[n] - 1) + 1
        need = max(reach - (0 if same else 2 * padding[n]), 1) + (pool - 1) * stride[n]
        if same:
            need = pool
        sizes.append(need + draw(small(20, 0)))
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if "pool" in name:
        options |= {"pool_size": pool, "pool_stride": draw(st.sampled_from([None, 1, 2]))}
    shapes: list[tuple[int, ...]] = [(draw(st.integers(0, 3)), c * groups, *sizes), (k * groups, c, *kernel)]
    bias = draw(st.booleans())
    if bias:
        shapes.append((k * groups,))

    def call(f: Any, x: Tensor, w: Tensor, b: Tensor | None = None) -> Any:
        return f(x, w, b, **options)

    return shapes, options, call


@st.composite
def pooling(draw: Any, name: str) -> tuple:
    dims = 1 if "1d" in name else 2
    kernel = [draw(small(17)) for _ in range(dims)]
    stride = draw(st.sampled_from([None, 1, 2, 3]))
    padding = [draw(st.integers(0, k // 2)) for k in kernel]
    dilation = [draw(st.sampled_from([1, 1, 2])) for _ in range(dims)]
    sizes = [max(d * (k - 1) + 1 - 2 * p, 1) + draw(small(40, 0))
             for k, p, d in zip(kernel, padding, dilation, strict=True)]  # fmt: skip
    options = {
        "kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation,
        "ceil_mode": draw(st.booleans()), "return_indices": draw(st.booleans()),
    }  # fmt: skip
    shapes = [(draw(st.integers(0, 3)), draw(small(33)), *sizes)]
    return shapes, options, lambda f, x: f(x, **options)


def cell_options(draw: Any, name: str) -> dict[str, Any]:
    """What the cell `name` takes beside its weights; nothing half of the time."""
    if draw(st.booleans()):
        return {}
    options: dict[str, Any] = {"zoneout": draw(st.sampled_from([0.0, 0.0, 0.3]))}
    if name in ("rnn", "jordan"):
        options |= {"nonlinearity": draw(st.sampled_from(["tanh", "relu"])), "clip": draw(st.sampled_from([None, 0.7]))}
    if name == "jordan":
        outputs = st.sampled_from(["identity", "sigmoid", "tanh", "relu"])
        options |= {"output_nonlinearity": draw(outputs), "decay": draw(st.sampled_from([0.0, 0.5]))}
    if name == "lstm":
        options["cell_clip"] = draw(st.sampled_from([None, 0.7]))
    return options


def has_kinks(options: dict[str, Any]) -> bool:
    """Rounding in 16 bits decides on which side of a kink a value falls, and so what gradient it has."""
    relu = "relu" in (options.get("nonlinearity"), options.get("output_nonlinearity"))
    return relu or bool(options.get("clip") or options.get("cell_clip"))


def layer_shapes(gates: int, h: int, outer: int, width: int, biases: bool, kind: str) -> Iterator[tuple[int, ...]]:
    """The parameters of one layer in one direction, in the order of `params`."""
    yield from ((gates * h, width), (gates * h, outer))
    if biases:
        yield from ((gates * h,), (gates * h,))
    if kind == "jordan":
        yield from ((outer, h), *([(outer,)] * biases))
    elif kind == "projection":
        yield (outer, h)
    elif kind == "layer_norm":
        yield from ((gates * h,), (gates * h,), (h,), (h,))
    elif kind in ("diagonal", "full"):
        yield (3 * h,) if kind == "diagonal" else (gates * h, h)


@st.composite
def recurrent(draw: Any, name: str) -> tuple:
    gates = {"rnn": 1, "gru": 3, "lstm": 4, "jordan": 1}[name]
    t, b, i, h = draw(small(9)), draw(small(9)), draw(small(33)), draw(small(33))
    layers, directions = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    first, biases = draw(st.booleans()), draw(st.booleans())
    kinds = {"lstm": ["", "", "diagonal", "full", "layer_norm", *["projection"] * (h > 1)], "jordan": ["jordan"]}
    kind = draw(st.sampled_from(kinds.get(name, [""])))
    outer = draw(small(9)) if kind == "jordan" else draw(st.integers(1, h - 1)) if kind == "projection" else h
    shapes: list[tuple[int, ...]] = [(b, t, i) if first else (t, b, i)]
    if draw(st.booleans()):
        shapes.append((layers * directions, b, outer))
        if name == "lstm":
            shapes.append((layers * directions, b, h))
    states = len(shapes) - 1
    for layer in range(layers):
        for _ in range(directions):
            shapes += layer_shapes(gates, h, outer, i if layer == 0 else outer * directions, biases, kind)
    options: dict[str, Any] = {
        "num_layers": layers, "bidirectional": directions == 2, "batch_first": first,
        "lengths": [draw(st.integers(1, t)) for _ in range(b)] if draw(st.booleans()) else None,
    }  # fmt: skip
    options |= cell_options(draw, name)
    if kind in ("diagonal", "full"):
        options["peephole"] = kind
    elif kind == "layer_norm":
        options["layer_norm"] = True
    elif kind == "projection":
        options["proj_size"] = outer

    def call(f: Any, x: Tensor, *rest: Tensor) -> Any:
        state: Any = None if not states else rest[0] if states == 1 else (rest[0], rest[1])
        return f(x, state, [p / 2 for p in rest[states:]], **options)

    return shapes, options, call


@st.composite
def cell(draw: Any, name: str) -> tuple:
    kind = name.removesuffix("_cell")
    gates = {"rnn": 1, "gru": 3, "lstm": 4, "jordan": 1}[kind]
    b, i, h = draw(small(9)), draw(small(33)), draw(small(33))
    outer = draw(small(9)) if kind == "jordan" else h
    biases = draw(st.booleans())
    shapes = [(b, i), *[(b, outer)] * (2 if kind == "lstm" else 1), (gates * h, i), (gates * h, outer)]
    shapes += [(outer, h)] * (kind == "jordan") + [(gates * h,)] * (2 * biases)
    shapes += [(outer,)] * (kind == "jordan" and biases)
    options = cell_options(draw, kind)

    def call(f: Any, x: Tensor, h0: Tensor, *rest: Tensor) -> Any:
        return f(x, (h0, rest[0]), *rest[1:], **options) if kind == "lstm" else f(x, h0, *rest, **options)

    return shapes, options, call


def boundaries(draw: Any, total: int) -> list[int]:
    """Where sequences packed into `total` positions begin and end; some may be empty."""
    inner = [draw(st.integers(0, total)) for _ in range(draw(st.integers(0, 3)))]
    return [0, *sorted(inner), total]


@st.composite
def patterns(draw: Any, alignments: tuple[str, ...] = ("top_left", "bottom_right")) -> masks.Pattern:
    kinds = st.sampled_from(["causal", "local", "strided", "global"])

    def one() -> masks.Pattern:
        kind = draw(kinds)
        align = draw(st.sampled_from(alignments))
        if kind == "causal":
            return masks.Causal(align)
        if kind == "local":
            return masks.Local(draw(st.integers(0, 70)), draw(st.integers(0, 70)), align)
        return masks.Strided(draw(st.integers(1, 9)), align=align) if kind == "strided" else masks.Global(
            draw(st.integers(0, 70)))  # fmt: skip

    found = one()
    for _ in range(draw(st.integers(0, 2))):
        found = found & one() if draw(st.booleans()) else found | one()
    return found


@st.composite
def attention(draw: Any, name: str) -> tuple:
    b, h, group = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2]))
    length, keys, d, e = draw(small(65)), draw(small(130)), draw(small(65)), draw(small(65))
    options: dict[str, Any] = {
        "is_causal": draw(st.booleans()), "enable_gqa": group > 1,
        "softcap": draw(st.sampled_from([None, None, 5.0])), "scale": draw(st.sampled_from([None, None, 0.3])),
        "key_lengths": [draw(st.integers(0, keys)) for _ in range(b)] if draw(st.booleans()) else None,
        "pattern": draw(patterns()) if draw(st.booleans()) else None,
        "return_weights": draw(st.booleans()), "return_lse": draw(st.booleans()),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.3])),
    }  # fmt: skip
    if draw(st.integers(0, 5)) == 0:  # sequences one behind the other
        b, sequences = 1, boundaries(draw, length)
        ends = [draw(st.integers(0, keys)) for _ in sequences[2:]]
        options |= {"key_lengths": None, "cu_seqlens_q": sequences, "cu_seqlens_k": [0, *sorted(ends), keys]}
        options["pattern"] = draw(patterns(("top_left",))) if draw(st.booleans()) else None
    shapes = [(b, h * group, length, d), (b, h, keys, d), (b, h, keys, e)]
    packed = "cu_seqlens_q" in options
    extra = draw(st.sampled_from(["none", "none", "bool", "float", "bias", "alibi"]))
    lead = (draw(st.sampled_from([1, b])), draw(st.sampled_from([1, h * group])), draw(st.sampled_from([1, length])))
    if packed and extra not in ("none", "alibi"):
        extra = "none"  # as large as the longest sequences: tests/attention has them
    if extra == "alibi":
        shapes.append((h * group,))
    elif extra != "none":
        shapes.append((*lead, keys))
    options["extra"] = extra

    def call(f: Any, q: Tensor, k: Tensor, v: Tensor, m: Tensor | None = None) -> Any:
        given = {key: value for key, value in options.items() if key != "extra"}
        for key in ("key_lengths", "cu_seqlens_q", "cu_seqlens_k"):
            if given.get(key) is not None:
                given[key] = torch.tensor(given[key], dtype=torch.int64 if key == "key_lengths" else torch.int32)
        if m is not None:
            name = {"alibi": "alibi_slopes", "bias": "bias"}.get(extra, "attn_mask")
            given[name] = m.detach() > -0.5 if extra == "bool" else m.detach().abs() if extra == "alibi" else m
            if extra == "bias":
                given[name] = m.masked_fill(m < -1.5, -math.inf)
        torch.manual_seed(0)  # dropout draws the same from the same generator
        return f(q, k, v, **given)

    return shapes, options, call


@st.composite
def additive(draw: Any, name: str) -> tuple:
    b, length, keys, d, e = draw(st.integers(0, 3)), *(draw(small(65)) for _ in range(4))
    lengths = [draw(st.integers(0, keys)) for _ in range(b)] if draw(st.booleans()) else None
    options = {"key_lengths": lengths, "return_weights": draw(st.booleans())}

    def call(f: Any, *tensors: Tensor) -> Any:
        ends = None if lengths is None else torch.tensor(lengths, dtype=torch.int64)
        return f(*tensors[:4], key_lengths=ends, return_weights=options["return_weights"], bias=tensors[4])

    return [(b, length, d), (b, keys, d), (b, keys, e), (d,), (d,)], options, call


def decays(draw: Any, heads: int) -> Any:
    """Between 0 and 1, for all heads or for each; none half of the time."""
    if draw(st.booleans()):
        return None
    numbers = st.sampled_from([0.0, 0.25, 0.9, 0.97, 1.0])
    return [draw(numbers) for _ in range(heads)] if draw(st.booleans()) else draw(numbers)


@st.composite
def linear(draw: Any, name: str) -> tuple:
    b, h, length, d, e = draw(st.integers(1, 3)), draw(st.integers(1, 3)), *(draw(small(65)) for _ in range(3))
    feature_map = draw(st.sampled_from(MAPS))
    causal = feature_map != "softmax" and draw(st.booleans())
    packed = draw(st.integers(0, 5)) == 0
    length = draw(small(130)) if causal else length
    keys = length if causal or packed else draw(small(130))
    starts = boundaries(draw, length) if packed else None
    b = 1 if packed else b
    # Without the sum of scores in the denominator signs cancel; with it they must not.
    normalize = False if feature_map in ("softmax", "identity") else draw(st.booleans())
    options = {
        "causal": causal, "feature_map": feature_map, "normalize": normalize, "cu_seqlens": starts,
        "decay": decays(draw, h) if causal else None,
        "return_state": feature_map != "softmax" and draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 0.5])),
        "key_lengths": [draw(st.integers(0, keys)) for _ in range(b)] if not packed and draw(st.booleans()) else None,
    }  # fmt: skip
    shapes = [(b, h, length, d), (b, h, keys, d), (b, h, keys, e)]
    if feature_map != "softmax" and draw(st.booleans()):
        sequences = b if starts is None else len(starts) - 1
        shapes += [(sequences, h, d, e), (sequences, h, d)]

    def call(f: Any, q: Tensor, k: Tensor, v: Tensor, *state: Tensor) -> Any:
        given: dict[str, Any] = dict(options)
        for key, dtype in (("key_lengths", torch.int64), ("cu_seqlens", torch.int32)):
            if given[key] is not None:
                given[key] = torch.tensor(given[key], dtype=dtype)
        if state:
            given["initial_state"] = started(q, *state)
        return f(q, k, v, **given)

    return shapes, options, call


def amplification(options: dict[str, Any], tensors: list[Tensor]) -> float:
    """How much larger than its results the terms of a gradient may be: features over the smallest sum of scores."""
    if not options["normalize"]:
        return 1.0
    q, k, v, *state = (t.double() for t in tensors)
    if q.dim() == 3:  # of one step
        q, k, v = (t.unsqueeze(2) for t in (q, k, v))
    given = {"causal": True, **options, "normalize": False, "return_state": True}
    for key, dtype in (("key_lengths", torch.int64), ("cu_seqlens", torch.int32)):
        if given.get(key) is not None:
            given[key] = torch.tensor(given[key], dtype=dtype)
    if state:
        _, z = started(q, *state)
        given["initial_state"] = z.unsqueeze(-1), z
    total, (_, z) = F.linear_attention_reference(q, k, torch.ones_like(v[..., :1]), **given)
    total = total[total > 0]  # a row without keys is zero, and so are its gradients
    if not total.numel():
        return 1.0
    scale = given.get("scale") or 1.0
    a = _features(KERNEL_MAPS[options["feature_map"]], q * scale)
    return max(1.0, float(torch.stack([a.max(), z.max()]).max() / (total.min() + 1e-6)))


def started(query: Tensor, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """A state as earlier keys could have left it, in the dtype of the sums."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return s.to(wide), z.to(wide).abs() + 1


@st.composite
def linear_step(draw: Any, name: str) -> tuple:
    b, h, d, e = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(small(65)), draw(small(65))
    feature_map = draw(st.sampled_from([m for m in MAPS if m != "softmax"]))
    options = {
        "feature_map": feature_map, "normalize": feature_map != "identity" and draw(st.booleans()),
        "decay": decays(draw, h),
    }  # fmt: skip
    shapes = [(b, h, d), (b, h, d), (b, h, e), (b, h, d, e), (b, h, d)]

    def call(f: Any, q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor) -> Any:
        return f(q, k, v, started(q, s, z), **options)

    return shapes, options, call


@st.composite
def ctc(draw: Any, name: str) -> tuple:
    t, b, c = draw(small(33)), draw(small(9)), draw(small(33, 2))
    longest = draw(st.integers(0, 9))
    ends = [draw(st.integers(1, t)) for _ in range(b)]
    sizes = [draw(st.integers(0, longest)) for _ in range(b)]
    options = {
        "input_lengths": ends, "target_lengths": sizes, "zero_infinity": draw(st.booleans()), "reduction": "none",
        "targets": draw(st.integers(0, 99)),
    }  # fmt: skip

    def call(f: Any, x: Tensor) -> Any:
        given = {key: value for key, value in options.items() if key != "targets"}
        generator = torch.Generator().manual_seed(options["targets"])
        # Of few labels, so that some come twice in a row.
        targets = torch.randint(1, min(c, 4), (b, longest), generator=generator)
        return f(x, targets, from_logits=True, **given)

    return [(t, b, c)], options, call


@st.composite
def chain(draw: Any, name: str) -> tuple:
    b, t, c = draw(small(9)), draw(small(17)), draw(small(33))
    ends = [draw(st.integers(1, t)) for _ in range(b)] if draw(st.booleans()) else None
    options = {"ends": ends, "tags": draw(st.integers(0, 99))}

    def call(f: Any, x: Tensor, *potentials: Tensor) -> Any:
        mask = None if ends is None else torch.arange(t) < torch.tensor(ends)[:, None]
        if "likelihood" not in name:
            return f(x, mask, *potentials)
        tags = torch.randint(c, (b, t), generator=torch.Generator().manual_seed(options["tags"]))
        return f(x, tags, mask, *potentials)

    return [(b, t, c), (c,), (c,), (c, c)], options, call


@st.composite
def decoding(draw: Any, name: str) -> tuple:
    shapes, options, _ = draw(chain(name))
    (_, t, _), ends = shapes[0], options["ends"]
    nbest, forbids = draw(st.sampled_from([1, 1, 2, 3, 5])), draw(st.booleans())

    def call(f: Any, x: Tensor, *potentials: Tensor) -> Any:
        mask = None if ends is None else torch.arange(t) < torch.tensor(ends)[:, None]
        if forbids:
            potentials = tuple(p.masked_fill(p == p.amax(), -math.inf) for p in potentials)
        return f(x, mask, *potentials, nbest, return_scores=True)

    return shapes, {"ends": ends, "nbest": nbest, "forbids": forbids}, call


@st.composite
def locally_connected(draw: Any, name: str) -> tuple:
    n, c, k = draw(st.integers(1, 3)), draw(small(9)), draw(small(9))
    r, s, stride, pad = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2)),
                         draw(st.integers(0, 1)))  # fmt: skip
    p, q = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    height, width = (p - 1) * stride + r - 2 * pad, (q - 1) * stride + s - 2 * pad
    height, width = max(height, 1), max(width, 1)
    p, q = (height + 2 * pad - r) // stride + 1, (width + 2 * pad - s) // stride + 1
    options = {"stride": stride, "padding": pad}
    return [(n, c, height, width), (p, q, k, c, r, s), (k, p, q)], options, lambda f, *t: f(*t, **options)


CONVOLUTION = ("conv_forward", "conv_input_gradient", "conv_weight_gradient", "conv_bias_gradient")
BLOCK = tuple(f"conv_relu_pool_{part}" for part in ("forward", "input_gradient", "weight_gradient", "bias_gradient"))
ATTENTION = tuple(f"attention_{part}" for part in ("forward", "backward", "weights", "delta", "bias_gradient"))
ADDITIVE = tuple(f"additive_attention_{part}" for part in ("forward", "backward", "weights"))

# function: its strategy, the family in the dispatch tables, whether its data are small integers
FUNCTIONS: dict[str, tuple[Callable[[str], st.SearchStrategy], tuple[str, ...], bool]] = {
    "conv1d": (convolution, CONVOLUTION, False),
    "conv2d": (convolution, CONVOLUTION, False),
    "conv1d_relu": (convolution, ("conv_relu_pool_forward",), True),
    "conv2d_relu": (convolution, ("conv_relu_pool_forward",), True),
    "conv2d_relu_max_pool2d": (convolution, BLOCK, True),
    "locally_connected2d": (locally_connected, (), False),
    "max_pool1d": (pooling, ("max_pool_forward", "max_pool_backward", "max_pool_indices"), True),
    "max_pool2d": (pooling, ("max_pool_forward", "max_pool_backward", "max_pool_indices"), True),
    "rnn": (recurrent, ("recurrent_forward", "recurrent_backward"), False),
    "gru": (recurrent, ("recurrent_forward", "recurrent_backward"), False),
    "lstm": (recurrent, ("recurrent_forward", "recurrent_backward"), False),
    "jordan": (recurrent, ("recurrent_forward", "recurrent_backward"), False),
    "rnn_cell": (cell, (), False),
    "gru_cell": (cell, (), False),
    "lstm_cell": (cell, (), False),
    "jordan_cell": (cell, (), False),
    "scaled_dot_product_attention": (attention, ATTENTION, False),
    "additive_attention": (additive, ADDITIVE, False),
    "linear_attention": (linear, ("linear_attention_forward", "linear_attention_backward"), False),
    "linear_attention_step": (linear_step, (), False),
    "ctc_loss": (ctc, ("ctc_loss",), False),
    "crf_log_likelihood": (chain, ("crf_log_likelihood", "crf_gradient"), False),
    "crf_log_partition": (chain, ("crf_log_likelihood", "crf_gradient"), False),
    "crf_decode": (decoding, ("crf_viterbi",), True),
    "crf_marginals": (chain, ("crf_gradient",), False),
}  # fmt: skip


@st.composite
def problems(draw: Any, tables: dict[str, dict[str, list[str]]], name: str | None = None) -> Problem:
    name = name or draw(st.sampled_from(sorted(FUNCTIONS)))
    strategy, operations, integers = FUNCTIONS[name]
    shapes, options, call = draw(strategy(name))
    dtypes = (torch.float32, torch.float64) if has_kinks(options) else DTYPES
    kernels = [f"{operation}:{kernel}" for operation in operations for kernel in tables[operation]["cpu"]]
    return Problem(
        name, tuple(shapes), options, draw(st.sampled_from(dtypes)),
        tuple(draw(st.sampled_from(VIEWS)) for _ in shapes), draw(st.integers(0, 2**16)),
        draw(st.sampled_from(["", "", *kernels])), draw(st.sampled_from([1, 1, 2, 3])), call, integers,
    )  # fmt: skip
