"""LSTMs as other libraries publish them, restated in numpy from their sources, in their own layouts of weights.

TensorFlow's LSTMCell(use_peepholes=True) has one kernel for [x, h], applied from the right, with gates in the order
i, j, f, o. haste's LayerNormLSTM has gates in the order i, g, f, o, two gains and one bias. Nothing here shares code or
layout with the package, so a gate or a peephole at the wrong place cannot cancel out.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pyseqnet import nn

T, B, I = 7, 3, 4  # noqa: E741 - the family's letters
SIZES = (5, 16, 19)  # hidden units: within a vector, a vector, more
Weights = dict[str, np.ndarray]
# The oracle is in double throughout; float32 also rounds what it is given, which a normalisation of few units enlarges.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def tensorflow_lstm(
    x: np.ndarray, m: np.ndarray, c: np.ndarray, w: Weights, forget_bias: float, cell_clip: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`call` of tf.compat.v1.nn.rnn_cell.LSTMCell, step after step."""
    outputs = []
    for step in x:
        i, j, f, o = np.split(np.concatenate([step, m], 1) @ w["kernel"] + w["bias"], 4, axis=1)
        c = sigmoid(f + forget_bias + w["w_f_diag"] * c) * c + sigmoid(i + w["w_i_diag"] * c) * np.tanh(j)
        if cell_clip is not None:
            c = np.clip(c, -cell_clip, cell_clip)
        m = sigmoid(o + w["w_o_diag"] * c) * np.tanh(c)
        if "projection" in w:
            m = m @ w["projection"]
        outputs.append(m)
    return np.stack(outputs), m, c


def haste_layer_norm_lstm(
    x: np.ndarray, h: np.ndarray, c: np.ndarray, w: Weights, zoneout: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """LayerNormLSTMScript of haste_pytorch, in evaluation."""

    def layernorm(a: np.ndarray) -> np.ndarray:
        return (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-5)

    outputs = []
    for step in x:
        v = layernorm(step @ w["kernel"]) * w["gamma"][0]
        v = v + layernorm(h @ w["recurrent_kernel"]) * w["gamma"][1] + w["bias"]
        i, g, f, o = np.split(v, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        new = sigmoid(o) * np.tanh(layernorm(c) * w["gamma_h"] + w["beta_h"])
        h = zoneout * h + (1 - zoneout) * new
        outputs.append(h)
    return np.stack(outputs), h, c


def reordered(blocks: np.ndarray, order: tuple[int, int, int, int]) -> np.ndarray:
    """The last dimension's four blocks in this order: ours is i, f, g, o."""
    parts = np.split(blocks, 4, axis=-1)
    return np.concatenate([parts[k] for k in order], -1)


FROM_TENSORFLOW, FROM_HASTE = (0, 2, 1, 3), (0, 2, 1, 3)  # i, j, f, o and i, g, f, o


def loaded(layer: nn.LSTM, parameters: Weights) -> nn.LSTM:
    with torch.no_grad():
        assert {name.removesuffix("_l0") for name, _ in layer.named_parameters()} == set(parameters)
        for name, value in layer.named_parameters():
            value.copy_(torch.from_numpy(np.ascontiguousarray(parameters[name.removesuffix("_l0")])))
    return layer


def random(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.normal(0, 0.5, shape)


def from_tensorflow(w: Weights, forget_bias: float) -> Weights:
    kernel, bias = reordered(w["kernel"], FROM_TENSORFLOW), reordered(w["bias"], FROM_TENSORFLOW)
    of_forget_gate = np.repeat([0.0, forget_bias, 0.0, 0.0], len(bias) // 4)
    ours = {
        "weight_ih": kernel[:I].T,
        "weight_hh": kernel[I:].T,
        "bias_ih": bias,
        "bias_hh": of_forget_gate,
        "weight_ch": np.concatenate([w["w_i_diag"], w["w_f_diag"], w["w_o_diag"]]),
    }
    return ours | ({"weight_hr": w["projection"].T} if "projection" in w else {})


def from_haste(w: Weights) -> Weights:
    gamma = reordered(w["gamma"], FROM_HASTE)
    bias = reordered(w["bias"], FROM_HASTE)
    return {
        "weight_ih": reordered(w["kernel"], FROM_HASTE).T,
        "weight_hh": reordered(w["recurrent_kernel"], FROM_HASTE).T,
        "bias_ih": bias,
        "bias_hh": np.zeros_like(bias),
        "gain_ih": gamma[0],
        "gain_hh": gamma[1],
        "gain_c": w["gamma_h"],
        "bias_c": w["beta_h"],
    }


def check(
    layer: nn.LSTM, oracle: Callable[..., tuple[np.ndarray, ...]], arrays: tuple[np.ndarray, ...], dtype: torch.dtype
) -> None:
    """Outputs and states, then the gradients of x and both states, as slopes of the oracle along random directions."""
    layer = layer.to(dtype).eval()
    x, h, c = (torch.from_numpy(a).to(dtype).requires_grad_() for a in arrays)
    output, (h_n, c_n) = layer(x, (h.unsqueeze(0), c.unsqueeze(0)))
    found = [output, h_n[0], c_n[0]]
    expected = oracle(*arrays)
    for ours, theirs in zip(found, expected, strict=True):
        error = np.abs(ours.detach().double().numpy() - theirs).max()
        assert error <= TOLERANCE[dtype] * max(1.0, np.abs(theirs).max())

    generator = np.random.default_rng(11)
    weights = [generator.normal(size=e.shape) for e in expected]
    gradients = torch.autograd.grad(found, (x, h, c), [torch.from_numpy(w).to(dtype) for w in weights])
    step = 1e-5
    for k, gradient in enumerate(gradients):
        direction = generator.normal(size=arrays[k].shape)

        def at(sign: int, k: int = k, direction: np.ndarray = direction) -> float:
            moved = [a + sign * step * direction if n == k else a for n, a in enumerate(arrays)]
            return sum(float((e * w).sum()) for e, w in zip(oracle(*moved), weights, strict=True))

        slope = (at(1) - at(-1)) / (2 * step)
        assert float((gradient.double().numpy() * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("hidden", SIZES)
@pytest.mark.parametrize("projection", [0, 6])
@pytest.mark.parametrize("cell_clip", [None, 0.4])
def test_tensorflows_peephole_lstm(dtype: torch.dtype, hidden: int, projection: int, cell_clip: float | None) -> None:
    if projection >= hidden:
        projection = hidden - 1
    generator = np.random.default_rng(hidden + projection)
    state = projection or hidden
    w = {name: random(generator, hidden) for name in ("w_i_diag", "w_f_diag", "w_o_diag")}
    w |= {"kernel": random(generator, I + state, 4 * hidden), "bias": random(generator, 4 * hidden)}
    if projection:
        w["projection"] = random(generator, hidden, projection)
    arrays = random(generator, T, B, I), random(generator, B, state), random(generator, B, hidden)
    layer = nn.LSTM(I, hidden, proj_size=projection, peephole="diagonal", cell_clip=cell_clip, dtype=torch.float64)
    layer = loaded(layer, from_tensorflow(w, forget_bias=1.0))
    check(layer, lambda x, m, c: tensorflow_lstm(x, m, c, w, 1.0, cell_clip), arrays, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("hidden", SIZES)
@pytest.mark.parametrize("zoneout", [0.0, 0.2])
def test_hastes_layer_norm_lstm(dtype: torch.dtype, hidden: int, zoneout: float) -> None:
    generator = np.random.default_rng(hidden)
    w = {"kernel": random(generator, I, 4 * hidden), "recurrent_kernel": random(generator, hidden, 4 * hidden)}
    w |= {"bias": random(generator, 4 * hidden), "gamma": 1 + random(generator, 2, 4 * hidden)}
    w |= {"gamma_h": 1 + random(generator, hidden), "beta_h": random(generator, hidden)}
    arrays = random(generator, T, B, I), random(generator, B, hidden), random(generator, B, hidden)
    layer = nn.LSTM(I, hidden, layer_norm=True, zoneout=(zoneout, 0.0), dtype=torch.float64)
    layer = loaded(layer, from_haste(w))
    check(layer, lambda x, h, c: haste_layer_norm_lstm(x, h, c, w, zoneout), arrays, dtype)


def test_a_wrong_wiring_is_noticed() -> None:
    """The checks above can fail: with two peepholes exchanged, and without the forget bias."""
    generator = np.random.default_rng(0)
    w = {name: random(generator, 5) for name in ("w_i_diag", "w_f_diag", "w_o_diag")}
    w |= {"kernel": random(generator, I + 5, 20), "bias": random(generator, 20)}
    arrays = random(generator, T, B, I), random(generator, B, 5), random(generator, B, 5)
    right = from_tensorflow(w, forget_bias=1.0)
    swapped = right | {"weight_ch": np.concatenate([w["w_f_diag"], w["w_i_diag"], w["w_o_diag"]])}
    no_forget_bias = right | {"bias_hh": np.zeros(20)}
    for wrong in (swapped, no_forget_bias):
        layer = loaded(nn.LSTM(I, 5, peephole="diagonal", dtype=torch.float64), wrong)
        with pytest.raises(AssertionError):
            check(layer, lambda x, m, c: tensorflow_lstm(x, m, c, w, 1.0, None), arrays, torch.float64)
