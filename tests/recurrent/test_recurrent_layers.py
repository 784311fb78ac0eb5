"""RNN, LSTM, GRU and their cells are drop-ins: constructors, helper methods, state_dict, forms of input, refusals."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, normal, run_python
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import pyseqnet.functional as F
from pyseqnet import nn

LAYERS = {
    "LSTM": [
        ((3, 4), {}), ((3, 5, 2), {"bidirectional": True}), ((3, 5, 2, False, True), {}),
        ((7, 9), {"proj_size": 4, "bidirectional": True, "num_layers": 2}), ((3, 5), {"bias": False, "proj_size": 2}),
        ((1, 1), {"dtype": torch.float64}),
    ],
    "GRU": [((3, 4), {}), ((3, 5, 2), {"bidirectional": True, "bias": False}), ((3, 5, 3, True, True), {})],
    "RNN": [
        ((3, 4), {}), ((3, 4, 2, "relu"), {}), ((3, 4), {"nonlinearity": "relu", "bidirectional": True}),
        ((3, 5, 2, "tanh", False, True), {}),
    ],
}  # fmt: skip
CELLS = {
    "LSTMCell": [((3, 4), {}), ((3, 5, False), {})],
    "GRUCell": [((3, 4), {}), ((3, 5), {"bias": False})],
    "RNNCell": [((3, 4), {}), ((3, 5, True, "relu"), {}), ((3, 5), {"bias": False, "nonlinearity": "tanh"})],
}


def cases(table: dict) -> list:
    return [pytest.param(n, a, o, id=f"{n}-{a}-{o}") for n, found in table.items() for a, o in found]


pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def twins(name: str, args: tuple, options: dict) -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    ours = getattr(nn, name)(*args, **options)
    torch.manual_seed(0)
    return ours, getattr(torch.nn, name)(*args, **options)


def tensors(result: object) -> list[Tensor]:
    """Every tensor of a result, packed or nested."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [t for t in result if t is not None]
    return [t for part in result for t in tensors(part)]


def assert_same(a: object, b: object, **tolerances: float) -> None:
    for one, other in zip(tensors(a), tensors(b), strict=True):
        torch.testing.assert_close(one, other, **tolerances)


def state_of(layer: torch.nn.Module, batch: tuple[int, ...], seed: int = 5) -> Tensor | tuple[Tensor, Tensor]:
    weight = layer._flat_weights[0]
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    h = normal((rows, *batch, layer.proj_size or layer.hidden_size), seed, weight.dtype).to(weight.device)
    c = normal((rows, *batch, layer.hidden_size), seed + 1, weight.dtype).to(weight.device)
    return (h, c) if layer.mode == "LSTM" else h


def input_of(layer: torch.nn.Module, shape: tuple[int, ...] = (5, 3), seed: int = 0) -> Tensor:
    weight = next(layer.parameters())
    return normal((*shape, layer.input_size), seed, weight.dtype).to(weight.device)


# --- construction -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "args", "options"), cases(LAYERS) + cases(CELLS))
def test_construction(name: str, args: tuple, options: dict) -> None:
    ours, theirs = twins(name, args, options)
    assert isinstance(ours, torch.nn.RNNCellBase if name in CELLS else torch.nn.RNNBase)
    own, torchs = (inspect.signature(type(layer).__init__).parameters for layer in (ours, theirs))
    assert [n for n in own if own[n].kind is not inspect.Parameter.KEYWORD_ONLY or n in torchs] == list(torchs)
    assert repr(ours) == repr(theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)  # the same initialisation from the same seed
    public = {n for n in vars(theirs) if not n.startswith("_")}
    assert all(getattr(ours, n) == getattr(theirs, n) for n in public)


@pytest.mark.parametrize(("name", "args", "options"), cases(LAYERS))
def test_helper_methods(name: str, args: tuple, options: dict) -> None:
    ours, theirs = twins(name, args, options)
    ours.flatten_parameters()
    assert [n for group in ours._all_weights for n in group] == theirs._flat_weights_names
    assert_same(ours.all_weights, theirs.all_weights)
    assert_same(ours._flat_weights, theirs._flat_weights)
    x = input_of(ours).transpose(0, 1) if ours.batch_first else input_of(ours)
    assert ours.get_expected_hidden_size(x, None) == theirs.get_expected_hidden_size(x, None)
    if name == "LSTM":
        assert ours.get_expected_cell_size(x, None) == theirs.get_expected_cell_size(x, None)
    hx, order = state_of(ours, (3,)), torch.tensor([2, 0, 1])
    assert_same(ours.permute_hidden(hx, order), theirs.permute_hidden(hx, order))
    assert ours.check_forward_args(x, hx, None) is None
    ours.reset_parameters()
    assert torch.equal(ours(x)[0], F.__dict__[name.lower()](x, None, ours._flat_weights, **functional_options(ours))[0])


def functional_options(layer: torch.nn.Module) -> dict:
    options = {k: getattr(layer, k) for k in ("num_layers", "bidirectional", "batch_first", "dropout", "training")}
    if layer.mode == "LSTM":
        options["proj_size"] = layer.proj_size
    elif layer.mode.startswith("RNN"):
        options["nonlinearity"] = layer.nonlinearity
    return options


REFUSED_CONSTRUCTIONS = [
    ("LSTM", (3, 0), {}), ("LSTM", (0, 3), {}), ("LSTM", (3.0, 4), {}), ("LSTM", (3, 4, 0), {}), ("GRU", (3, "4"), {}),
    ("LSTM", (3, 4), {"proj_size": 4}), ("LSTM", (3, 4), {"proj_size": -1}), ("LSTM", (3, 4), {"dropout": 1.5}),
    ("LSTM", (3, 4), {"dropout": True}), ("LSTM", (3, 4), {"bias": 1}), ("LSTM", (3, 4), {"batch_first": 0}),
    ("GRU", (3, 4), {"proj_size": 2}), ("RNN", (3, 4), {"proj_size": 2}), ("RNN", (3, 4), {"nonlinearity": "sigmoid"}),
    ("RNN", (3, 4, 1, "gelu"), {}), ("LSTM", (3,), {}), ("LSTM", (3, 4), {"width": 2}), ("RNN", (3, 4, 1, True), {}),
    ("LSTMCell", (3,), {}), ("RNNCell", (3, 4), {"width": 2}), ("GRUCell", (-3, 4), {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "args", "options"), REFUSED_CONSTRUCTIONS, ids=str)
def test_constructors_refuse_as_torch_does(name: str, args: tuple, options: dict) -> None:
    found = []
    for namespace in (nn, torch.nn):
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            getattr(namespace, name)(*args, **options)
        found.append((caught.type, str(caught.value)))
    assert found[0] == found[1]


def test_dropout_of_one_layer_warns_as_torch_does() -> None:
    found = []
    for namespace in (nn, torch.nn):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            namespace.LSTM(3, 4, dropout=0.5)
        found.append([(w.category, str(w.message)) for w in caught])
    assert found[0] == found[1]
    assert len(found[0]) == 1


# --- equal to torch ---------------------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> tuple:
    name = draw(st.sampled_from(("LSTM", "GRU", "RNN")))
    hidden = draw(st.sampled_from((1, 2, 4, 7, 16, 17)))
    options = {
        "num_layers": draw(st.integers(1, 3)), "bias": draw(st.booleans()), "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()), "dtype": draw(st.sampled_from((torch.float32, torch.float64))),
    }  # fmt: skip
    if name == "LSTM" and hidden > 1:
        options["proj_size"] = draw(st.sampled_from((0, 0, 1, hidden - 1)))
    if name == "RNN":
        options["nonlinearity"] = draw(st.sampled_from(("tanh", "relu")))
    shape = (draw(st.sampled_from((1, 2, 5, 9))), draw(st.sampled_from((0, 1, 2, 3, 6))))
    form = draw(st.sampled_from(("batch", "one", "sorted", "any order", "no data")))
    return name, (draw(st.integers(1, 6)), hidden), options, shape, form, draw(st.booleans()), draw(st.integers(0, 99))


def test_layers_agree_with_torch_forward_and_backward(device: str) -> None:
    @settings(max_examples=120)
    @given(calls())
    def on_random_calls(call: tuple) -> None:
        name, args, options, (steps, batch), form, given_state, seed = call
        layers = [layer.to(device) for layer in twins(name, args, options)]
        batch = max(batch, 1) if form in ("sorted", "any order") else batch
        found = []
        for layer in layers:
            first, second = (batch, steps) if layer.batch_first else (steps, batch)
            x = input_of(layer, (steps,) if form == "one" else (first, second), seed).requires_grad_()
            hx = state_of(layer, () if form == "one" else (batch,)) if given_state else None
            states = [] if hx is None else [s.requires_grad_() for s in tensors(hx)]
            fed: object = x
            if form in ("sorted", "any order"):
                lengths = torch.randint(1, steps + 1, (batch,), generator=torch.Generator().manual_seed(seed))
                lengths = lengths.sort(descending=True).values if form == "sorted" else lengths
                fed = pack_padded_sequence(x, lengths, layer.batch_first, enforce_sorted=form == "sorted")
            result = layer(fed, hx)
            assert type(result[0]) is type(fed)
            values = [t for t in tensors(result) if t.is_floating_point()]
            gradients = torch.autograd.grad(sum(v.square().sum() for v in values), [x, *states, *layer.parameters()])
            found.append([*tensors(result), *gradients])
        ours, theirs = found
        assert_same(ours, theirs, rtol=1e-4, atol=2e-5)

    on_random_calls()


@pytest.mark.parametrize(("name", "args", "options"), cases(CELLS))
def test_cells_agree_with_torch(device: str, name: str, args: tuple, options: dict) -> None:
    ours, theirs = (cell.to(device) for cell in twins(name, args, options))
    for batch in ((), (1,), (4,), (0,)):
        found = []
        for cell in (ours, theirs):
            x = input_of(cell, batch).requires_grad_()
            first = cell(x)
            second = cell(x, first)
            gradients = torch.autograd.grad(sum(t.pow(2).sum() for t in tensors(second)), [x, *cell.parameters()])
            found.append([*tensors(first), *tensors(second), *gradients])
        assert_same(*found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_every_dtype(device: str, name: str, dtype: torch.dtype) -> None:
    layer = getattr(nn, name)(6, 8, device=device, dtype=dtype)
    shape = (3,) if name in CELLS else (4, 3)
    results = tensors(layer(input_of(layer, shape)))
    assert {r.dtype for r in results} == {dtype}
    wide = tensors(copy.deepcopy(layer).double()(input_of(layer, shape).double()))
    for a, b in zip(results, wide, strict=True):
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


# --- state_dict, copies, replaced parameters --------------------------------------------------------------------


def some_input(layer: torch.nn.Module) -> Tensor:
    return input_of(layer, (3,) if isinstance(layer, torch.nn.RNNCellBase) else (4, 3))


@pytest.mark.parametrize(("name", "args", "options"), cases(LAYERS) + cases(CELLS))
def test_state_dict_goes_both_ways(name: str, args: tuple, options: dict) -> None:
    ours, theirs = twins(name, args, options)
    x = some_input(ours)
    for source, target in ((ours, theirs), (theirs, ours)):
        for parameter in source.parameters():
            torch.nn.init.normal_(parameter)
        buffer = io.BytesIO()
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        target.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
        assert_same(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "args", "options"), cases(LAYERS) + cases(CELLS))
def test_copies_and_pickles(name: str, args: tuple, options: dict) -> None:
    ours, _ = twins(name, args, options)
    x = some_input(ours)
    whole = io.BytesIO()
    torch.save(ours, whole)
    whole.seek(0)
    expected = ours(x)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(whole, weights_only=False)):
        assert type(other) is type(ours)
        assert repr(other) == repr(ours)
        assert_same(other(x), expected, rtol=0, atol=0)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert_same(ours(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_replaced_parameters_are_used(name: str) -> None:
    """By assignment, by functional_call, by a parametrisation, by pruning's plain attributes, by a cast."""
    ours, theirs = twins(name, (3, 4), {})
    weight = "weight_hh" if name in CELLS else "weight_hh_l0"
    x = some_input(ours)
    fresh = torch.nn.Parameter(torch.randn_like(getattr(ours, weight)))
    for layer in (ours, theirs):
        setattr(layer, weight, fresh)
    assert_same(ours(x), theirs(x))
    values = {n: torch.randn_like(p) for n, p in ours.named_parameters()}
    assert_same(*(torch.func.functional_call(layer, values, (x,)) for layer in (ours, theirs)))
    for layer in (ours, theirs):
        torch.nn.utils.parametrize.register_parametrization(layer, weight, torch.nn.Tanh(), unsafe=False)
    assert_same(ours(x), theirs(x))
    for layer in (ours, theirs):
        torch.nn.utils.parametrize.remove_parametrizations(layer, weight)
        delattr(layer, weight)
        setattr(layer, weight, values[weight])
    assert_same(ours(x), theirs(x))
    ours, theirs = (layer.double() for layer in twins(name, (3, 4), {}))
    assert_same(ours(x.double()), theirs(x.double()))


def test_replacing_torchs_classes_does_not_recurse() -> None:
    result = run_python(
        "import torch, pyseqnet.nn\n"
        "for name in ('RNN', 'LSTM', 'GRU', 'RNNCell', 'LSTMCell', 'GRUCell'):\n"
        "    setattr(torch.nn, name, getattr(pyseqnet.nn, name))\n"
        "    setattr(torch.nn.modules, name, getattr(pyseqnet.nn, name))\n"
        "    setattr(torch.nn.modules.rnn, name, getattr(pyseqnet.nn, name))\n"
        "import pyseqnet.functional as F\n"
        "torch.lstm = torch._VF.lstm_cell = torch.lstm_cell = None\n"
        "torch.nn.functional.linear = None\n"
        "x = torch.randn(4, 2, 3, requires_grad=True)\n"
        "layer, cell = torch.nn.LSTM(3, 5, 2, bidirectional=True), torch.nn.LSTMCell(10, 4)\n"
        "y = cell(layer(x)[0][-1])[0]\n"
        "(g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)\n"
        "g.square().sum().backward()\n"
        "try:\n"
        "    layer(x[..., :2])\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
        "print(type(layer).__module__, tuple(y.shape))\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "input.size(-1) must be equal to input_size. Expected 3, got 2", "pyseqnet.nn.recurrent (2, 4)",
    ]  # fmt: skip


# --- refusals ---------------------------------------------------------------------------------------------------


def outcome(function, *arguments: object, **options: object) -> object:
    try:
        return function(*arguments, **options)
    except Exception as error:
        return error


def assert_refused_as_torch_does(ours, theirs, *arguments: object) -> None:
    found, expected = outcome(ours, *arguments), outcome(theirs, *arguments)
    assert isinstance(expected, Exception), "torch accepts this"
    assert type(found) is type(expected), repr(found)
    assert str(found).splitlines()[0] == str(expected).splitlines()[0]


def zeros(*shape: int, **options: object) -> Tensor:
    return torch.zeros(shape, **options)


BAD_CALLS = {
    "scalar": (zeros(),), "vector": (zeros(3),), "four dimensions": (zeros(1, 1, 1, 3),),
    "features": (zeros(5, 2, 4),), "features of one": (zeros(5, 4),), "no steps": (zeros(0, 2, 3),),
    "float64": (zeros(5, 2, 3, dtype=torch.float64),), "integers": (zeros(5, 2, 3, dtype=torch.int64),),
    "None": (None,), "a string": ("x",), "a list": ([1.0, 2.0],), "meta": (zeros(5, 2, 3, device="meta"),),
}  # fmt: skip
BAD_STATES = {
    "batch": zeros(1, 3, 4), "features": zeros(1, 2, 5), "layers": zeros(2, 2, 4), "two dimensions": zeros(2, 4),
    "a string": "h", "a number": 1.0, "four dimensions": zeros(1, 1, 2, 4),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_refuse_inputs_as_torch_does(name: str, case: str) -> None:
    assert_refused_as_torch_does(*twins(name, (3, 4), {}), *BAD_CALLS[case])


@pytest.mark.parametrize("case", BAD_STATES)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_refuse_states_as_torch_does(name: str, case: str) -> None:
    ours, theirs = twins(name, (3, 4), {})
    bad = BAD_STATES[case]
    states = [(bad, zeros(1, 2, 4)), (zeros(1, 2, 4), bad), (bad, bad)] if name == "LSTM" else [bad]
    for state in states:
        assert_refused_as_torch_does(ours, theirs, zeros(5, 2, 3), state)
        assert_refused_as_torch_does(ours, theirs, zeros(5, 3), state) if case != "two dimensions" else None


@pytest.mark.parametrize("name", LAYERS)
def test_layers_refuse_packed_sequences_as_torch_does(name: str) -> None:
    ours, theirs = twins(name, (3, 4), {})
    packed = pack_padded_sequence(zeros(5, 2, 4), torch.tensor([5, 3]))
    assert_refused_as_torch_does(ours, theirs, packed)
    packed = pack_padded_sequence(zeros(5, 2, 3), torch.tensor([5, 3]))
    wrong = zeros(1, 3, 4)
    assert_refused_as_torch_does(ours, theirs, packed, (wrong, wrong) if name == "LSTM" else wrong)


BAD_CELL_CALLS = {
    "features": (zeros(2, 5), zeros(2, 4)), "three dimensions": (zeros(1, 2, 3), zeros(2, 4)),
    "scalar": (zeros(), zeros(4)), "batch": (zeros(2, 3), zeros(5, 4)), "state features": (zeros(2, 3), zeros(2, 5)),
    "state dimensions": (zeros(2, 3), zeros(1, 1, 2, 4)), "None": (None, None), "a string": ("x", zeros(2, 4)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CELL_CALLS)
@pytest.mark.parametrize("name", CELLS)
def test_cells_refuse_as_torch_does(name: str, case: str) -> None:
    x, h = BAD_CELL_CALLS[case]
    assert_refused_as_torch_does(*twins(name, (3, 4), {}), x, (h, h) if name == "LSTMCell" and h is not None else h)


def test_unknown_nonlinearity_of_a_cell() -> None:
    assert_refused_as_torch_does(*twins("RNNCell", (3, 4), {"nonlinearity": "sigmoid"}), zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.float8_e4m3fn])
def test_other_dtypes_are_refused_in_words(dtype: torch.dtype) -> None:
    params = [zeros(*s).to(dtype) for s in ((16, 3), (16, 4), (16,), (16,))]
    found = outcome(F.lstm, zeros(5, 2, 3).to(dtype), None, params)
    assert isinstance(found, (TypeError, RuntimeError, NotImplementedError)), found
    assert "csrc" not in str(found)


PARAMS = [zeros(16, 3), zeros(16, 4), zeros(16), zeros(16)]
X, LENGTHS = zeros(5, 2, 3), torch.tensor([5, 2])
BAD_FUNCTION_CALLS = {
    "lengths too long": ((X, None, PARAMS), {"lengths": torch.tensor([6, 2])}, r"lengths: .*5 steps.*\[6, 2\]"),
    "lengths below 0": ((X, None, PARAMS), {"lengths": torch.tensor([-1, 2])}, r"lengths: .*\[-1, 2\]"),
    "number of lengths": ((X, None, PARAMS), {"lengths": torch.tensor([5])}, r"lengths: .*2 sequences, got 1"),
    "dtype of lengths": ((X, None, PARAMS), {"lengths": LENGTHS.int()}, r"lengths: .*int64.*int32"),
    "shape of lengths": ((X, None, PARAMS), {"lengths": LENGTHS[None]}, r"lengths: .*one-dimensional.*\(1, 2\)"),
    "lengths of one sequence": ((X[:, 0], None, PARAMS), {"lengths": torch.tensor([5])}, "lengths"),
    "lengths of a packed batch": (
        (pack_padded_sequence(X, LENGTHS), None, PARAMS), {"lengths": LENGTHS}, "lengths.*PackedSequence"),
    "number of params": ((X, None, PARAMS[:1]), {"lengths": LENGTHS}, "params: expected"),
    "a parameter's shape": (
        (X, None, [PARAMS[0], zeros(16, 5), *PARAMS[2:]]), {"lengths": LENGTHS}, r"params\[1\]: expected .*\(16, 4\)"),
    "a state's shape": (
        (X, (zeros(1, 2, 4), zeros(1, 3, 4)), PARAMS), {"lengths": LENGTHS}, r"hx\[1\]: expected .*\(1, 2, 4\)"),
    "proj_size": ((X, None, PARAMS), {"proj_size": 2}, "proj_size"),
    "layers": ((X, None, PARAMS), {"num_layers": 3}, "."),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FUNCTION_CALLS)
def test_functions_name_what_is_wrong(case: str) -> None:
    arguments, options, words = BAD_FUNCTION_CALLS[case]
    with pytest.raises((ValueError, RuntimeError, TypeError), match=words) as caught:
        F.lstm(*arguments, **options)
    assert "csrc" not in str(caught.value)


def test_a_layer_names_bad_lengths() -> None:
    with pytest.raises(ValueError, match=r"lengths: expected values from 1 to the input's 5 steps, got \[9, 2\]"):
        nn.GRU(3, 4)(X, lengths=torch.tensor([9, 2]))


def test_rnn_names_its_nonlinearity() -> None:
    with pytest.raises(ValueError, match="Unknown nonlinearity 'sigmoid'"):
        F.rnn(X, None, [zeros(4, 3), zeros(4, 4)], nonlinearity="sigmoid")


HOSTILE = """
import itertools, random, torch, pyseqnet
ops, random = torch.ops.pyseqnet, random.Random(0)
def t(*s, dtype=torch.float32): return torch.zeros(s, dtype=dtype)
good = dict(x=t(5, 2, 3), h=t(1, 2, 4), c=t(1, 2, 4), w=[t(16, 3), t(16, 4), t(16), t(16)], lengths=None, sizes=None,
            cell="lstm", directions=1, bias=True, first=False, reserve=True)
strange = [None, t(), t(0), t(5, 2), t(5, 2, 3, dtype=torch.float64), t(1, 2, 5), t(2**10, 1, 1), t(0, 2, 3),
           t(5, 0, 3), t(5, 2, 0), torch.zeros(1).expand(2**40), torch.zeros(1).expand(2**31, 2**20, 3),
           t(1, 2, 4, dtype=torch.int64)]
integers = [None, torch.tensor([5, 2]), torch.tensor([2**62, 2]), torch.tensor([-1, 1]), torch.tensor([2, 5, 1]), t(2),
            torch.tensor([2, 2, 2, 1, 1]), torch.zeros(0, dtype=torch.int64), torch.tensor([[1, 2]])]
choices = dict(x=strange, h=strange, c=strange, lengths=integers, sizes=integers,
               cell=["lstm", "gru", "rnn_tanh", "", "x"],
               directions=[0, 1, 2, -1, 3, 2**40], bias=[True, False], first=[True, False], reserve=[True, False],
               w=[[], [t(16, 3)], [t(16, 3), t(16, 4)], [t(4, 3), t(4, 4)], [t(), t()], [t(0, 3), t(0, 0)] * 2,
                  good["w"] + [t(2, 4)], good["w"] * 2, good["w"] * 5000, [t(15, 3), t(15, 4), t(15), t(15)]])
calls = 0
def attempt(**changed):
    global calls
    a = {**good, **changed}
    options = (a["cell"], a["directions"], a["bias"], a["first"])
    for op, rest in (
        (ops.recurrent_forward, (a["x"], a["h"], a["c"], a["w"], a["lengths"], a["sizes"], *options, a["reserve"])),
        (ops.recurrent_backward, (changed.get("gy"), a["h"], a["c"], a["x"], changed.get("y", t(5, 2, 4)), a["h"],
            a["c"], a["w"], changed.get("gates", t(1, 10, 4, 4)), changed.get("cells", t(1, 10, 4)), a["lengths"],
            a["sizes"], *options, True, True, True, True)),
        (ops.recurrent_step, (a["x"], a["h"], a["c"], *[*a["w"], None, None, None, None][:4], a["cell"])),
    ):
        calls += 1
        try:
            op(*rest)
        except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, OverflowError):
            pass
for name, values in choices.items():
    for value in values:
        attempt(**{name: value})
for _ in range(1500):
    names = random.sample(list(choices), random.randint(2, 4))
    attempt(**{n: random.choice(choices[n]) for n in names}, **{n: random.choice(strange[1:]) for n in
            random.sample(["gy", "y", "gates", "cells"], random.randint(0, 2))})
print("survived", calls)
"""


def test_hostile_arguments_cannot_crash_the_interpreter() -> None:
    result = run_python(HOSTILE, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.startswith("survived")
