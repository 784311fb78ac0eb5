"""torch.compile, torch.export, meta and fake tensors: a compiler sees one node of known shape and strides."""

from __future__ import annotations

import copy
import io
import shutil

import pytest
import torch
from support import VIEWS, normal, view_as
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pyseqnet.functional as F
from pyseqnet import nn

ops = torch.ops.pyseqnet
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs g++")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Net(torch.nn.Module):
    """Every kind of call once: groups, 'same', overlapping windows, one and two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.image = torch.nn.Sequential(
            nn.Conv2d(2, 6, 3, padding="same", groups=2),
            torch.nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(6, 4, (1, 3)),
        )
        self.line = torch.nn.Sequential(nn.Conv1d(4, 5, 3, 2, 1), torch.nn.Tanh(), nn.MaxPool1d(2, ceil_mode=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.line(self.image(x).mean(2))


def gradients(model: torch.nn.Module, forward, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = forward(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.slow])])
def test_compile_whole_model(device: str, backend: str, dynamic: bool) -> None:
    if device == "cuda" and backend == "inductor" and dynamic and torch.__version__.startswith("2.11."):
        pytest.skip("torch 2.11's inductor raises an AssertionError (tiling_utils) on torch's own layers, too")
    model = Net().to(device)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    for shape in [(2, 2, 12, 14), (3, 2, 17, 13)] if dynamic else [(2, 2, 12, 14)]:
        x = torch.randn(shape, device=device)
        assert_same(gradients(model, compiled, x), gradients(model, model, x))
    with torch.no_grad():
        assert_same([compiled(x)], [model(x)])


def test_dynamic_shapes_do_not_recompile() -> None:
    model = Net()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for size in (12, 15, 18, 23):
        compiled(torch.randn(2, 2, size, size + 1)).sum().backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["channels_last", "narrowed", "transposed", "expanded"])
def test_compile_inputs_with_other_strides(kind: str) -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return F.max_pool2d(F.conv2d(x, w, padding=1), 2)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, w = view_as(normal((2, 3, 8, 8), 0), kind), normal((4, 3, 3, 3), 1)
    found, expected = compiled(x, w), function(x, w)
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()


def test_compile_returns_indices() -> None:
    compiled = torch.compile(
        lambda x: F.max_pool2d(x, 2, return_indices=True), fullgraph=True, backend="aot_eager", dynamic=True
    )
    x = normal((1, 2, 6, 7), 0).requires_grad_()
    for a, b in zip(compiled(x), F.max_pool2d(x, 2, return_indices=True), strict=True):
        assert torch.equal(a, b)


def test_a_compiled_graph_holds_our_operations() -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    w = normal((4, 3, 3, 3), 1, torch.float32)
    torch.compile(lambda x: F.max_pool2d(F.conv2d(x, w), 2), fullgraph=True, backend=backend)(torch.randn(1, 3, 8, 8))
    assert [name for name in seen if "pyseqnet" in name] == [
        "pyseqnet.conv_forward.default", "pyseqnet.max_pool_forward.default",
    ]  # fmt: skip


def test_compile_under_autocast() -> None:
    model = Net()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 2, 12, 14)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = compiled(x), model(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("strict", [False, True])
def test_export_and_load_again(strict: bool) -> None:
    model = Net().eval()
    x = torch.randn(2, 2, 12, 14)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    more = torch.randn(5, 2, 12, 14)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))
        torch.testing.assert_close(loaded(more), model(more))


def test_meta_tensors_have_the_right_shapes() -> None:
    model = Net()
    shape = model(torch.randn(3, 2, 20, 22)).shape
    ghost = copy.deepcopy(model).to("meta")
    y = ghost(torch.empty(3, 2, 20, 22, device="meta"))
    assert y.shape == shape
    assert y.device.type == "meta"
    y.sum().backward()
    assert all(p.grad.shape == p.shape for p in ghost.parameters())


def assert_same_layout(operation, arguments: tuple) -> None:
    """A fake call promises the shape, strides and dtype of the real one."""
    real = operation(*arguments)
    with FakeTensorMode() as mode:
        ghosts = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
        fake = operation(*ghosts)
    pairs = zip(real, fake, strict=True) if isinstance(real, (tuple, list)) else [(real, fake)]
    for a, b in pairs:
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert a.stride() == b.stride() or a.numel() == 0
        assert a.device == b.device


SHAPES = [
    (2, 4, 6, 5),
    (1, 4, 6, 5),
    (2, 1, 6, 5),
    (2, 4, 1, 5),
    (2, 4, 6, 1),
    (1, 1, 1, 1),
    (0, 4, 6, 5),
    (1, 4, 1, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", VIEWS)
def test_fake_strides_are_the_real_ones(device: str, kind: str, shape: tuple[int, ...]) -> None:
    x = view_as(normal(shape, 0, torch.float32), kind).to(device)
    for w_kind in ("contiguous", "channels_last"):
        w = view_as(normal((6, shape[1], 3, 3), 1, torch.float32), w_kind).to(device)
        geometry = (1, 1, 1, 1, 1, 1, 1, 1, 1)
        assert_same_layout(ops.conv_forward, (x, w, None, *geometry))
        y = ops.conv_forward(x, w, None, *geometry)
        for gy in (y, y.new_ones(()).expand(y.shape), view_as(y, "channels_last")):
            for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
                assert_same_layout(ops.conv_backward, (gy, x, w, *geometry, *needs))
    pool = (3, 3, 2, 2, 1, 1, 1, 1, False)
    for with_arg in (True, False):
        assert_same_layout(ops.max_pool_forward, (x, *pool, with_arg))
    y, arg = ops.max_pool_forward(x, *pool, True)
    for gy in (y, y.new_ones(()).expand(y.shape)):
        assert_same_layout(ops.max_pool_backward, (gy, arg, *shape[2:], *pool))
    assert_same_layout(ops.max_pool_indices, (arg, *shape[2:], *pool))
