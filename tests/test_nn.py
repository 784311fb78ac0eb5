"""The layers are drop-ins: constructors, state_dict, repr, pickles, padding modes and errors of torch's."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from support import normal, run_python, view_as
from torch import Tensor

from pyseqnet import nn

LAYERS = {
    "Conv1d": [
        ((3, 6, 3), {}), ((3, 6, 3), {"bias": False}), ((4, 6, 3, 2, 1, 2, 2), {}), ((3, 6, 3), {"padding": "same"}),
        ((3, 3, 4), {"groups": 3, "padding": "valid", "dtype": torch.float64}),
    ],
    "Conv2d": [
        ((3, 6, 3), {}), ((3, 6, (3, 1)), {"bias": False}), ((4, 6, 3, (2, 1), (1, 0), 2, 2), {}),
        ((3, 6, (2, 4)), {"padding": "same"}), ((3, 3, 5), {"groups": 3, "padding": 2}),
    ],
    "MaxPool1d": [((3,), {}), ((3, 2, 1), {}), ((2,), {"dilation": 2, "ceil_mode": True, "return_indices": True})],
    "MaxPool2d": [
        ((3,), {}), (((3, 2), (2, 1), 1), {}), ((2,), {"dilation": (2, 1), "ceil_mode": True, "return_indices": True}),
    ],
}  # fmt: skip
CASES = [
    pytest.param(name, args, options, id=f"{name}-{args}-{options}")
    for name, cases in LAYERS.items()
    for args, options in cases
]


def twins(name: str, args: tuple, options: dict) -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    ours = getattr(nn, name)(*args, **options)
    torch.manual_seed(0)
    return ours, getattr(torch.nn, name)(*args, **options)


def input_of(layer: torch.nn.Module) -> Tensor:
    channels = getattr(layer, "in_channels", 3)
    dtype = next(layer.parameters()).dtype if list(layer.parameters()) else torch.float32
    return normal((2, channels, *(13, 14)[: 1 if "1d" in type(layer).__name__ else 2]), 0, dtype)


def outputs(layer: torch.nn.Module, x: Tensor) -> list[Tensor]:
    y = layer(x)
    return list(y) if isinstance(y, tuple) else [y]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("name", "args", "options"), CASES)
def test_layer_is_its_twin(name: str, args: tuple, options: dict) -> None:
    ours, theirs = twins(name, args, options)
    assert isinstance(ours, getattr(torch.nn, name))
    assert inspect.signature(type(ours).__init__) == inspect.signature(type(theirs).__init__)
    assert repr(ours) == repr(theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)  # the same initialisation from the same seed
    x = input_of(ours)
    assert_same(outputs(ours, x), outputs(theirs, x))
    assert_same(outputs(ours, x[0]), outputs(theirs, x[0]))


@pytest.mark.parametrize(("name", "args", "options"), CASES)
def test_state_dict_goes_both_ways(name: str, args: tuple, options: dict) -> None:
    ours, theirs = twins(name, args, options)
    x = input_of(ours)
    for source, target in ((ours, theirs), (theirs, ours)):
        for parameter in source.parameters():
            torch.nn.init.normal_(parameter)
        buffer = io.BytesIO()
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        target.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
        assert_same(outputs(ours, x), outputs(theirs, x))


@pytest.mark.parametrize(("name", "args", "options"), CASES)
def test_copies_and_pickles(name: str, args: tuple, options: dict) -> None:
    ours, _ = twins(name, args, options)
    x = input_of(ours)
    whole = io.BytesIO()
    torch.save(ours, whole)
    whole.seek(0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(whole, weights_only=False)):
        assert type(other) is type(ours)
        assert repr(other) == repr(ours)
        assert_same(outputs(other, x), outputs(ours, x))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(1, 2), "same", 2])
@pytest.mark.parametrize("name", ["Conv1d", "Conv2d"])
def test_padding_modes(device: str, name: str, padding: object, mode: str) -> None:
    if name == "Conv1d" and isinstance(padding, tuple):
        padding = padding[:1]
    ours, theirs = (layer.to(device) for layer in twins(name, (4, 6, 3), {"padding": padding, "padding_mode": mode}))
    x = input_of(ours).to(device).requires_grad_()
    assert_same(outputs(ours, x), outputs(theirs, x))
    a, b = (torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()]) for layer in (ours, theirs))
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "args", "options"),
    [
        ("Conv2d", (3, 6, 3), {"groups": 2}),
        ("Conv2d", (4, 5, 3), {"groups": 2}),
        ("Conv2d", (4, 4, 3), {"groups": 0}),
        ("Conv2d", (4, 4, 3), {"padding": "reflect"}),
        ("Conv2d", (4, 4, 3), {"padding": "same", "stride": 2}),
        ("Conv2d", (4, 4, 3), {"padding_mode": "mirror"}),
        ("Conv1d", (4, 4, 3), {"padding_mode": "mirror"}),
        ("Conv1d", (4,), {}),
        ("MaxPool1d", (), {}),
        ("MaxPool2d", (2,), {"size": 3}),
    ],
)
def test_constructors_refuse_as_torch_does(name: str, args: tuple, options: dict) -> None:
    found = []
    for namespace in (nn, torch.nn):
        with pytest.raises((ValueError, TypeError)) as caught:
            getattr(namespace, name)(*args, **options)
        found.append((caught.type, str(caught.value)))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "args", "shape"),
    [
        ("Conv2d", (3, 6, 3), (2, 4, 8, 8)),
        ("Conv2d", (3, 6, 3), (2, 3, 8)),
        ("Conv2d", (3, 6, 9), (2, 3, 8, 8)),
        ("Conv2d", (3, 6, 3), (8, 8)),
        ("Conv1d", (3, 6, 3), (2, 4, 8)),
        ("Conv1d", (3, 6, 3), (2, 3, 8, 8)),
        ("MaxPool2d", (3, 1, 2), (2, 3, 8, 8)),
        ("MaxPool2d", (9,), (2, 3, 8, 8)),
        ("MaxPool2d", (2,), (8, 8)),
        ("MaxPool1d", (9,), (2, 3, 8)),
        ("MaxPool1d", (2,), (2, 2, 2, 8)),
    ],
)
def test_calls_refuse_as_torch_does(name: str, args: tuple, shape: tuple[int, ...]) -> None:
    found = []
    for layer in twins(name, args, {}):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            layer(torch.zeros(shape))
        found.append((caught.type, str(caught.value)))
    assert found[0] == found[1]


def test_channels_last_models(device: str) -> None:
    layers = [torch.nn.Sequential(*pair) for pair in zip(
        twins("Conv2d", (8, 16, 3), {"padding": 1}), twins("MaxPool2d", (2,), {}), strict=True
    )]  # fmt: skip
    results = []
    for model in layers:
        model = model.to(device, memory_format=torch.channels_last)
        x = view_as(normal((2, 8, 10, 10), 0, torch.float32), "channels_last").to(device).requires_grad_()
        y = model(x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_replacing_torchs_classes_does_not_recurse() -> None:
    """torch.nn.Conv2d = pyseqnet.nn.Conv2d, as a converter or an impatient user does it."""
    result = run_python(
        "import torch, pyseqnet.nn\n"
        "for name in ('Conv1d', 'Conv2d', 'MaxPool1d', 'MaxPool2d'):\n"
        "    setattr(torch.nn, name, getattr(pyseqnet.nn, name))\n"
        "import pyseqnet.functional as F\n"
        "torch.nn.functional.conv2d = torch.conv2d = F.conv2d\n"
        "torch.nn.functional.max_pool2d = F.max_pool2d\n"
        "conv = torch.nn.Conv2d(1, 2, 3, padding_mode='reflect', padding=1)\n"
        "net = torch.nn.Sequential(conv, torch.nn.MaxPool2d(2))\n"
        "x = torch.randn(1, 1, 8, 8, requires_grad=True)\n"
        "(g,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)\n"
        "g.square().sum().backward()\n"
        "print(type(net[0]).__module__, tuple(net(x).shape))\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "pyseqnet.nn.conv (1, 2, 4, 4)"
