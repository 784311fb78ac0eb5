"""On a CUDA device work goes to the current stream, and can be captured into a graph. Without one the list is tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from support import needs_cuda
from torch import Tensor

import pyseqnet.functional as F

SLEEP_CYCLES = 20_000_000  # about 10 ms: whoever does not wait for this stream reads inputs too early


@dataclass(frozen=True)
class Call:
    shapes: tuple[tuple[int, ...], ...]
    function: Callable[..., Tensor]

    def inputs(self, device: str, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator).to(device) for shape in self.shapes]

    def step(self, inputs: list[Tensor]) -> list[Tensor]:
        """The output and all gradients."""
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        output = self.function(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))]


def recurrent(cell: str) -> Call:
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[cell]
    features, units = 12, 16
    weights = ((gates * units, features), (gates * units, units), (gates * units,), (gates * units,))

    def run(x: Tensor, *params: Tensor) -> Tensor:
        state = x.new_zeros(1, x.shape[1], units)
        start = (state, state.clone()) if cell == "lstm" else state
        return getattr(F, cell)(x, start, list(params))[0]

    return Call(((7, 3, features), *weights), run)


HEADS = ((2, 2, 40, 16),) * 3
CALLS = {
    "conv2d": Call(((2, 8, 12, 11), (16, 8, 3, 3), (16,)), lambda x, w, b: F.conv2d(x, w, b, padding=1)),
    "depthwise": Call(((2, 8, 12, 11), (8, 1, 3, 3), (8,)), lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=8)),
    "conv2d_relu_max_pool2d": Call(((2, 8, 12, 12), (16, 8, 3, 3), (16,)), F.conv2d_relu_max_pool2d),
    "max_pool2d": Call(((2, 8, 12, 12),), lambda x: F.max_pool2d(x, 3, 2, 1)),
    "lstm": recurrent("lstm"),
    "gru": recurrent("gru"),
    "rnn": recurrent("rnn"),
    "attention": Call(HEADS, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
    "linear_attention": Call(HEADS, lambda q, k, v: F.linear_attention(q, k, v, causal=True)),
    "additive_attention": Call(((2, 5, 8), (2, 9, 8), (2, 9, 6), (8,)), F.additive_attention),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


@every_call
def test_calls_of_the_list_run(call: Call) -> None:
    first, second = call.step(call.inputs("cpu", 0)), call.step(call.inputs("cpu", 1))
    assert all(torch.isfinite(tensor).all() for tensor in first)
    assert not torch.equal(first[0], second[0])  # so that a result of other inputs would be noticed


@pytest.mark.cuda
@needs_cuda
@every_call
def test_work_goes_to_the_current_stream(call: Call) -> None:
    expected = call.step(call.inputs("cuda", 1))
    inputs, real = call.inputs("cuda", 0), call.inputs("cuda", 1)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES)
        for tensor, value in zip(inputs, real, strict=True):
            tensor.copy_(value)
        results = call.step(inputs)
    side.synchronize()
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)  # kernels are deterministic


@pytest.mark.cuda
@needs_cuda
@every_call
def test_a_captured_graph_replays(call: Call) -> None:
    inputs = call.inputs("cuda", 0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call.step(inputs)  # warms up what may not happen during capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call.step(inputs)
    for seed in (1, 2):
        for tensor, value in zip(inputs, call.inputs("cuda", seed), strict=True):
            tensor.copy_(value)
        graph.replay()
        expected = call.step(call.inputs("cuda", seed))
        for result, value in zip(results, expected, strict=True):
            assert torch.equal(result, value)
