"""Positions: the golden numbers, layouts, offsets, and that they are what breaks permutation."""

from __future__ import annotations

import copy
import doctest
import math

import pytest
import torch

from pyseqnet import nn
from pyseqnet.nn import position

GOLDEN = [
    [0, 1, 0, 1],
    [0.841471, 0.540302, 0.010000, 0.999950],
    [0.909297, -0.416147, 0.019999, 0.999800],
    [0.141120, -0.989992, 0.029995, 0.999550],
]
BOTH = pytest.mark.parametrize("kind", ["sinusoidal", "learned"])


def build(kind: str, features: int = 6, max_len: int = 20, **options) -> torch.nn.Module:
    if kind == "sinusoidal":
        return nn.SinusoidalPositions(features, max_len, **options)
    return nn.LearnedPositions(max_len, features, **options)


def test_examples() -> None:
    found = doctest.testmod(position)
    assert found.attempted
    assert not found.failed


def test_golden_numbers() -> None:
    found = nn.SinusoidalPositions(4)(torch.zeros(4, 4))
    torch.testing.assert_close(found, torch.tensor(GOLDEN), rtol=0, atol=1e-6)


@pytest.mark.parametrize("features", [1, 2, 5, 512])
def test_formula(features: int) -> None:
    found = nn.SinusoidalPositions(features, 3, dtype=torch.float64)(torch.zeros(700, features, dtype=torch.float64))
    for p in (0, 1, 2, 3, 699):  # in the table and beyond it
        for i in range(features):
            angle = p / 10000 ** (i // 2 * 2 / features)
            expected = math.cos(angle) if i % 2 else math.sin(angle)
            assert abs(found[p, i].item() - expected) < 1e-10


@BOTH
def test_layouts_and_offsets(device: str, kind: str) -> None:
    time_first, batch_first = (build(kind, batch_first=flag).to(device) for flag in (False, True))
    batch_first.load_state_dict(time_first.state_dict())
    x = torch.randn(3, 7, 6, device=device)
    whole = batch_first(x)
    assert torch.equal(whole, time_first(x.transpose(0, 1)).transpose(0, 1))
    assert torch.equal(whole[1], batch_first(x[1]))
    for t in range(7):
        assert torch.equal(batch_first(x[:, t : t + 1], offset=t)[:, 0], whole[:, t])


def test_sinusoidal_goes_on_beyond_the_table() -> None:
    short, long = nn.SinusoidalPositions(6, 4), nn.SinusoidalPositions(6, 100)
    x = torch.randn(50, 6)
    assert torch.equal(short(x), long(x))
    assert torch.equal(short(x[:5], offset=30), long(x[:5], offset=30))
    assert not short.state_dict()
    assert not list(short.parameters())
    assert nn.SinusoidalPositions(6).half()(torch.zeros(3, 6).half()).dtype == torch.float16


def test_learned_is_an_embedding() -> None:
    positions = nn.LearnedPositions(20, 6)
    table = torch.nn.Embedding(20, 6)
    positions.load_state_dict(table.state_dict())
    x = torch.randn(7, 3, 6)
    assert torch.equal(positions(x, offset=2), x + table(torch.arange(2, 9)).unsqueeze(1))
    positions(x).sum().backward()
    assert torch.equal(positions.weight.grad, torch.where(torch.arange(20) < 7, 3.0, 0.0).unsqueeze(1).expand(20, 6))


@BOTH
def test_dropout_copies_and_compile(kind: str) -> None:
    positions = build(kind, dropout=0.5, batch_first=True)
    x = torch.ones(10, 20, 6)
    assert 0.3 < (positions(x) == 0).double().mean() < 0.7
    positions.eval()
    assert torch.equal(copy.deepcopy(positions)(x), positions(x))
    compiled = torch.compile(positions, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (20, 13):
        torch.testing.assert_close(compiled(x[:, :length]), positions(x[:, :length]))
    torch._dynamo.reset()


@BOTH
def test_positions_break_permutation(kind: str) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    positions = build(kind, batch_first=True)
    x = torch.randn(1, 7, 6)
    order = torch.randperm(7)

    def output(x: torch.Tensor) -> torch.Tensor:
        return attention(x, x, x, need_weights=False)[0]

    torch.testing.assert_close(output(x[:, order]), output(x)[:, order])
    assert (output(positions(x[:, order])) - output(positions(x))[:, order]).abs().max() > 1e-4


@BOTH
def test_bad_arguments(kind: str) -> None:
    positions = build(kind, batch_first=True)
    for shape in ((3, 7, 5), (6,), (1, 1, 3, 6)):
        with pytest.raises(ValueError, match=r"input must be \(B, T, E\) or \(T, E\) with E = 6; got"):
            positions(torch.zeros(shape))
    with pytest.raises(ValueError, match="offset must not be negative; got -1"):
        positions(torch.zeros(3, 6), offset=-1)
    for offset in (1.0, True, "1"):
        with pytest.raises(TypeError, match="offset must be an int, not"):
            positions(torch.zeros(3, 6), offset=offset)
    with pytest.raises(ValueError, match="must be positive"):
        build(kind, 0)


def test_learned_ends_at_max_len() -> None:
    with pytest.raises(ValueError, match="positions 15 to 20 were asked for; max_len is 20"):
        nn.LearnedPositions(20, 6)(torch.zeros(6, 6), offset=15)
    with pytest.raises(ValueError, match="must be positive"):
        nn.LearnedPositions(0, 6)
    with pytest.raises(ValueError, match="max_len must not be negative"):
        nn.SinusoidalPositions(6, -1)
