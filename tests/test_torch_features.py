"""What torch offers around its own functions and layers works around every one of ours, too."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from catalog import ATTENDED, ELSEWHERE, FUNCTIONS, HELD, LAYERS, Function, Layer, flat, floating
from support import normal, run_python, threads
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import pyseqnet.functional as F
from pyseqnet import nn

DIFFERENTIABLE = [f for f in FUNCTIONS if f.differentiable]
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.name)
every_differentiable = pytest.mark.parametrize("function", DIFFERENTIABLE, ids=lambda f: f.name)
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
every_twin = pytest.mark.parametrize(
    "layer", [entry for entry in LAYERS if entry.twin() is not None], ids=lambda layer: layer.name
)
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:LSTM with projections")


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def gradients(run: Callable[..., list[Tensor]], inputs: list[Tensor], *more: Tensor) -> list[Tensor]:
    """Outputs, and the gradients of inputs and `more`."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = run(*leaves)
    loss = sum(y.float().square().sum() for y in outputs if y.requires_grad)
    for tensor in more:
        tensor.grad = None
    loss.backward()  # not grad(), which checkpointing in its old way refuses
    return [*(y.detach() for y in outputs), *(t.grad for t in (*leaves, *more) if t.grad is not None)]


def test_the_catalogue_is_complete() -> None:
    assert {f.name for f in FUNCTIONS} == {name for name in F.__all__ if not name.endswith("_reference")}
    here = {name for name in nn.__all__ if not getattr(nn, name).__module__.startswith(ELSEWHERE)}
    assert {layer.name for layer in LAYERS} | HELD == here


@every_function
def test_a_function_is_its_reference(function: Function) -> None:
    """So that what is compared below is right to begin with."""
    assert_close(function.run(*function.inputs()), function.reference(*function.inputs()))


@every_twin
def test_a_layer_is_its_twin(layer: Layer) -> None:
    ours, theirs = layer.build(), layer.twin()
    found, expected = (gradients(lambda *x, m=m: layer.run(m, *x), layer.inputs()) for m in (ours, theirs))
    assert_close(found, expected)


# --- compilers ---------------------------------------------------------------------------------------------------


class Run(torch.nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.function.run(*tensors))


class Apply(torch.nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer, self.module = layer, layer.build()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.layer.run(self.module, *tensors))


LOADER = """
import sys, torch, pyseqnet
from pathlib import Path
for file in sorted(Path(sys.argv[1]).glob("*.pt2")):
    program = torch.export.load(file).module()
    inputs, expected = torch.load(file.with_suffix(".pt"))
    found = program(*inputs)
    assert len(found) == len(expected), file.stem
    same = torch.allclose if "FNet" in file.stem else torch.equal  # torch's FFT rounds by where its memory lies
    assert all(same(a, b) for a, b in zip(found, expected)), file.stem
    print(file.stem)
"""


def test_exported_programs_run_in_another_process(tmp_path: Path) -> None:
    # Decoding gives lists of Python integers, and loops over the values of a mask.
    programs = [Run(f) for f in FUNCTIONS if f.name != "crf_decode"] + [Apply(entry) for entry in LAYERS]
    names = []
    for program in programs:
        case = program.function if isinstance(program, Run) else program.layer
        inputs = case.inputs()
        names.append(f"{type(program).__name__} {case.name}")
        with torch.no_grad():
            exported = torch.export.export(program.eval(), tuple(inputs), strict=False)
            torch.save((inputs, program(*inputs)), tmp_path / f"{names[-1]}.pt")
        torch.export.save(exported, tmp_path / f"{names[-1]}.pt2")
    code = f"import sys; sys.argv = ['', {str(tmp_path)!r}]\n{LOADER}"
    result = run_python(code)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split("\n")[:-1] == sorted(names)


@every_function
def test_meta_tensors_have_the_shapes_of_real_ones(function: Function) -> None:
    if function.name == "crf_decode":
        pytest.skip("its lists are made of values")
    real = function.run(*function.inputs())
    ghosts = function.run(*(x.to("meta") for x in function.inputs()))
    assert [(y.shape, y.dtype, y.stride()) for y in real] == [(y.shape, y.dtype, y.stride()) for y in ghosts]
    assert all(y.is_meta for y in ghosts)


@every_layer
def test_layers_on_meta(layer: Layer) -> None:
    """As large models are built: on meta, then given memory."""
    if layer.name == "GraphAttention":
        pytest.skip("its pattern is made of the values of edges")
    module = layer.build()
    ghost = copy.deepcopy(module).to("meta")
    shapes = [y.shape for y in layer.run(module, *layer.inputs())]
    assert [y.shape for y in layer.run(ghost, *(x.to("meta") for x in layer.inputs()))] == shapes
    ghost.to_empty(device="cpu").load_state_dict(module.state_dict())
    for name, buffer in module.named_buffers():  # what no state_dict holds
        ghost.get_buffer(name).copy_(buffer)
    assert_equal(layer.run(ghost, *layer.inputs()), layer.run(module, *layer.inputs()))


# --- autocast ----------------------------------------------------------------------------------------------------


def _torch_additive(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Any:
    weights = (torch.tanh(q[:, :, None] + k[:, None]) @ w).softmax(-1)
    return weights.to(q.dtype) @ v


AUTOCAST: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple]] = {
    "conv1d": (F.conv1d, torch.conv1d, ((2, 4, 9), (6, 4, 3), (6,))),
    "conv2d": (F.conv2d, torch.conv2d, ((2, 4, 9, 8), (6, 4, 3, 3), (6,))),
    "conv2d_relu": (
        F.conv2d_relu, lambda *t: torch.conv2d(*t).relu(), ((2, 4, 9, 8), (6, 4, 3, 3), (6,)),
    ),
    "conv2d_relu_max_pool2d": (
        F.conv2d_relu_max_pool2d, lambda *t: torch.max_pool2d(torch.conv2d(*t).relu(), 2),
        ((2, 4, 9, 8), (6, 4, 3, 3), (6,)),
    ),
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), lambda x: torch.max_pool1d(x, 2), ((2, 4, 9),)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), lambda x: torch.max_pool2d(x, 2), ((2, 4, 9, 8),)),
    "scaled_dot_product_attention": (
        F.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention, ATTENDED,
    ),
    "additive_attention": (F.additive_attention, _torch_additive, ((2, 9, 8), (2, 7, 8), (2, 7, 6), (8,))),
    "linear_attention": (
        lambda q, k, v: F.linear_attention(q, k, v, feature_map="identity", normalize=False),
        lambda q, k, v: q @ (k.transpose(-1, -2) @ v), ATTENDED,
    ),
    "ctc_loss": (
        lambda x: F.ctc_loss(x.log_softmax(-1), torch.ones(3, 2).long(), (6,) * 3, (2,) * 3),
        lambda x: torch.nn.functional.ctc_loss(x.log_softmax(-1), torch.ones(3, 2).long(), (6,) * 3, (2,) * 3),
        ((6, 3, 4),),
    ),
    "lstm_cell": (
        lambda x, h, c, *p: F.lstm_cell(x, (h, c), *p), lambda x, h, c, *p: torch.lstm_cell(x, (h, c), *p),
        ((3, 5), (3, 4), (3, 4), (16, 5), (16, 4), (16,), (16,)),
    ),
    "gru_cell": (F.gru_cell, torch.gru_cell, ((3, 5), (3, 4), (12, 5), (12, 4), (12,), (12,))),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_has_torchs_policy(name: str, dtype: torch.dtype) -> None:
    ours, theirs, shapes = AUTOCAST[name]
    inputs = [normal(shape, k, dtype) for k, shape in enumerate(shapes)]
    found: list[list[Tensor]] = []
    for function in (ours, theirs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            leaves = [x.clone().requires_grad_() for x in inputs]
            outputs = floating(function(*leaves))
        grads = torch.autograd.grad(sum(y.double().square().sum() for y in outputs), leaves)
        found.append([*outputs, *grads])
    assert [y.dtype for y in found[0]] == [y.dtype for y in found[1]]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2 * max(1.0, b.abs().max().item()))


@every_twin
def test_layers_under_autocast(layer: Layer) -> None:
    ours, theirs = layer.build(), layer.twin()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (
            gradients(lambda *x, m=m: layer.run(m, *x), layer.inputs(), *m.parameters()) for m in (ours, theirs)
        )
    assert [y.dtype for y in found] == [y.dtype for y in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2 * max(1.0, b.abs().max().item()))


# --- autograd ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@every_differentiable
def test_checkpointing(function: Function, reentrant: bool) -> None:
    def again(*tensors: Tensor) -> list[Tensor]:
        return flat(checkpoint(lambda *t: tuple(function.run(*t)), *tensors, use_reentrant=reentrant))

    # Without gradients a step takes a kernel of its own.
    assert_close(gradients(again, function.inputs()), gradients(function.run, function.inputs()), 1e-6)


@every_function
def test_inference_mode(function: Function) -> None:
    expected = function.run(*function.inputs())
    with torch.inference_mode():
        found = function.run(*function.inputs())
        assert all(y.is_inference() for y in found)
    assert_equal(found, expected)


# --- layers ------------------------------------------------------------------------------------------------------


@every_layer
def test_copies_pickles_and_state_dicts(layer: Layer) -> None:
    module = layer.build()
    expected = layer.run(module, *layer.inputs())
    whole, values = io.BytesIO(), io.BytesIO()
    torch.save(module, whole)
    torch.save(module.state_dict(), values)
    whole.seek(0)
    values.seek(0)
    fresh = layer.build()
    for parameter in fresh.parameters():
        torch.nn.init.normal_(parameter)
    fresh.load_state_dict(torch.load(values, weights_only=True), strict=True)
    again = pickle.loads(pickle.dumps(module))
    for other in (copy.deepcopy(module), again, torch.load(whole, weights_only=False), fresh):
        assert type(other) is type(module)
        assert repr(other) == repr(module)
        assert_equal(layer.run(other, *layer.inputs()), expected)


@every_twin
def test_state_dicts_go_both_ways(layer: Layer) -> None:
    ours, theirs = layer.build(), layer.twin()
    for source, target in ((ours, theirs), (theirs, ours)):
        for parameter in source.parameters():
            torch.nn.init.normal_(parameter, 0, 0.2)
        target.load_state_dict(source.state_dict(), strict=True)
        assert_close(layer.run(target, *layer.inputs()), layer.run(source, *layer.inputs()))


def doubled(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: 2 * value.detach() for name, value in module.named_parameters()}


@every_layer
def test_functional_call(layer: Layer) -> None:
    """With other values, and gradients to them; the layer keeps its own."""
    module = layer.build()
    before = layer.run(module, *layer.inputs())
    values = {name: value.requires_grad_() for name, value in doubled(module).items()}

    def run(*tensors: Tensor) -> list[Tensor]:
        class Holder(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = module

            def forward(self) -> list[Tensor]:
                return layer.run(self.inner, *tensors)

        return torch.func.functional_call(Holder(), {f"inner.{name}": v for name, v in values.items()}, ())

    twin = layer.build()
    twin.load_state_dict({**twin.state_dict(), **doubled(module)})
    found = gradients(run, layer.inputs(), *values.values())
    assert_equal(found, gradients(lambda *t: layer.run(twin, *t), layer.inputs(), *twin.parameters()))
    assert_equal(layer.run(module, *layer.inputs()), before)


class Twice(torch.nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * value


@every_layer
def test_parametrizations(layer: Layer) -> None:
    module, twin = layer.build(), layer.build()
    twin.load_state_dict({**twin.state_dict(), **doubled(module)})
    for name, _ in list(module.named_parameters()):
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if not parametrize.is_parametrized(owner, leaf):
            parametrize.register_parametrization(owner, leaf, Twice())
    names = {name for name, _ in twin.named_parameters()}
    assert not names or parametrize.is_parametrized(module) or any(map(parametrize.is_parametrized, module.modules()))
    other = copy.deepcopy(module)  # before a call: afterwards torch's RNN cannot be copied, either
    assert_equal(layer.run(module, *layer.inputs()), layer.run(twin, *layer.inputs()))
    assert_equal(layer.run(other, *layer.inputs()), layer.run(twin, *layer.inputs()))


# --- processes and threads ---------------------------------------------------------------------------------------


class Calls(Dataset):
    def __len__(self) -> int:
        return len(FUNCTIONS)

    def __getitem__(self, index: int) -> list[Tensor]:
        function = FUNCTIONS[index]
        return (
            gradients(function.run, function.inputs()) if function.differentiable else function.run(*function.inputs())
        )


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_workers_of_a_data_loader(how: str) -> None:
    with threads(2):  # so that this process has a pool of threads, which a fork does not inherit
        for function in FUNCTIONS:
            function.run(*function.inputs())
        expected = [Calls()[index] for index in range(len(FUNCTIONS))]
        loader = DataLoader(Calls(), batch_size=None, num_workers=2, multiprocessing_context=how, timeout=120)
        for found, wanted in zip(loader, expected, strict=True):
            assert_equal(found, wanted)


def test_several_python_threads_at_once() -> None:
    expected = [Calls()[index] for index in range(len(FUNCTIONS))]
    faults: list[str] = []

    def work(start: int) -> None:
        for step in range(3 * len(FUNCTIONS)):
            index = (start + step) % len(FUNCTIONS)
            try:
                assert_equal(Calls()[index], expected[index])
            except Exception as error:
                faults.append(f"{FUNCTIONS[index].name}: {error!r}")

    with threads(2):
        workers = [threading.Thread(target=work, args=(7 * k,)) for k in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not faults


@every_function
def test_any_number_of_threads(function: Function) -> None:
    results = []
    for count in (1, 2, 5, 3):
        with threads(count):
            assert torch.get_num_threads() == count
            results.append(Calls()[FUNCTIONS.index(function)])
    for found in results[1:]:
        assert_equal(found, results[0])
