"""Gradients of recurrent layers in every way that torch asks for them; autocast."""

from __future__ import annotations

import threading

import pytest
import torch
from support import DTYPES, normal, threads, view_as
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import pyseqnet.functional as F
from pyseqnet import nn

ops = torch.ops.pyseqnet
T, B, I, H = 3, 2, 2, 3  # noqa: E741 - the family's letters
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
LENGTHS = torch.tensor([2, 3])


def leaves(name: str, device: str, layers: int = 1, directions: int = 1, projection: int = 0) -> list[Tensor]:
    """x, h_0 (, c_0), parameters."""
    rows, features = layers * directions, projection or H
    x, h, c = normal((T, B, I), 0), normal((rows, B, features), 1), normal((rows, B, H), 2)
    params: list[Tensor] = []
    for layer in range(layers):
        for _ in range(directions):
            width = I if layer == 0 else features * directions
            shapes: list[tuple[int, ...]] = [(GATES[name] * H, width), (GATES[name] * H, features)]
            shapes += [(GATES[name] * H,)] * 2 + ([(projection, H)] if projection else [])
            params += [0.5 * normal(s, 10 + len(params) + k) for k, s in enumerate(shapes)]
    return [t.to(device).requires_grad_() for t in (x, h, *([c] if name == "lstm" else []), *params)]


def function_of(name: str, reference: bool = False, **options: object):
    """(x, states, parameters) -> every result, as torch.autograd's checks want it."""
    function = getattr(F, f"{name}_reference" if reference else name)

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        states, params = (rest[:2], rest[2:]) if name == "lstm" else (rest[0], rest[1:])
        y, state = function(x, states, params, **options)
        return (y, *state) if name == "lstm" else (y, state)

    return run


KINDS = {
    "lstm": ("lstm", {}, {}),
    "gru": ("gru", {}, {}),
    "rnn": ("rnn", {}, {}),
    "lstm both directions": ("lstm", {"bidirectional": True}, {"directions": 2}),
    "lstm projection": ("lstm", {}, {"projection": 2}),
    "lstm lengths": ("lstm", {"lengths": LENGTHS, "bidirectional": True}, {"directions": 2}),
    "gru lengths": ("gru", {"lengths": LENGTHS}, {}),
    "rnn lengths, two layers": ("rnn", {"lengths": LENGTHS, "num_layers": 2}, {"layers": 2}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(device: str, kind: str) -> None:
    name, options, sizes = KINDS[kind]
    torch.autograd.gradcheck(function_of(name, **options), leaves(name, device, **sizes))


@pytest.mark.parametrize("kind", KINDS)
def test_gradgradcheck(device: str, kind: str) -> None:
    name, options, sizes = KINDS[kind]
    nondeterminism = 1e-12 if device == "cuda" else 0.0  # a double backward multiplies with torch's matrix product
    torch.autograd.gradgradcheck(
        function_of(name, **options), leaves(name, device, **sizes), fast_mode=True, nondet_tol=nondeterminism
    )


@pytest.mark.parametrize("name", ["lstm_cell", "gru_cell", "rnn_cell"])
def test_gradcheck_of_cells(device: str, name: str) -> None:
    family = name.removesuffix("_cell")
    x, h, *rest = leaves(family, device)
    c, params = (rest[0][0], rest[1:]) if family == "lstm" else (None, rest)

    def step(x: Tensor, h: Tensor, *rest: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        hx = (h, rest[0]) if c is not None else h
        return getattr(F, name)(x, hx, *rest[1:]) if c is not None else getattr(F, name)(x, hx, *rest)

    inputs = [t.detach().clone().requires_grad_() for t in (x[0], h[0], *([c] if c is not None else []), *params)]
    torch.autograd.gradcheck(step, inputs)
    torch.autograd.gradgradcheck(step, inputs, fast_mode=True, nondet_tol=1e-12 if device == "cuda" else 0.0)


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_gradgradcheck_of_packed_sequences(device: str, name: str) -> None:
    x, *rest = leaves(name, device)
    packed = pack_padded_sequence(x.detach(), LENGTHS, enforce_sorted=False)

    def run(data: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        y, *states = function_of(name)(PackedSequence(data, *packed[1:]), *rest)
        return (y.data, *states)

    inputs = [packed.data.clone().requires_grad_(), *rest]
    torch.autograd.gradcheck(run, inputs)
    torch.autograd.gradgradcheck(run, inputs, fast_mode=True, nondet_tol=1e-12 if device == "cuda" else 0.0)


def test_shared_weights_are_counted_once(device: str) -> None:
    """A cell's state is computed from the weights of the same cell: a double backward must not follow that path."""

    def penalty(cell) -> list[Tensor]:
        x, h, c, *params = leaves("lstm", device)
        h, c = h[0], c[0]
        for step in x:
            h, c = cell(step, (h, c), *params)
        (g,) = torch.autograd.grad(h.pow(3).sum(), params[1], create_graph=True)
        return list(torch.autograd.grad(g.square().sum(), params))

    def stacked(function) -> list[Tensor]:
        x, h, c, *params = leaves("lstm", device)
        params[0] = normal((4 * H, H), 5).to(device).requires_grad_()
        x = normal((T, B, H), 6).to(device)
        for _ in range(2):
            x, _ = function(x, (h, c), params)
        (g,) = torch.autograd.grad(x.pow(3).sum(), params[0], create_graph=True)
        return list(torch.autograd.grad(g.square().sum(), params))

    def torchs(x: Tensor, hx: tuple, params: list) -> tuple:
        # torch's own fused layer on a GPU cannot be differentiated twice
        return F.lstm_reference(x, hx, params)

    for ours, theirs in ((penalty(F.lstm_cell), penalty(F.lstm_cell_reference)), (stacked(F.lstm), stacked(torchs))):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_third_derivative() -> None:
    def third(function) -> Tensor:
        x, h, c, *params = leaves("lstm", "cpu")
        y, _ = function(x, (h, c), params)
        (g,) = torch.autograd.grad(y.pow(4).sum(), x, create_graph=True)
        (g,) = torch.autograd.grad(g.square().sum(), params[1], create_graph=True)
        return torch.autograd.grad(g.sum(), h)[0]

    torch.testing.assert_close(third(F.lstm), third(F.lstm_reference), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_any_subset_of_inputs_may_want_gradients(device: str, name: str) -> None:
    count = len(leaves(name, device))
    subsets = [{k} for k in range(count)] + [{0, k} for k in range(1, count)] + [set(range(1, count)), {1, count - 1}]
    for wanted in subsets:
        found = []
        for reference in (False, True):
            inputs = leaves(name, device)
            for number, tensor in enumerate(inputs):
                tensor.requires_grad_(number in wanted)
            sum(t.square().sum() for t in function_of(name, reference)(*inputs)).backward()
            found.append([t.grad for t in inputs])
        for number, (a, b) in enumerate(zip(*found, strict=True)):
            assert (a is None) == (number not in wanted)
            if a is not None:
                torch.testing.assert_close(a, b)


ARRIVALS = {
    "sum": lambda y, s: y.sum(),
    "mean of features": lambda y, s: y.mean(-1).square().sum(),
    "the last step": lambda y, s: y[-1].square().sum(),
    "every other": lambda y, s: y[:, :, ::2].square().sum(),
    "transposed": lambda y, s: (y.transpose(1, 2).contiguous() ** 2 * torch.arange(2, device=y.device)).sum(),
    "batch first": lambda y, s: (y.transpose(0, 1).contiguous() ** 3).sum(),
    "narrowed": lambda y, s: y.new_zeros([n + 2 for n in y.shape])[1:-1, 1:-1, 1:-1].add(y).square().sum(),
    "states alone": lambda y, s: sum((t * t).sum() for t in s),
    "the first state alone": lambda y, s: s[0].sum(),
    "the last state alone": lambda y, s: s[-1].sum(),
    "everything": lambda y, s: y.pow(3).sum() + sum(t.sum() for t in s),
    "almost nothing": lambda y, s: y.detach().sum() + 0 * y[0, 0, 0],
}


@pytest.mark.parametrize("arrival", ARRIVALS)
@pytest.mark.parametrize("kind", ["contiguous", "transposed", "expanded", "step"])
def test_gradients_arrive_with_any_strides(device: str, arrival: str, kind: str) -> None:
    for name in GATES:
        found = []
        for reference in (False, True):
            x, *rest = leaves(name, device, directions=2)
            y, *states = function_of(name, reference, bidirectional=True)(view_as(x, kind), *rest)
            found.append(torch.autograd.grad(ARRIVALS[arrival](y, states), [x, *rest], allow_unused=True))
        for a, b in zip(*found, strict=True):
            b = torch.zeros_like(a) if b is None and a is not None else b
            torch.testing.assert_close(a, b)


def opcheck_cases(device: str):
    for name, extra in (("lstm", 2), ("gru", 0), ("rnn", 0), ("lstm", 0)):
        x, h, *rest = (t.detach().float() for t in leaves(name, device, directions=2, projection=extra))
        c, params = (rest[0], rest[1:]) if name == "lstm" else (None, rest)
        cell = "rnn_tanh" if name == "rnn" else name
        packed = pack_padded_sequence(x, torch.tensor([3, 2]))
        forms = [
            (x, None, None, None, None, False), (x, h, c, LENGTHS, None, False),
            (x.transpose(0, 1), h, c, None, None, True), (packed.data, h, c, None, packed.batch_sizes, False),
        ]  # fmt: skip
        for data, h_0, c_0, lengths, sizes, batch_first in forms:
            options = (cell, 2, True, batch_first)
            yield ops.recurrent_forward, (data, h_0, c_0, params, lengths, sizes, *options, h_0 is None)
            y, h_n, c_n, gates, cells = ops.recurrent_forward(data, h_0, c_0, params, lengths, sizes, *options, True)
            for gy in (y.new_ones(()).expand(y.shape), None):
                grads = (gy, h_n, c_n if name == "lstm" else None)
                saved = (data, y, h_0, c_0, params, gates, cells, lengths, sizes, *options)
                yield ops.recurrent_backward, (*grads, *saved, True, h_0 is not None, c_0 is not None, True)
            yield ops.recurrent_backward, (*grads, *saved, False, False, False, True)
        h_0, c_0 = h[0], None if c is None else c[0]
        if not extra:
            yield ops.recurrent_step, (x[0], h_0, c_0, *params[:4], cell)
            yield ops.recurrent_step, (x[0], None, None, *params[:2], None, None, cell)


def test_opcheck(device: str) -> None:
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for number, (operation, arguments) in enumerate(opcheck_cases(device)):
        torch.library.opcheck(operation.default, arguments, test_utils=checks if number % 25 == 0 else checks[:2])


def test_gradients_accumulate(device: str) -> None:
    inputs = leaves("gru", device)
    for _ in range(2):
        sum(t.sum() for t in function_of("gru")(*inputs)).backward()
    once = torch.autograd.grad(sum(t.sum() for t in function_of("gru")(*inputs)), inputs)
    for tensor, gradient in zip(inputs, once, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * gradient)


def test_saved_tensors_notice_changes_in_place(device: str) -> None:
    inputs = leaves("lstm", device)
    y, *_ = function_of("lstm")(*inputs)
    with torch.no_grad():
        inputs[3].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_outputs_may_not_change_before_backward(device: str) -> None:
    y, *_ = function_of("rnn")(*leaves("rnn", device))
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_twice_needs_the_graph_kept(device: str) -> None:
    y, *_ = function_of("lstm")(*leaves("lstm", device))
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@pytest.mark.parametrize("name", [*GATES])
def test_no_grad_and_inference_mode(device: str, name: str) -> None:
    inputs = leaves(name, device)
    expected = [t.detach() for t in function_of(name)(*inputs)]
    with torch.no_grad():
        found = function_of(name)(*inputs)
        assert not any(t.requires_grad for t in found)
    with torch.inference_mode():
        inferred = function_of(name)(*inputs)
        assert all(t.is_inference() for t in inferred)
    for a, b, c in zip(expected, found, inferred, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_forward_mode_is_refused_in_words(device: str) -> None:
    for name in GATES:
        inputs = [t.detach() for t in leaves(name, device)]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, torch.ones_like(t)) for t in inputs]
            with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
                function_of(name)(*duals)


@pytest.mark.parametrize("transform", ["grad", "vmap"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functional_transforms_work_or_are_refused_in_words(device: str, transform: str) -> None:
    for name in GATES:
        x, *rest = (t.detach() for t in leaves(name, device))

        def loss(x: Tensor, name: str = name, rest: list = rest) -> Tensor:
            return function_of(name)(x, *rest)[0].square().sum()

        try:
            if transform == "grad":
                found = torch.func.grad(loss)(x)
                leaf = x.clone().requires_grad_()
                expected = torch.autograd.grad(loss(leaf), leaf)[0]
            else:
                stack = torch.stack([x, 2 * x])
                found, expected = torch.func.vmap(loss)(stack), torch.stack([loss(s) for s in stack])
        except RuntimeError as error:
            words = ("functorch", "vmap", "setup_context", "Batching rule not implemented for pyseqnet::")
            assert any(word in str(error) for word in words)  # noqa: PT017
            continue
        torch.testing.assert_close(found, expected)


def test_checkpointing(device: str) -> None:
    inputs = leaves("lstm", device)
    plain = torch.autograd.grad(function_of("lstm")(*inputs)[0].square().sum(), inputs)
    y, *_ = torch.utils.checkpoint.checkpoint(function_of("lstm"), *inputs, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(y.square().sum(), inputs), plain, strict=True):
        assert torch.equal(a, b)


def test_several_python_threads_at_once(device: str) -> None:
    layer = nn.LSTM(5, 7, 2, bidirectional=True, device=device)
    inputs = [normal((6, 3, 5), k, torch.float32).to(device) for k in range(4)]

    def work(x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        y, (h, c) = layer(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum() + h.sum() + c.sum(), [x, *layer.parameters()])]

    expected = [work(x) for x in inputs]
    faults: list[bool] = []

    def repeat(number: int) -> None:
        for _ in range(20):
            faults.extend(not torch.equal(a, b) for a, b in zip(work(inputs[number]), expected[number], strict=True))

    with threads(2):
        workers = [threading.Thread(target=repeat, args=(number,)) for number in range(len(inputs))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not any(faults)
    assert len(faults) == 4 * 20 * len(expected[0])


# --- autocast ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_autocast(device: str, name: str, dtype: torch.dtype, low: torch.dtype) -> None:
    """The dtypes of torch come out: on the CPU a GRU and single steps keep the state's; float64 is left alone."""
    layer = getattr(nn, name)(4, 6, device=device, dtype=dtype)
    x = normal((2, 4) if "Cell" in name else (3, 2, 4), 0, dtype).to(device).requires_grad_()
    exact = layer(x)
    with torch.autocast(device, dtype=low):
        result = layer(x)
        again = layer(x, result if "Cell" in name else result[1])
    promotes = device == "cpu" and name in ("GRU", "GRUCell", "LSTMCell")
    expected = torch.float64 if dtype == torch.float64 else torch.promote_types(dtype, low) if promotes else low

    def flat(t: object) -> list[Tensor]:
        return [t] if isinstance(t, Tensor) else [v for part in t for v in flat(part)]

    assert {t.dtype for t in flat([result, again])} == {expected}
    for a, b in zip(flat(result), flat(exact), strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=2e-2, atol=2e-2)
    sum(t.sum() for t in flat(result)).backward()
    assert x.grad.dtype == dtype
    assert {p.grad.dtype for p in layer.parameters()} == {dtype}


@pytest.mark.parametrize("name", ["LSTM", "RNN"])
def test_autocast_follows_torch(device: str, name: str) -> None:
    ours, theirs = getattr(nn, name)(4, 6, device=device), getattr(torch.nn, name)(4, 6, device=device)
    theirs.load_state_dict(ours.state_dict())
    x = normal((3, 2, 4), 0, torch.float32).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        found, expected = ours(x)[0], theirs(x)[0]
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_autocast_brings_mixed_dtypes_together(device: str) -> None:
    layer = nn.GRU(4, 6, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert layer(torch.randn(3, 2, 4, device=device).bfloat16())[0].dtype == torch.bfloat16
    with torch.autocast(device, enabled=False):
        assert layer(torch.randn(3, 2, 4, device=device))[0].dtype == torch.float32
