"""Random problems for every public function: what `make fuzz` draws. tests/fuzz.py runs them.

A problem is drawn as plain numbers, so that hypothesis can shrink it and print it, and built by `build`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from support import view_as
from torch import Tensor

from pyseqnet import masks

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
        found = []
        for shape, view in zip(self.shapes, self.views, strict=True):
            if self.integers:
                values = torch.randint(-2, 3, shape, generator=generator).to(self.dtype)
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


@st.composite
def recurrent(draw: Any, name: str) -> tuple:
    gates = {"rnn": 1, "gru": 3, "lstm": 4, "jordan": 1}[name]
    t, b, i, h = draw(small(9)), draw(small(9)), draw(small(33)), draw(small(33))
    layers, directions = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    first, biases = draw(st.booleans()), draw(st.booleans())
    outer = draw(small(9)) if name == "jordan" or (name == "lstm" and h > 1 and draw(st.booleans())) else h
    proj = name == "lstm" and outer < h
    outer = outer if proj or name == "jordan" else h
    shapes: list[tuple[int, ...]] = [(b, t, i) if first else (t, b, i)]
    starts = draw(st.booleans())
    if starts:
        shapes.append((layers * directions, b, outer))
        if name == "lstm":
            shapes.append((layers * directions, b, h))
    states = len(shapes) - 1
    for layer in range(layers):
        for _ in range(directions):
            shapes += [(gates * h, i if layer == 0 else outer * directions), (gates * h, outer)]
            shapes += [(gates * h,)] * (2 * biases)
            if name == "jordan":
                shapes += [(outer, h), *([(outer,)] * biases)]
            elif proj:
                shapes.append((outer, h))
    lengths = [draw(st.integers(1, t)) for _ in range(b)] if draw(st.booleans()) else None
    options: dict[str, Any] = {
        "num_layers": layers, "bidirectional": directions == 2, "batch_first": first, "lengths": lengths,
    }  # fmt: skip
    if proj:
        options["proj_size"] = outer

    def call(f: Any, x: Tensor, *rest: Tensor) -> Any:
        state: Any = None if not states else rest[0] if states == 1 else (rest[0], rest[1])
        return f(x, state, [p / 2 for p in rest[states:]], **options)

    return shapes, options, call


@st.composite
def cell(draw: Any, name: str) -> tuple:
    gates = {"rnn_cell": 1, "gru_cell": 3, "lstm_cell": 4}[name]
    b, i, h = draw(small(9)), draw(small(33)), draw(small(33))
    shapes = [(b, i), *[(b, h)] * (2 if name == "lstm_cell" else 1), (gates * h, i), (gates * h, h)]
    shapes += [(gates * h,)] * (2 * draw(st.booleans()))

    def call(f: Any, x: Tensor, h0: Tensor, *rest: Tensor) -> Any:
        return f(x, (h0, rest[0]), *rest[1:]) if name == "lstm_cell" else f(x, h0, *rest)

    return shapes, {}, call


@st.composite
def patterns(draw: Any) -> masks.Pattern:
    kinds = st.sampled_from(["causal", "local", "strided", "global"])

    def one() -> masks.Pattern:
        kind = draw(kinds)
        align = draw(st.sampled_from(["top_left", "bottom_right"]))
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
        "return_weights": draw(st.booleans()), "return_lse": False,
    }  # fmt: skip
    shapes = [(b, h * group, length, d), (b, h, keys, d), (b, h, keys, e)]
    mask = draw(st.sampled_from(["none", "none", "bool", "float"]))
    lead = (draw(st.sampled_from([1, b])), draw(st.sampled_from([1, h * group])), draw(st.sampled_from([1, length])))
    if mask != "none":
        shapes.append((*lead, keys))
    options["mask"] = mask

    def call(f: Any, q: Tensor, k: Tensor, v: Tensor, m: Tensor | None = None) -> Any:
        given = {key: value for key, value in options.items() if key != "mask"}
        if given["key_lengths"] is not None:
            given["key_lengths"] = torch.tensor(given["key_lengths"], dtype=torch.int64)
        if mask == "bool" and m is not None:
            m = m.detach() > -0.5
        return f(q, k, v, m, **given)

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


@st.composite
def linear(draw: Any, name: str) -> tuple:
    b, h, length, d, e = draw(st.integers(1, 3)), draw(st.integers(1, 3)), *(draw(small(65)) for _ in range(3))
    causal = draw(st.booleans())
    keys = length if causal else draw(small(130))
    lengths = [draw(st.integers(0, keys)) for _ in range(b)] if draw(st.booleans()) else None
    feature_map = draw(st.sampled_from(["elu", "identity"]))
    options = {
        "causal": causal, "feature_map": feature_map, "normalize": feature_map == "elu",
        "return_state": draw(st.booleans()), "key_lengths": lengths,
    }  # fmt: skip

    def call(f: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        ends = None if lengths is None else torch.tensor(lengths, dtype=torch.int64)
        return f(q, k, v, **{**options, "key_lengths": ends})

    return [(b, h, length, d), (b, h, keys, d), (b, h, keys, e)], options, call


@st.composite
def linear_step(draw: Any, name: str) -> tuple:
    b, h, d, e = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(small(65)), draw(small(65))
    shapes = [(b, h, d), (b, h, d), (b, h, e), (b, h, d, e), (b, h, d)]

    def call(f: Any, q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor) -> Any:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        return f(q, k, v, (s.to(wide), z.to(wide).abs() + 1))

    return shapes, {}, call


@st.composite
def ctc(draw: Any, name: str) -> tuple:
    t, b, c = draw(small(33)), draw(small(9)), draw(small(33, 2))
    longest = draw(st.integers(0, 9))
    ends = [draw(st.integers(1, t)) for _ in range(b)]
    sizes = [draw(st.integers(0, longest)) for _ in range(b)]
    targets = [[draw(st.integers(1, c - 1)) for _ in range(longest)] for _ in range(b)]
    options = {
        "input_lengths": ends, "target_lengths": sizes, "zero_infinity": draw(st.booleans()), "reduction": "none",
        "targets": targets,
    }  # fmt: skip

    def call(f: Any, x: Tensor) -> Any:
        given = {key: value for key, value in options.items() if key != "targets"}
        return f(x, torch.tensor(targets, dtype=torch.int64).reshape(b, longest), from_logits=True, **given)

    return [(t, b, c)], options, call


@st.composite
def chain(draw: Any, name: str) -> tuple:
    b, t, c = draw(small(9)), draw(small(17)), draw(small(33))
    ends = [draw(st.integers(1, t)) for _ in range(b)] if draw(st.booleans()) else None
    tags = [[draw(st.integers(0, c - 1)) for _ in range(t)] for _ in range(b)]
    options = {"ends": ends, "tags": tags if "likelihood" in name else None}

    def call(f: Any, x: Tensor, *potentials: Tensor) -> Any:
        mask = None if ends is None else torch.arange(t) < torch.tensor(ends)[:, None]
        return f(x, torch.tensor(tags), mask, *potentials) if "likelihood" in name else f(x, mask, *potentials)

    return [(b, t, c), (c,), (c,), (c, c)], options, call


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


# function: its strategy, the family in the dispatch tables, whether its data are small integers
FUNCTIONS: dict[str, tuple[Callable[[str], st.SearchStrategy], tuple[str, ...], bool]] = {
    "conv1d": (convolution, ("conv_forward", "conv_input_gradient", "conv_weight_gradient"), False),
    "conv2d": (convolution, ("conv_forward", "conv_input_gradient", "conv_weight_gradient"), False),
    "conv1d_relu": (convolution, ("conv_relu_pool_forward",), True),
    "conv2d_relu": (convolution, ("conv_relu_pool_forward",), True),
    "conv2d_relu_max_pool2d": (
        convolution, ("conv_relu_pool_forward", "conv_relu_pool_input_gradient", "conv_relu_pool_weight_gradient"),
        True,
    ),
    "locally_connected2d": (locally_connected, (), False),
    "max_pool1d": (pooling, ("max_pool_forward", "max_pool_backward"), True),
    "max_pool2d": (pooling, ("max_pool_forward", "max_pool_backward"), True),
    "rnn": (recurrent, ("recurrent_forward", "recurrent_backward"), False),
    "gru": (recurrent, ("recurrent_forward", "recurrent_backward"), False),
    "lstm": (recurrent, ("recurrent_forward", "recurrent_backward"), False),
    "jordan": (recurrent, ("recurrent_forward", "recurrent_backward"), False),
    "rnn_cell": (cell, (), False),
    "gru_cell": (cell, (), False),
    "lstm_cell": (cell, (), False),
    "scaled_dot_product_attention": (
        attention, ("attention_forward", "attention_backward", "attention_weights", "attention_bias_gradient"), False,
    ),
    "additive_attention": (additive, ("additive_attention_forward", "additive_attention_backward"), False),
    "linear_attention": (linear, ("linear_attention_forward", "linear_attention_backward"), False),
    "linear_attention_step": (linear_step, (), False),
    "ctc_loss": (ctc, ("ctc_loss",), False),
    "crf_log_likelihood": (chain, ("crf_log_likelihood", "crf_gradient"), False),
    "crf_log_partition": (chain, ("crf_log_likelihood", "crf_gradient"), False),
    "crf_marginals": (chain, ("crf_gradient",), False),
}  # fmt: skip


@st.composite
def problems(draw: Any, tables: dict[str, dict[str, list[str]]], name: str | None = None) -> Problem:
    name = name or draw(st.sampled_from(sorted(FUNCTIONS)))
    strategy, operations, integers = FUNCTIONS[name]
    shapes, options, call = draw(strategy(name))
    dtypes = (torch.float32, torch.float64) if integers and "relu" in name else DTYPES
    kernels = [f"{operation}:{kernel}" for operation in operations for kernel in tables[operation]["cpu"]]
    return Problem(
        name, tuple(shapes), options, draw(st.sampled_from(dtypes)),
        tuple(draw(st.sampled_from(VIEWS)) for _ in shapes), draw(st.integers(0, 2**16)),
        draw(st.sampled_from(["", "", *kernels])), draw(st.sampled_from([1, 1, 2, 3])), call, integers,
    )  # fmt: skip
