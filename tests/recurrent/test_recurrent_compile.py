"""torch.compile, torch.export, meta and fake tensors: a compiler sees one node a layer, of known shape."""

from __future__ import annotations

import copy
import io
import shutil

import pytest
import torch
from support import normal
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from pyseqnet import nn

ops = torch.ops.pyseqnet
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs g++")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Net(torch.nn.Module):
    """Every kind of layer and cell once."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 6, 2, bidirectional=True, proj_size=4, dropout=dropout)
        self.gru = nn.GRU(8, 5, batch_first=True)
        self.rnn = nn.RNN(5, 3, nonlinearity="relu", bias=False)
        self.lstm_cell, self.gru_cell, self.rnn_cell = nn.LSTMCell(3, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 2)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, (_, c_n) = self.lstm(x, lengths=lengths)
        y, _ = self.gru(y)
        y, h_n = self.rnn(y)
        h, c = self.lstm_cell(y[0])
        h, c = self.lstm_cell(h_n[0], (h, c))
        h = self.gru_cell(c, h)
        return self.rnn_cell(h, self.rnn_cell(h)), c_n


def results(model: torch.nn.Module, forward, *arguments: Tensor | None) -> list[Tensor]:
    x = arguments[0].clone().requires_grad_()
    found = forward(x, *arguments[1:])
    gradients = torch.autograd.grad(sum(t.square().sum() for t in found), [x, *model.parameters()])
    return [*(t.detach() for t in found), *gradients]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.slow])])
def test_compile_whole_model(device: str, backend: str, dynamic: bool) -> None:
    """Forward and backward; other sizes do not compile again."""
    model = Net().to(device)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic)
    graphs = set()
    # no size is a layer's: equal ones would be one symbol
    for steps, batch in [(7, 11), (13, 17), (19, 23)] if dynamic else [(7, 11)]:
        x, lengths = torch.randn(steps, batch, 3, device=device), torch.randint(1, steps + 1, (batch,))
        assert_same(results(model, compiled, x, lengths), results(model, model, x, lengths))
        graphs.add(counter.frame_count)
    assert len(graphs) == 1
    with torch.no_grad():
        assert_same(compiled(x, lengths), model(x, lengths))


def test_a_compiled_graph_holds_our_operations() -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    layer = nn.LSTM(3, 4, 2, bidirectional=True).requires_grad_(False)
    torch.compile(layer, fullgraph=True, backend=backend)(torch.randn(5, 2, 3))
    assert [name for name in seen if "pyseqnet" in name] == ["pyseqnet.recurrent_forward.default"] * 2


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_compile_other_forms(name: str) -> None:
    """Packed sequences, one sequence, given states, dropout, autocast."""
    layers = 2 if name == "LSTM" else 1
    layer = getattr(nn, name)(3, 4, layers, dropout=0.5 if layers > 1 else 0.0).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, h, c = normal((5, 2, 3), 0, torch.float32), *(normal((layers, 2, 4), k, torch.float32) for k in (1, 2))
    hx = (h, c) if name == "LSTM" else h
    packed = pack_padded_sequence(x, torch.tensor([2, 5]), enforce_sorted=False)

    def found(function, data: object, state: object) -> list[Tensor]:
        y, last = function(data, state)
        y = y.data if isinstance(y, PackedSequence) else y
        return [y, *last] if isinstance(last, tuple) else [y, last]

    for data, state in ((x, hx), (x[:, 0], None), (packed, hx)):
        assert_same(found(compiled, data, state), found(layer, data, state))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = found(compiled, x, hx)
        assert low[0].dtype == (torch.float32 if name == "GRU" else torch.bfloat16)  # as torch's on the CPU
        assert_same(low, found(layer, x, hx), 1e-2)
    if layers > 1:
        layer.train()
        assert not torch.equal(compiled(x, hx)[0], compiled(x, hx)[0])


@pytest.mark.parametrize("strict", [False, True])
def test_export_and_load_again(strict: bool) -> None:
    model = nn.LSTM(3, 4, 2, bidirectional=True).eval()
    sizes = {0: torch.export.Dim("steps", min=2, max=64), 1: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(model, (torch.randn(5, 3, 3),), dynamic_shapes=(sizes,), strict=strict)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    with torch.no_grad():
        for shape in ((5, 3, 3), (8, 6, 3)):
            x = torch.randn(shape)
            assert_same([loaded(x)[0]], [model(x)[0]])


def test_meta_tensors_have_the_right_shapes() -> None:
    model = Net()
    shapes = [t.shape for t in model(torch.randn(4, 3, 3))]
    ghost = copy.deepcopy(model).to("meta")
    found = ghost(torch.empty(4, 3, 3, device="meta"))
    assert [t.shape for t in found] == shapes
    sum(t.sum() for t in found).backward()
    assert all(p.grad.shape == p.shape for p in ghost.parameters())


def test_fake_layouts_are_the_real_ones(device: str) -> None:
    for cell, gates in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1)):
        for batch_first in (False, True):
            x = normal((4, 3, 5), 0, torch.float32).to(device)
            weights = [normal(s, k, torch.float32).to(device) for k, s in enumerate(((gates * 6, 5), (gates * 6, 6)))]
            for reserve in (False, True):
                arguments = (x, None, None, weights, None, None, cell, 1, False, batch_first, reserve)
                real = ops.recurrent_forward(*arguments)
                with FakeTensorMode() as mode:
                    ghosts = [mode.from_tensor(w) for w in weights]
                    fake = ops.recurrent_forward(mode.from_tensor(x), None, None, ghosts, *arguments[4:])
                for a, b in zip(real, fake, strict=True):
                    assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
                    assert a.stride() == b.stride() or a.numel() == 0
