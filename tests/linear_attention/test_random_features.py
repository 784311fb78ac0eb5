"""Random feature maps: unbiased, their error, their projections, inside linear attention."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from support import normal
from torch import Tensor

import pyseqnet.functional as F
import pyseqnet.nn as nn

D = 8
MAPS = {
    "positive": (nn.PositiveRandomFeatures, {}, lambda x, y: (x * y).sum(-1).exp()),
    "fourier": (nn.RandomFourierFeatures, {}, lambda x, y: (-(x - y).square().sum(-1) / 2).exp()),
    "trigonometric": (nn.RandomFourierFeatures, {"kernel": "softmax"}, lambda x, y: (x * y).sum(-1).exp()),
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def estimates(name: str, x: Tensor, y: Tensor, features: int, draws: int, orthogonal: bool) -> Tensor:
    """(draws, pairs) of the product of features of x and y."""
    kind, options, _ = MAPS[name]
    state = generator(0)
    phi = kind.draw(D, features, orthogonal=orthogonal, generator=state, scale=1, dtype=torch.float64, **options)
    found = []
    for _ in range(draws):
        found.append((phi(x) * phi(y)).sum(-1))
        phi.redraw(state)
    return torch.stack(found)


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_estimates_are_unbiased(name: str, orthogonal: bool) -> None:
    x, y = normal((6, D), 1) * 0.2, normal((6, D), 2) * 0.2
    found = estimates(name, x, y, 16, 4000, orthogonal)
    exact = MAPS[name][2](x, y)
    standard_error = found.std(0) / math.sqrt(4000)
    assert ((found.mean(0) - exact).abs() <= 5 * standard_error).all()
    assert (standard_error < 0.1 * exact).all()  # the test would see a bias of half the value


@pytest.mark.parametrize("name", MAPS)
def test_errors_fall_with_the_root_of_the_number_of_features(name: str) -> None:
    x, y = normal((6, D), 1) * 0.2, normal((6, D), 2) * 0.2
    deviation = [estimates(name, x, y, m, 800, False).std(0).mean().item() for m in (16, 64, 256)]
    for more, fewer in itertools.pairwise(deviation):
        assert 1.7 < more / fewer < 2.35  # 2, for four times as many


def test_orthogonal_rows_lower_the_variance() -> None:
    x, y = normal((6, D), 1) * 0.2, normal((6, D), 2) * 0.2
    for name in MAPS:
        spread = [estimates(name, x, y, D, 3000, orthogonal).var(0).mean() for orthogonal in (True, False)]
        assert spread[0] < spread[1], name


def test_projections() -> None:
    rows = nn.random_projection(20, D, generator=generator(1), dtype=torch.float64)
    assert rows.shape == (20, D)
    unit = rows / rows.norm(dim=1, keepdim=True)
    for block in unit.split(D):
        torch.testing.assert_close(block @ block.T, torch.eye(len(block), dtype=torch.float64))
    lengths = nn.random_projection(4096, D, generator=generator(2)).square().sum(1)
    assert abs(lengths.mean() - D) < 5 * math.sqrt(2 * D / 4096)  # chi squared, as those of normal vectors
    plain = nn.random_projection(4096, D, orthogonal=False, generator=generator(3))
    torch.testing.assert_close(plain.T @ plain / 4096, torch.eye(D), atol=0.12, rtol=0)
    assert torch.equal(plain, nn.random_projection(4096, D, orthogonal=False, generator=generator(3)))
    with pytest.raises(ValueError, match="positive, got 0 and 8"):
        nn.random_projection(0, D)


def test_redraw_and_copies() -> None:
    phi = nn.PositiveRandomFeatures.draw(D, 12, heads=3, generator=generator(5))
    assert phi.projection.shape == (3, 12, D)
    assert "projection" in phi.state_dict()
    assert not list(phi.parameters())
    before = phi.projection.clone()
    for other in (copy.deepcopy(phi), pickle.loads(pickle.dumps(phi))):
        assert torch.equal(other.projection, before)
    assert phi.redraw(generator(6)) is phi
    assert (phi.projection != before).all()
    assert repr(phi) == "PositiveRandomFeatures(head_dim=8, num_features=12, orthogonal=True, heads=3)"
    for projection in (torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(0, 4)):
        with pytest.raises(ValueError, match="projection must be"):
            nn.PositiveRandomFeatures(projection)
    with pytest.raises(ValueError, match="kernel must be"):
        nn.RandomFourierFeatures(torch.zeros(2, 3), kernel="cauchy")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inside_linear_attention(device: str, name: str, causal: bool, dtype: torch.dtype) -> None:
    kind, options, _ = MAPS[name]
    phi = kind.draw(D, 12, heads=3, generator=generator(7), dtype=torch.float64, **options).to(device)
    q, k, v = (normal((2, 3, 70, D), i, dtype).to(device).requires_grad_() for i in range(3))
    out = F.linear_attention(q, k, v, feature_map=phi, causal=causal, eps=0.1, normalize=name == "positive")
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    scores = phi(wide[0]) @ phi(wide[1]).transpose(2, 3)
    scores = scores.tril() if causal else scores
    wanted = scores @ wide[2]
    wanted = wanted / (scores.sum(3, keepdim=True) + 0.1) if name == "positive" else wanted
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 6e-2}[dtype]
    assert (out - wanted).abs().max() <= tolerance * wanted.abs().max()
    g = normal(tuple(out.shape), 9, dtype).to(device)
    found, exact = torch.autograd.grad(out, (q, k, v), g), torch.autograd.grad(wanted, wide, g.double())
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_the_kernel_takes_the_exponent_of_positive_features(device: str) -> None:
    """float32 hands the kernel the exponents: nothing but (B, H, L, m) of them is kept for backward."""
    phi = nn.PositiveRandomFeatures.draw(D, 12, generator=generator(8)).to(device)
    called = []
    phi.register_forward_hook(lambda *_: called.append(1))
    x = normal((1, 2, 9, D), 0, torch.float32).to(device)
    out = F.linear_attention(x, x, x, feature_map=phi)
    assert not called
    torch.testing.assert_close(out, F.linear_attention(x, x, x, feature_map=lambda t: phi(t)))
    assert called


def test_performer_approaches_softmax_attention() -> None:
    """P11's direction: the more features, the nearer to softmax attention."""
    q, k, v = (normal((1, 1, 64, D), i) * 0.5 for i in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    errors = []
    for m in (16, 256, 4096):
        phi = nn.PositiveRandomFeatures.draw(D, m, generator=generator(m), dtype=torch.float64)
        errors.append((F.linear_attention(q, k, v, feature_map=phi) - exact).square().mean().sqrt().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_layer_with_random_features_saves_its_projection() -> None:
    layer = nn.LinearAttention(16, 2, feature_map=nn.PositiveRandomFeatures.draw(8, 12))
    assert layer.state_dict()["feature_map.projection"].shape == (12, 8)
    layer(torch.randn(5, 2, 16)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
