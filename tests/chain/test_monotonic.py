"""Monotonic attention (E25): against sequential sums in float64 and against the process itself."""

from __future__ import annotations

import math

import pytest
import torch
from support import normal
from torch import Tensor

from pyseqnet import chain, nn


def by_definition(p: Tensor) -> Tensor:
    """The double sum of the paper, place by place."""
    outputs, places = p.shape
    previous, rows = [1.0] + [0.0] * (places - 1), []
    for row in p.tolist():
        now = []
        for j in range(places):
            total = sum(previous[k] * math.prod(1 - row[m] for m in range(k, j)) for k in range(j + 1))
            now.append(row[j] * total)
        rows.append(now)
        previous = now
    return torch.tensor(rows, dtype=torch.float64).view(outputs, places)


def chunks_by_definition(alignment: Tensor, energies: Tensor, chunk: int | None) -> Tensor:
    result = torch.zeros_like(alignment)
    for i in range(alignment.shape[0]):
        for k in range(alignment.shape[1]):
            first = 0 if chunk is None else max(k - chunk + 1, 0)
            result[i, first : k + 1] += alignment[i, k] * energies[i, first : k + 1].softmax(0)
    return result


def test_golden() -> None:
    found = chain.monotonic_alignment(torch.full((2, 3), 0.5))
    assert found.tolist() == [[0.5, 0.25, 0.125], [0.25, 0.25, 0.1875]]


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 7), (4, 8), (5, 33), (20, 100)])
def test_expected_alignment_is_the_double_sum(shape: tuple[int, int]) -> None:
    for seed, scale in enumerate((0.5, 3.0, 30.0)):
        p = (scale * normal((2, *shape), seed)).sigmoid()
        found = chain.monotonic_alignment(p)
        for mine, row in zip(found, p, strict=True):
            torch.testing.assert_close(mine, by_definition(row), rtol=1e-12, atol=1e-300)
        single = chain.monotonic_alignment(p.float())
        torch.testing.assert_close(
            single.double(), chain.monotonic_alignment(p.float().double()), rtol=2e-5, atol=1e-30
        )


def test_certain_probabilities_give_the_hard_path() -> None:
    generator = torch.Generator().manual_seed(0)
    p = (torch.rand(50, 6, 9, generator=generator) < 0.3).float()
    assert torch.equal(chain.monotonic_alignment(p), chain.hard_monotonic_alignment(p))
    hard = chain.hard_monotonic_alignment(torch.tensor([[0.2, 0.5, 0.9], [0.9, 0.1, 0.6], [0.1, 0.9, 0.4], [1, 1, 1]]))
    assert hard.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_expectation_is_the_mean_of_the_process() -> None:
    generator = torch.Generator().manual_seed(0)
    p = normal((3, 5), 1, torch.float32).sigmoid()
    draws = (torch.rand(40000, 3, 5, generator=generator) < p).float()
    mean = chain.hard_monotonic_alignment(draws).mean(0)
    assert (mean - chain.monotonic_alignment(p)).abs().max() < 5 * 0.5 / math.sqrt(40000)


def test_gradients_and_empty_sizes() -> None:
    p = normal((2, 3, 6), 0).sigmoid().requires_grad_()
    energies = normal((2, 3, 6), 1).requires_grad_()
    assert torch.autograd.gradcheck(chain.monotonic_alignment, p)
    assert torch.autograd.gradgradcheck(chain.monotonic_alignment, p)
    assert torch.autograd.gradcheck(lambda a, e: chain.chunkwise_alignment(a, e, 3), (p, energies))
    certain = torch.tensor([[0.0, 1, 0, 1], [1, 0, 1, 1]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(chain.monotonic_alignment(certain).square().sum(), certain)
    assert gradient.isfinite().all()
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        empty = torch.zeros(shape)
        for result in (
            chain.monotonic_alignment(empty), chain.hard_monotonic_alignment(empty),
            chain.chunkwise_alignment(empty, empty, 2),
        ):  # fmt: skip
            assert result.shape == shape


@pytest.mark.parametrize("chunk", [1, 2, 5, 12, None])
def test_chunks_are_their_definition(chunk: int | None) -> None:
    alignment, energies = normal((4, 9), 0).softmax(-1), 300 * normal((4, 9), 1)  # one maximum would underflow
    torch.testing.assert_close(
        chain.chunkwise_alignment(alignment, energies, chunk), chunks_by_definition(alignment, energies, chunk)
    )
    if chunk == 1:
        assert torch.equal(chain.chunkwise_alignment(alignment, energies, 1), alignment)


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_layer(chunk: int | None) -> None:
    layer = nn.MonotonicAttention(chunk, noise=0.0)
    energies, values = normal((2, 4, 6), 0, torch.float32), normal((2, 6, 3), 1, torch.float32)
    mask = torch.tensor([[[1, 1, 1, 1, 0, 0]], [[1, 1, 1, 1, 1, 1]]]).bool()
    context, weights = layer(energies, values, mask=mask)
    assert context.shape == (2, 4, 3)
    assert not weights[0, :, 4:].any()
    short = layer(energies[:1, :, :4], values[:1, :4])[0]
    torch.testing.assert_close(context[:1], short)
    hard = layer.eval()(energies, values, mask=mask)[1]
    assert (hard.sum(-1).round(decimals=5) % 1 == 0).all()
    noisy = nn.MonotonicAttention(chunk, noise=1.0)
    torch.manual_seed(0)
    assert not torch.equal(noisy(energies, values)[1], noisy(energies, values)[1])
    assert torch.equal(noisy.eval()(energies, values)[1], layer(energies, values)[1])


def test_bad_input() -> None:
    for chunk in (0, -2):
        with pytest.raises(ValueError, match="chunk must be positive"):
            nn.MonotonicAttention(chunk)
        with pytest.raises(ValueError, match="chunk must be positive"):
            chain.chunkwise_alignment(torch.zeros(2, 3), torch.zeros(2, 3), chunk)
    with pytest.raises(ValueError, match=r"p must be \(..., I, J\), got \(3,\)"):
        chain.monotonic_alignment(torch.zeros(3))
    with pytest.raises(TypeError, match=r"p must be floating-point, got torch\.int64"):
        chain.hard_monotonic_alignment(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="energies must have the alignment's shape"):
        chain.chunkwise_alignment(torch.zeros(2, 3), torch.zeros(2, 4), 2)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, None])
def test_nan_behind_the_end_does_not_leak(chunk: int | None, training: bool) -> None:
    layer = nn.MonotonicAttention(chunk, noise=0.0).train(training)
    energies, values, soft = torch.randn(2, 4, 6), torch.randn(2, 6, 3), torch.randn(2, 4, 6)
    lengths = torch.tensor([6, 4])
    mask = (torch.arange(6) < lengths[:, None])[:, None, :]

    def results(filler: float) -> list[torch.Tensor]:
        leaves = [energies.clone(), values.clone(), soft.clone()]
        for leaf, index in zip(leaves, ((1, slice(None), slice(4, 6)), (1, slice(4, 6)), (1, slice(None), slice(4, 6))),
                               strict=True):  # fmt: skip
            leaf[index] = filler
        leaves = [leaf.requires_grad_() for leaf in leaves]
        context, weights = layer(leaves[0], leaves[1], leaves[2], mask)
        grads = torch.autograd.grad(context.square().sum(), leaves, allow_unused=True)
        return [context, weights, *(torch.zeros(1) if grad is None else grad for grad in grads)]

    for a, b in zip(results(float("nan")), results(0.5), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert not a.isnan().any()
