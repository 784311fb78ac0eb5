"""Recurrent networks beyond torch's: Jordan, peepholes, layer normalisation, zoneout, dropout of weights, clipping.

Each is held against a loop written here from the paper's formula, which shares nothing with the package.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from support import DTYPES, Implementation, implementations, is_beyond_this_machine, is_refusal, normal
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pyseqnet.functional as F
from pyseqnet import nn

T, B, I, H, P = 6, 4, 3, 5, 2  # noqa: E741 - the family's letters
LAYERS = {
    "diagonal peephole": lambda **o: nn.LSTM(I, H, peephole="diagonal", **o),
    "full peephole": lambda **o: nn.LSTM(I, H, peephole="full", **o),
    "full peephole, projected": lambda **o: nn.LSTM(I, H, peephole="full", proj_size=P, **o),
    "layer norm": lambda **o: nn.LSTM(I, H, layer_norm=True, **o),
    "layer norm, projected": lambda **o: nn.LSTM(I, H, layer_norm=True, proj_size=P, **o),
    "zoneout": lambda **o: nn.LSTM(I, H, zoneout=(0.2, 0.4), **o),
    "clipped peephole, zoneout": lambda **o: nn.LSTM(I, H, peephole="diagonal", zoneout=0.3, cell_clip=0.3, **o),
    "gru zoneout": lambda **o: nn.GRU(I, H, zoneout=0.3, **o),
    "elman zoneout": lambda **o: nn.RNN(I, H, zoneout=0.3, **o),
    "clipped relu": lambda **o: nn.RNN(I, H, nonlinearity="relu", clip=0.4, **o),
    "jordan": lambda **o: nn.JordanRNN(I, H, P, **o),
    "jordan decay": lambda **o: nn.JordanRNN(I, H, P, output_nonlinearity="tanh", decay=0.5, **o),
    "jordan relu": lambda **o: nn.JordanRNN(I, H, 7, nonlinearity="relu", output_nonlinearity="sigmoid", **o),
}


def randomised(layer: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(1.0 if name.startswith("gain") else 0.0, 0.4, generator=generator)
    return layer


def states_of(layer: torch.nn.Module, batch: tuple[int, ...] = (B,), seed: int = 7) -> Tensor | tuple[Tensor, Tensor]:
    weight = layer._flat_weights[0]
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    h = normal((rows, *batch, layer.proj_size or layer.hidden_size), seed, weight.dtype).to(weight.device)
    c = normal((rows, *batch, layer.hidden_size), seed + 1, weight.dtype).to(weight.device)
    return (h, c) if layer.mode == "LSTM" else h


def flat(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in flat(part)]


# --- the formulae -----------------------------------------------------------------------------------------------


def normalised(a: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    a = gain * (a - a.mean(-1, keepdim=True)) / (a.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return a if bias is None else a + bias


def lstm_loop(layer: nn.LSTM, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, one direction, from the formulae of Gers, of the lectures, of Ba, of Krueger (evaluation)."""
    w = {name.removesuffix("_l0"): value for name, value in layer.named_parameters()}
    zone_h, zone_c = (layer._options.zoneout) if not layer.training else (0.0, 0.0)
    kind, clip = layer._stated.get("peephole"), layer._stated.get("cell_clip")
    outputs = []
    for step in x:
        if layer._stated.get("layer_norm"):
            a = normalised(step @ w["weight_ih"].T, w["gain_ih"]) + normalised(h @ w["weight_hh"].T, w["gain_hh"])
        else:
            a = step @ w["weight_ih"].T + h @ w["weight_hh"].T
        if kind == "full":
            a = a + c @ w["weight_ch"].T
        i, f, g, o = (a + w["bias_ih"] + w["bias_hh"]).chunk(4, -1)
        if kind == "diagonal":
            p_i, p_f, p_o = w["weight_ch"].chunk(3)
            i, f = i + p_i * c, f + p_f * c
        new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        if clip:
            new_c = new_c.clamp(-clip, clip)
        if kind == "diagonal":
            o = o + p_o * new_c
        shown = normalised(new_c, w["gain_c"], w["bias_c"]) if layer._stated.get("layer_norm") else new_c
        new_h = o.sigmoid() * shown.tanh()
        if "weight_hr" in w:
            new_h = new_h @ w["weight_hr"].T
        h, c = zone_h * h + (1 - zone_h) * new_h, zone_c * c + (1 - zone_c) * new_c
        outputs.append(h)
    return torch.stack(outputs), h, c


def jordan_loop(layer: nn.JordanRNN, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    w = {name.removesuffix("_l0"): value for name, value in layer.named_parameters()}
    hidden = torch.tanh if layer.nonlinearity == "tanh" else torch.relu
    output = {"identity": lambda a: a, "tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}
    outputs = []
    for step in x:
        m = hidden(step @ w["weight_ih"].T + w["bias_ih"] + s @ w["weight_hh"].T + w["bias_hh"])
        y = output[layer.output_nonlinearity](m @ w["weight_ho"].T + w["bias_ho"])
        s = layer.decay * s + y
        outputs.append(y)
    return torch.stack(outputs), s


LOOPS = [name for name in LAYERS if not name.startswith(("gru", "elman", "clipped relu"))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LOOPS)
def test_layers_are_their_formulae(device: str, name: str, dtype: torch.dtype) -> None:
    layer = randomised(LAYERS[name](device=device, dtype=dtype)).eval()
    loop = jordan_loop if isinstance(layer, nn.JordanRNN) else lstm_loop
    found = []
    for ours in (True, False):
        x = normal((T, B, I), 1, dtype).to(device).requires_grad_()
        states = [s.requires_grad_() for s in flat(states_of(layer))]
        hx = tuple(states) if len(states) == 2 else states[0]
        results = flat(layer(x, hx) if ours else loop(layer, x, *(s[0] for s in states)))
        gradients = torch.autograd.grad(sum(r.pow(3).sum() for r in results), [x, *states, *layer.parameters()])
        found.append([*results, *gradients])
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-5}
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_worked_example_of_jordans_network(device: str, dtype: torch.dtype) -> None:
    """G3, C7: all weights 1, no biases: [4, 4], [20, 20], [88, 88]. All values are positive: relu is the identity."""
    layer = nn.JordanRNN(2, 2, 2, nonlinearity="relu", bias=False, device=device, dtype=dtype)
    for weight in layer.parameters():
        torch.nn.init.ones_(weight)
    output, s = layer(torch.tensor([[1, 1], [1, 1], [2, 2]], dtype=dtype, device=device))
    assert output.tolist() == [[4, 4], [20, 20], [88, 88]]
    assert s.tolist() == [[88, 88]]
    decaying = nn.JordanRNN(2, 2, 2, nonlinearity="relu", bias=False, decay=0.5, device=device, dtype=dtype)
    decaying.load_state_dict(layer.state_dict())
    output, s = decaying(torch.tensor([[1, 1], [1, 1], [2, 2]], dtype=dtype, device=device))
    # s = 4; y = 4 + 4 * 4 = 20, s = 22; y = 8 + 4 * 22 = 96, s = 107
    assert output.tolist() == [[4, 4], [20, 20], [96, 96]]
    assert s.tolist() == [[107, 107]]


@pytest.mark.parametrize(
    ("peephole", "c_1", "h_1"),
    [(None, 0.601174, 0.365320), ("diagonal", 0.624725, 0.412005), ("full", 0.673252, 0.414377)],
)
def test_one_lstm_unit_with_peepholes(device: str, peephole: str | None, c_1: float, h_1: float) -> None:
    """G14: x = 1, h = 0.5, c = 0.25, all weights 0.5, biases 0."""
    cell = nn.LSTMCell(1, 1, peephole=peephole, device=device, dtype=torch.float64)
    with torch.no_grad():
        for name, weight in cell.named_parameters():
            weight.fill_(0.0 if name.startswith("bias") else 0.5)
    x, h, c = (torch.full((1, 1), v, dtype=torch.float64, device=device) for v in (1.0, 0.5, 0.25))
    h, c = cell(x, (h, c))
    assert c.item() == pytest.approx(c_1, abs=5e-7)
    assert h.item() == pytest.approx(h_1, abs=5e-7)


def test_lstm_by_hand(device: str) -> None:
    """G4, C13: y = 0 0 0 0 0 7 0 0 6. The example's activations are identities, as tanh is for small arguments."""
    small = 1e-3
    x1, x2, x3 = [1, 3, 2, 4, 2, 1, 3, 6, 1], [0, 1, 0, 1, 0, 0, -1, 1, 0], [0, 0, 0, 0, 0, 1, 0, 0, 1]
    x = torch.tensor([x1, x2, x3], dtype=torch.float64, device=device).T
    w_ih = torch.tensor([[0, 100, 0], [0, 100, 0], [small, 0, 0], [0, 0, 100]], dtype=torch.float64, device=device)
    bias = torch.tensor([-10, 10, 0, -10], dtype=torch.float64, device=device)
    zeros = torch.zeros(4, 1, dtype=torch.float64, device=device)
    y, _ = F.lstm(x, None, [w_ih, zeros, bias, torch.zeros_like(bias)])
    torch.testing.assert_close(
        (y / small).flatten().cpu(), torch.tensor([0.0, 0, 0, 0, 0, 7, 0, 0, 6], dtype=torch.float64), rtol=0, atol=5e-3
    )


def test_no_peepholes_no_difference(device: str) -> None:
    """C16: with peephole weights 0 it is the plain LSTM."""
    for peephole in ("diagonal", "full"):
        layer = nn.LSTM(I, H, 2, bidirectional=True, peephole=peephole, device=device, dtype=torch.float64)
        plain = nn.LSTM(I, H, 2, bidirectional=True, device=device, dtype=torch.float64)
        missing, unexpected = plain.load_state_dict(layer.state_dict(), strict=False)
        assert not missing
        assert all(name.startswith("weight_ch") for name in unexpected)
        with torch.no_grad():
            for name in unexpected:
                getattr(layer, name).zero_()
        x = normal((T, B, I), 0).to(device)
        for a, b in zip(flat(layer(x)), flat(plain(x)), strict=True):
            torch.testing.assert_close(a, b)


# --- steps, forms, layers ---------------------------------------------------------------------------------------

CELLS = {
    "diagonal peephole": lambda **o: nn.LSTMCell(I, H, peephole="diagonal", **o),
    "full peephole": lambda **o: nn.LSTMCell(I, H, peephole="full", **o),
    "full peephole, projected": lambda **o: nn.LSTMCell(I, H, peephole="full", proj_size=P, **o),
    "layer norm": lambda **o: nn.LSTMCell(I, H, layer_norm=True, **o),
    "layer norm, projected": lambda **o: nn.LSTMCell(I, H, layer_norm=True, proj_size=P, **o),
    "zoneout": lambda **o: nn.LSTMCell(I, H, zoneout=(0.2, 0.4), **o),
    "clipped peephole, zoneout": lambda **o: nn.LSTMCell(I, H, peephole="diagonal", zoneout=0.3, cell_clip=0.3, **o),
    "gru zoneout": lambda **o: nn.GRUCell(I, H, zoneout=0.3, **o),
    "elman zoneout": lambda **o: nn.RNNCell(I, H, zoneout=0.3, **o),
    "clipped relu": lambda **o: nn.RNNCell(I, H, nonlinearity="relu", clip=0.4, **o),
    "jordan": lambda **o: nn.JordanRNNCell(I, H, P, **o),
    "jordan decay": lambda **o: nn.JordanRNNCell(I, H, P, output_nonlinearity="tanh", decay=0.5, **o),
    "jordan relu": lambda **o: nn.JordanRNNCell(I, H, 7, nonlinearity="relu", output_nonlinearity="sigmoid", **o),
}


@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_streaming_is_the_sequence(device: str, name: str, unbatched: bool) -> None:
    layer = randomised(LAYERS[name](device=device, dtype=torch.float64)).eval()
    cell = CELLS[name](device=device, dtype=torch.float64).eval()
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in layer.state_dict().items()})
    batch = () if unbatched else (B,)
    x, hx = normal((T, *batch, I), 0).to(device), states_of(layer, batch)
    expected = flat(layer(x, hx))
    state = tuple(s[0] for s in hx) if isinstance(hx, tuple) else hx[0]
    outputs = []
    for step in x:
        result = cell(step, state)
        y, state = result if isinstance(layer, nn.JordanRNN) else (flat(result)[0], result)
        outputs.append(y)
    for a, b in zip([torch.stack(outputs), *flat(state)], expected, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape))


@pytest.mark.parametrize("name", LAYERS)
def test_lengths_are_packed_sequences(device: str, name: str) -> None:
    """Each sequence alone, a PackedSequence, a padded batch full of NaN: the same, forward and backward."""
    layer = LAYERS[name](num_layers=2, bidirectional=True, device=device, dtype=torch.float64)
    layer = randomised(layer).eval()
    lengths, hx = torch.tensor([3, 6, 1, 4]), states_of(layer)
    x = normal((T, B, I), 0).to(device)
    outside = (torch.arange(T).unsqueeze(1) >= lengths).unsqueeze(2).to(device)
    y, state = layer(x.masked_fill(outside, math.nan), hx, lengths=lengths)
    assert y.masked_select(outside).count_nonzero() == 0
    packed, packed_state = layer(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
    torch.testing.assert_close(pad_packed_sequence(packed)[0], y)
    for a, b in zip(flat(packed_state), flat(state), strict=True):
        torch.testing.assert_close(a, b)
    for b, length in enumerate(lengths.tolist()):
        own = tuple(s[:, b] for s in hx) if isinstance(hx, tuple) else hx[:, b]
        alone, last = layer(x[:length, b], own)
        torch.testing.assert_close(y[:length, b], alone)
        for whole, single in zip(flat(state), flat(last), strict=True):
            torch.testing.assert_close(whole[:, b], single)
    poisoned = x.masked_fill(outside, math.nan).requires_grad_()
    gradients = torch.autograd.grad(layer(poisoned, hx, lengths=lengths)[0].sum(), [poisoned, *layer.parameters()])
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[0].masked_select(outside).count_nonzero() == 0


@pytest.mark.parametrize("name", LAYERS)
def test_first_and_second_derivatives(device: str, name: str) -> None:
    layer = randomised(LAYERS[name](device=device, dtype=torch.float64)).eval()
    names = [n for n, _ in layer.named_parameters()]
    states = flat(states_of(layer, (2,)))

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        hx = rest[: len(states)] if len(states) == 2 else rest[0]
        values = dict(zip(names, rest[len(states) :], strict=True))
        options = {"lengths": torch.tensor([3, 2])}
        return tuple(flat(torch.func.functional_call(layer, values, (x, hx), options)))

    inputs = [normal((3, 2, I), 0).to(device), *states, *(p.detach().clone() for p in layer.parameters())]
    inputs = [t.requires_grad_() for t in inputs]
    torch.autograd.gradcheck(run, inputs, fast_mode=True)
    torch.autograd.gradgradcheck(run, inputs, fast_mode=True, nondet_tol=1e-12 if device == "cuda" else 0.0)


@pytest.mark.parametrize("name", LAYERS)
def test_state_dict_copies_and_pickles(name: str) -> None:
    layer = randomised(LAYERS[name]()).eval()
    x = torch.randn(T, B, I)
    expected = flat(layer(x))
    whole = io.BytesIO()
    torch.save(layer, whole)
    whole.seek(0)
    fresh = LAYERS[name]().eval()
    fresh.load_state_dict(layer.state_dict(), strict=True)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(whole, weights_only=False),
        fresh,
    ):
        assert repr(other) == repr(layer)
        for a, b in zip(flat(other(x)), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["diagonal peephole", "layer norm, projected", "jordan decay"])
def test_compiles_to_one_graph(name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    layer = randomised(LAYERS[name](num_layers=2, bidirectional=True)).eval()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for steps in (T, T + 1):
        x = torch.randn(steps, B, I, requires_grad=True)
        found = [flat(f(x)) for f in (compiled, layer)]
        grads = [
            torch.autograd.grad(sum(r.square().sum() for r in results), [x, *layer.parameters()]) for results in found
        ]
        for a, b in zip((*found[0], *grads[0]), (*found[1], *grads[1]), strict=True):
            torch.testing.assert_close(a, b)


def test_zoneout_compiles_in_training() -> None:
    torch._dynamo.reset()
    layer = nn.LSTM(I, H, zoneout=0.5, recurrent_dropout=0.2, variational_dropout=0.3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, _ = compiled(torch.randn(T, B, I))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


# --- zoneout, dropouts, clipping, biases ------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dense", "lengths", "packed"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "JordanRNN"])
def test_zoneout_keeps_units(device: str, name: str, form: str) -> None:
    """In training each unit of a state is that of the step before, or what it would be without zoneout."""
    sizes = (I, 300, 300) if name == "JordanRNN" else (I, 300)
    layer = getattr(nn, name)(*sizes, zoneout=0.3, device=device, dtype=torch.float64)
    x = normal((T, B, I), 0).to(device)
    hx = states_of(layer)
    given = {"lengths": torch.tensor([6, 6, 5, 2])} if form == "lengths" else {}
    fed = pack_padded_sequence(x, torch.tensor([6, 6, 5, 2])) if form == "packed" else x
    torch.manual_seed(1)
    result, _ = layer(fed, hx, **given)
    y = pad_packed_sequence(result)[0] if form == "packed" else result
    torch.manual_seed(1)
    again, _ = layer(fed, hx, **given)
    assert torch.equal(again.data, result.data)
    if name == "JordanRNN":  # the state is not what is seen
        return
    before = torch.cat([flat(hx)[0], y[:-1]])
    kept = (y == before)[:2].double()  # every sequence has these steps
    assert kept.mean().item() == pytest.approx(0.3, abs=0.04)
    layer.eval()
    mixed, _ = layer(x[:1], hx)
    plain = getattr(nn, name)(*sizes, device=device, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    new, _ = plain(x[:1], hx)
    torch.testing.assert_close(mixed, 0.3 * flat(hx)[0] + 0.7 * new)


def test_zoneout_of_h_and_c_apart(device: str) -> None:
    """Krueger et al.: h sees the cell before zoneout; rate 1 keeps a state for ever."""
    hx = (normal((1, B, H), 0).to(device), normal((1, B, H), 1).to(device))
    x = normal((T, B, I), 2).to(device)
    layer = nn.LSTM(I, H, zoneout=(0.0, 1.0), device=device, dtype=torch.float64)
    y, (_, c_n) = layer(x, hx)
    assert torch.equal(c_n, hx[1])
    plain = nn.LSTM(I, H, device=device, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(y[:1], plain(x[:1], hx)[0])
    layer = nn.LSTM(I, H, zoneout=(1.0, 0.0), device=device, dtype=torch.float64)
    y, (h_n, c_n) = layer(x, hx)
    assert torch.equal(h_n, hx[0])
    assert torch.equal(y, hx[0].expand_as(y))
    assert not torch.equal(c_n, hx[1])


def test_recurrent_dropout_drops_weights_once_a_call(device: str) -> None:
    """Merity et al.: w_hh alone, scaled by 1 / (1 - p), the same for all steps and sequences; nothing in evaluation."""
    layer = nn.LSTM(I, H, recurrent_dropout=0.5, device=device, dtype=torch.float64)
    plain = nn.LSTM(I, H, device=device, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    x = normal((T, B, I), 0).to(device)
    torch.manual_seed(3)
    y, _ = layer(x)
    torch.manual_seed(3)
    with torch.no_grad():
        plain.weight_hh_l0.copy_(torch.nn.functional.dropout(layer.weight_hh_l0, 0.5))
    torch.testing.assert_close(y, plain(x)[0])
    y.sum().backward()
    assert torch.equal(layer.weight_hh_l0.grad == 0, plain.weight_hh_l0 == 0)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer.eval()(x)[0], plain(x)[0])


@pytest.mark.parametrize("batch_first", [False, True])
def test_variational_dropout_is_the_same_in_all_steps(device: str, batch_first: bool) -> None:
    layer = nn.RNN(8, 8, nonlinearity="relu", bias=False, variational_dropout=(0.5, 0.25), batch_first=batch_first)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(8))
        layer.weight_hh_l0.zero_()
    layer = layer.to(device)
    lengths = torch.tensor([5, 5, 3])
    x = torch.ones((3, 5, 8) if batch_first else (5, 3, 8), device=device)
    y, _ = layer(x)
    y = y.transpose(0, 1) if batch_first else y
    assert torch.equal(y, y[:1].expand_as(y))
    torch.testing.assert_close(y[y > 0], torch.full_like(y[y > 0], 2 / 0.75))
    assert 0 < (y > 0).sum() < y.numel()
    torch.manual_seed(5)
    dense, _ = layer(x)
    torch.manual_seed(5)
    packed, _ = layer(pack_padded_sequence(x, lengths, batch_first))
    unpacked, _ = pad_packed_sequence(packed, batch_first)
    real = torch.arange(5).unsqueeze(0) < lengths.unsqueeze(1)
    real = (real if batch_first else real.T).unsqueeze(2).to(device)
    assert torch.equal(unpacked, dense * real)
    assert torch.equal(layer.eval()(x)[0], torch.ones_like(x))


def test_forget_bias() -> None:
    for layer in (nn.LSTM(I, H, 2, bidirectional=True, forget_bias=1.5), nn.LSTMCell(I, H, forget_bias=1.5)):
        for name, value in layer.named_parameters():
            if name.startswith("bias"):
                assert (value[H : 2 * H] == (1.5 if "ih" in name else 0)).all()
                assert value[:H].count_nonzero() == H
    with pytest.raises(ValueError, match="forget_bias"):
        nn.LSTM(I, H, bias=False, forget_bias=1.0)


def test_cell_clip(device: str) -> None:
    layer = nn.LSTM(I, H, cell_clip=0.25, forget_bias=5.0, device=device)
    _, (_, c_n) = layer(10 * torch.ones(20, B, I, device=device))
    assert c_n.abs().max().item() == 0.25


# --- refusals ---------------------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "peephole": (lambda: nn.LSTM(I, H, peephole="diag"), "peephole: expected None, 'diagonal' or 'full', got 'diag'"),
    "both": (lambda: nn.LSTM(I, H, peephole="full", layer_norm=True), "layer_norm: not together with peephole"),
    "zoneout": (lambda: nn.GRU(I, H, zoneout=1.5), "zoneout: expected a probability between 0 and 1, got 1.5"),
    "dropout": (lambda: nn.RNN(I, H, recurrent_dropout=-1.0), "recurrent_dropout: expected a probability"),
    "clip": (lambda: nn.LSTM(I, H, cell_clip=-1.0), "clip: expected a positive limit or None, got -1.0"),
    "output": (lambda: nn.JordanRNN(I, H, P, output_nonlinearity="softmax"), "output_nonlinearity: expected identity"),
    "nonlinearity": (lambda: nn.JordanRNN(I, H, P, nonlinearity="gelu"), "Unknown nonlinearity 'gelu'"),
    "size": (lambda: nn.JordanRNN(I, 0, P), "hidden_size: expected a positive integer, got 0"),
    "features": (
        lambda: nn.LSTM(I, H, peephole="full")(torch.zeros(T, B, 9)),
        f"input.size\\(-1\\) must be equal to input_size. Expected {I}, got 9",
    ),
    "state": (lambda: nn.JordanRNN(I, H, P)(torch.zeros(T, B, I), torch.zeros(1, B, H)), r"hx: expected the shape"),
    "lengths": (
        lambda: nn.LSTM(I, H, layer_norm=True)(torch.zeros(T, B, I), lengths=torch.tensor([1, 2, 3, 99])),
        r"lengths: expected values from 1 to the input's 6 steps, got \[1, 2, 3, 99\]",
    ),
    "params": (lambda: F.jordan(torch.zeros(T, B, I), None, [torch.zeros(H, I)]), "params: expected 3 or 6 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_wrong_options_are_named(case: str) -> None:
    call, words = BAD_OPTIONS[case]
    with pytest.raises((ValueError, RuntimeError), match=words):
        call()


BAD_STEPS = {  # shapes of the input and the state
    "dimensions": ((2, 2, I), None, "input must have 1 or 2 dimensions, got 3"),
    "features": ((2, 9), None, f"input has inconsistent input_size: got 9 expected {I}"),
    "batch": ((2, I), (3, H), "Input batch size 2 doesn't match hidden0 batch size 3"),
    "size": ((2, I), (2, 9), f"hidden0 has inconsistent hidden_size: got 9, expected {H}"),
    "unbatched state": ((2, I), (H,), "hx: expected as many dimensions"),
}


@pytest.mark.parametrize("case", BAD_STEPS)
@pytest.mark.parametrize("name", ["diagonal peephole", "layer norm", "zoneout", "gru zoneout", "clipped relu"])
def test_steps_refuse_in_the_words_of_torchs_cells(name: str, case: str) -> None:
    cell = CELLS[name]()
    shape, of_state, words = BAD_STEPS[case]
    hx = None if of_state is None else torch.zeros(of_state)
    with pytest.raises((ValueError, RuntimeError), match=words):
        cell(torch.zeros(shape), (hx, hx) if hx is not None and isinstance(cell, nn.LSTMCell) else hx)


@pytest.mark.parametrize("name", LAYERS)
def test_edges(device: str, name: str) -> None:
    """One step, no sequences, one sequence; and one unit."""
    layer = LAYERS[name](device=device)
    for shape in ((1, B, I), (T, 0, I), (T, 1, I), (1, I)):
        for result in flat(layer(torch.randn(shape, device=device))):
            assert result.isfinite().all()
    sizes = (1, 1, 1) if isinstance(layer, nn.JordanRNN) else (1, 1)
    y, _ = type(layer)(*sizes, **({"layer_norm": True} if name == "layer norm" else {}), device=device)(
        torch.randn(T, B, 1, device=device)
    )
    assert y.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 4), (4,)])
def test_one_step_of_jordan_agrees_with_its_reference(shape: tuple[int, ...]) -> None:
    x, s = normal(shape, 1), normal((*shape[:-1], 2), 2)
    weights = [normal(size, 3 + i) for i, size in enumerate(((5, 4), (5, 2), (2, 5), (5,), (5,), (2,)))]
    for hx in (s, None):
        found = [f(x, hx, *weights, decay=0.3) for f in (F.jordan_cell, F.jordan_cell_reference)]
        for ours, theirs in zip(*found, strict=True):
            assert ours.shape == theirs.shape
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


STEPS = {  # weights beside w_ih, w_hh and the biases, and options
    "lstm_cell": [
        ({"w_hr": (3, 5)}, {}),
        ({"w_ch": (15,)}, {"cell_clip": 0.3}),
        ({"w_ch": (20, 5)}, {"zoneout": (0.2, 0.4)}),
        ({}, {"zoneout": 0.3}),
    ],
    "gru_cell": [({}, {"zoneout": 0.3})],
    "rnn_cell": [({}, {"zoneout": 0.3, "clip": 0.4}), ({}, {"clip": 0.2, "nonlinearity": "relu"})],
}


@pytest.mark.parametrize("biases", ["both", "b_ih", "b_hh", "none"])
@pytest.mark.parametrize("name", STEPS)
def test_one_step_with_options_agrees_with_its_reference(device: str, name: str, biases: str) -> None:
    gates = {"lstm_cell": 4, "gru_cell": 3, "rnn_cell": 1}[name]
    step, reference = getattr(F, name), getattr(F, f"{name}_reference")
    for extra, options in STEPS[name]:
        width = extra.get("w_hr", (5,))[0]
        h, c = normal((2, width), 1).to(device), normal((2, 5), 2).to(device)
        shapes = {"input": (2, 4), "w_ih": (gates * 5, 4), "w_hh": (gates * 5, width), **extra}
        shapes |= {b: (gates * 5,) for b in ("b_ih", "b_hh") if biases in ("both", b)}
        given = {key: normal(shape, seed).to(device) for seed, (key, shape) in enumerate(shapes.items(), 3)}
        results = []
        for function in (step, reference):
            leaves = {key: value.clone().requires_grad_() for key, value in given.items()}
            found = flat(function(hx=(h, c) if name == "lstm_cell" else h, **leaves, **options))
            gradients = torch.autograd.grad(sum(t.square().sum() for t in found), list(leaves.values()))
            results.append([*found, *gradients])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_a_cells_zoneout_draws_in_training_and_mixes_in_evaluation(device: str, name: str) -> None:
    cell = getattr(nn, name)(I, 400, zoneout=0.3, device=device, dtype=torch.float64)
    plain = getattr(nn, name)(I, 400, device=device, dtype=torch.float64)
    plain.load_state_dict(cell.state_dict())
    x, h, c = (normal((B, size), seed).to(device) for seed, size in enumerate((I, 400, 400)))
    hx = (h, c) if name == "LSTMCell" else h
    new, drawn = flat(plain(x, hx))[0], flat(cell(x, hx))[0]
    kept = drawn == h
    assert kept.double().mean().item() == pytest.approx(0.3, abs=0.05)
    torch.testing.assert_close(drawn, torch.where(kept, h, new))
    torch.testing.assert_close(flat(cell.eval()(x, hx))[0], 0.3 * h + 0.7 * new)
    assert "zoneout=0.3" in repr(cell)


@pytest.mark.parametrize("kernel", implementations("recurrent"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_gradient_passes_a_clipped_unit(kernel: Implementation, dtype: torch.dtype) -> None:
    """Whichever side the limit rounds to: backward compares it with what was stored."""
    for name, limit in itertools.product(("rnn", "jordan"), (0.3, 0.7, 0.9)):
        x = torch.full((2, 3, 4), 3.0, dtype=dtype, device=kernel.device, requires_grad=True)
        params = [torch.ones(s, dtype=dtype, device=kernel.device) for s in ((5, 4), (5, 5), (5, 5))]
        with kernel.pinned():
            try:
                output, _ = getattr(F, name)(x, None, params[: 2 + (name == "jordan")], clip=limit)
                (grad,) = torch.autograd.grad(output.sum(), x)
            except RuntimeError as error:
                if is_refusal(error) or is_beyond_this_machine(error):
                    continue
                raise
        assert not grad.any(), (name, limit)


def test_a_limit_that_the_dtype_rounds_to_zero_is_refused() -> None:
    x, w = torch.ones(2, 3, 4).half(), torch.ones(4, 4).half()
    with pytest.raises(ValueError, match="limit rounds to zero"):
        F.rnn(x, None, [w, w], clip=1e-9)
