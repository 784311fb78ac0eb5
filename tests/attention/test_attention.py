"""Softmax attention as torch has it: golden numbers, arguments, the rules at the edges, dropout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import (
    normal,
)
from torch import Tensor

import pyseqnet.functional as F
from pyseqnet import _C
from pyseqnet.functional._attention_reference import BOTTOM_RIGHT, Extras, Options

ops = torch.ops.pyseqnet
sdpa = torch.nn.functional.scaled_dot_product_attention

# --- golden numbers -----------------------------------------------------------------------------------------------

TOKENS = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
G6_WEIGHTS = [[0.422319, 0.155362, 0.422319], [0.015876, 0.866813, 0.117310], [0.155362, 0.422319, 0.422319]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_numbers(device: str, dtype: torch.dtype) -> None:
    x = TOKENS.to(device, dtype)
    out, weights = F.scaled_dot_product_attention(x, x, x, scale=1.0, return_weights=True)
    expected = torch.tensor(G6_WEIGHTS, dtype=dtype, device=device)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(out, expected @ x, rtol=0, atol=3e-6)
    # The slides write it in columns: O = V softmax(K^T Q).
    columns = x.T @ torch.softmax(x @ x.T, dim=0)
    torch.testing.assert_close(out, columns.T, rtol=0, atol=1e-6)


# --- torch's function ---------------------------------------------------------------------------------------------

CALLS: dict[str, tuple[tuple[tuple[int, ...], ...], dict[str, Any]]] = {
    "plain": (((2, 3, 7, 8), (2, 3, 7, 8), (2, 3, 7, 8)), {}),
    "two dimensions": (((7, 8), (9, 8), (9, 5)), {}),
    "three dimensions": (((4, 7, 8), (4, 9, 8), (4, 9, 5)), {"is_causal": True}),
    "five dimensions": (((2, 3, 2, 7, 8), (2, 3, 2, 9, 8), (2, 3, 2, 9, 5)), {}),
    "mixed dimensions": (((2, 3, 7, 8), (9, 8), (9, 5)), {}),
    "broadcast batch": (((1, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8)), {}),
    "broadcast heads": (((2, 3, 7, 8), (2, 1, 9, 8), (2, 1, 9, 8)), {}),
    "broadcast values": (((1, 3, 7, 8), (1, 3, 9, 8), (2, 3, 9, 8)), {}),
    "causal, more queries": (((2, 3, 9, 8), (2, 3, 4, 8), (2, 3, 4, 8)), {"is_causal": True}),
    "causal, more keys": (((2, 3, 4, 8), (2, 3, 9, 8), (2, 3, 9, 8)), {"is_causal": True}),
    "scale": (((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 5)), {"scale": 0.3}),
    "scale 0": (((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 5)), {"scale": 0.0}),
    "grouped": (((2, 6, 7, 8), (2, 2, 9, 8), (2, 2, 9, 5)), {"enable_gqa": True}),
    "grouped, three dimensions": (((6, 7, 8), (2, 9, 8), (2, 9, 5)), {"enable_gqa": True}),
    "grouped unevenly": (((2, 6, 7, 8), (2, 2, 9, 8), (2, 3, 9, 5)), {"enable_gqa": True}),
    "decoding": (((2, 3, 1, 8), (2, 3, 40, 8), (2, 3, 40, 8)), {}),
    "wide": (((1, 2, 20, 200), (1, 2, 30, 200), (1, 2, 30, 256)), {}),
}
MASKS = {
    "(L, S)": lambda lead, rows, s: (rows, s),
    "(S)": lambda lead, rows, s: (1, s),
    "(L, 1)": lambda lead, rows, s: (rows, 1),
    "full": lambda lead, rows, s: (*lead, rows, s),
    "(B, 1, 1, S)": lambda lead, rows, s: (*lead[:-1], 1, 1, s),
    "(H, L, S)": lambda lead, rows, s: (*lead[-1:], rows, s),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_calls_as_torch_has_them(device: str, name: str, dtype: torch.dtype) -> None:
    shapes, options = CALLS[name]

    def step(function) -> list[Tensor]:
        inputs = [normal(shape, n, dtype).to(device).requires_grad_() for n, shape in enumerate(shapes)]
        out = function(*inputs, **options)
        return [out.detach(), *torch.autograd.grad(out, inputs, normal(tuple(out.shape), 9, dtype).to(device))]

    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-4
    for ours, theirs in zip(step(F.scaled_dot_product_attention), step(sdpa), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["plain", "five dimensions", "three dimensions", "two dimensions", "decoding"])
def test_masks_as_torch_has_them(device: str, name: str, mask: str, additive: bool) -> None:
    shapes, _ = CALLS[name]
    lead, length, keys = shapes[0][:-2], shapes[0][-2], shapes[1][-2]
    if mask == "(B, 1, 1, S)" and len(lead) < 2:
        pytest.skip("no heads")
    values = normal(MASKS[mask](lead, length, keys), 4, torch.float32)

    def step(function) -> list[Tensor]:
        inputs = [normal(shape, n, torch.float32).to(device).requires_grad_() for n, shape in enumerate(shapes)]
        attn_mask = values.to(device).clone().requires_grad_() if additive else (values > -1).to(device)
        out = function(*inputs, attn_mask)
        wanted = [*inputs, attn_mask] if additive else inputs
        return [out.detach(), *torch.autograd.grad(out, wanted, normal(tuple(out.shape), 9, out.dtype).to(device))]

    for ours, theirs in zip(step(F.scaled_dot_product_attention), step(sdpa), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_mask_may_come_with_causality_and_lengths(device: str) -> None:
    q, k, v = (normal((2, 3, 30, 16), n, torch.float32).to(device) for n in range(3))
    mask = (normal((2, 1, 30, 30), 3) > -0.5).to(device)
    lengths = torch.tensor([11, 30], device=device)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=True, key_lengths=lengths)
    both = mask & (torch.arange(30, device=device) < lengths.view(2, 1, 1, 1))
    both = both & torch.ones(30, 30, dtype=torch.bool, device=device).tril()
    torch.testing.assert_close(out, sdpa(q, k, v, both), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4)])
def test_empty_inputs(device: str, shape: tuple[int, ...]) -> None:
    q = torch.randn(shape, device=device, requires_grad=True)
    out, weights, lse = F.scaled_dot_product_attention(q, q, q, return_weights=True, return_lse=True)
    assert out.shape == shape
    assert weights.shape == (*shape[:3], shape[2])
    assert lse.shape == shape[:3]
    out.sum().backward()
    assert q.grad.shape == shape


def test_no_keys(device: str) -> None:
    q = torch.randn(2, 3, 5, 4, device=device, requires_grad=True)
    k = torch.randn(2, 3, 0, 4, device=device, requires_grad=True)
    out, lse = F.scaled_dot_product_attention(q, k, k, return_lse=True)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    out.sum().backward()
    assert (q.grad == 0).all()
    assert k.grad.shape == k.shape


# --- the rules at the edges ---------------------------------------------------------------------------------------

KERNELS = _C.dispatch_tables()


def pins(device: str) -> list[str]:
    """Ways to pin the kernels that this machine has: every ISA's, and the reference."""
    if device == "cuda":
        return [""]
    isas = ("portable", "avx2", "avx512")
    detected = _C.build_info()["cpu_isa_detected"].removesuffix("bf16")
    return ["attention:reference", *isas[: isas.index(detected) + 1]]


def step_with(pin: str, monkeypatch: pytest.MonkeyPatch, *tensors: Tensor, **options: Any) -> list[Tensor]:
    """(out, weights, lse, gradients ...) with the kernels of one ISA, or a pinned one."""
    monkeypatch.delenv("PYSEQNET_FORCE", raising=False)
    monkeypatch.delenv("PYSEQNET_ISA", raising=False)
    if ":" in pin:
        monkeypatch.setenv("PYSEQNET_FORCE", pin)
    elif pin:
        monkeypatch.setenv("PYSEQNET_ISA", pin)
    inputs = [t.detach().clone().requires_grad_() for t in tensors]
    results = F.scaled_dot_product_attention(*inputs, **options, return_weights=True, return_lse=True)
    found = torch.autograd.grad([results[0].sum(), results[1].square().sum()], inputs)
    return [*(r.detach() for r in results), *found]


@pytest.mark.parametrize("length", [1, 3, 40])
@pytest.mark.parametrize("how", ["lengths", "bool", "bool per query", "additive", "causal"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_keys_that_no_query_sees_never_leak(
    device: str, monkeypatch: pytest.MonkeyPatch, how: str, poison: float, length: int
) -> None:
    keys, seen = 70, 33
    q, k, v = (normal((2, 2, n, 16), n, torch.float32).to(device) for n in (length, keys, keys))
    hidden = torch.arange(keys, device=device) >= (length if how == "causal" else seen)
    options: dict[str, Any] = {}
    if how == "lengths":
        options["key_lengths"] = torch.full((2,), seen, device=device)
    elif how == "bool":
        options["attn_mask"] = ~hidden.view(1, 1, 1, keys)
    elif how == "bool per query":
        options["attn_mask"] = (~hidden).repeat(2, 1, length, 1)
    elif how == "additive":
        options["attn_mask"] = torch.zeros(keys, device=device).masked_fill(hidden, -math.inf).view(1, keys)
    else:
        options["is_causal"] = True
    clean = step_with("", monkeypatch, q, k, v, **options)
    k[:, :, hidden], v[:, :, hidden] = poison, poison
    for pin in pins(device):
        found = step_with(pin, monkeypatch, q, k, v, **options)
        for ours, expected in zip(found, clean, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        assert (found[4][:, :, hidden] == 0).all()
        assert (found[5][:, :, hidden] == 0).all()


@pytest.mark.parametrize("length", [2, 50])
@pytest.mark.parametrize("how", ["lengths", "bool", "additive"])
def test_rows_that_see_no_key(device: str, monkeypatch: pytest.MonkeyPatch, how: str, length: int) -> None:
    q, k, v = (normal((2, 2, n, 16), n, torch.float32).to(device) for n in (length, 40, 40))
    visible = torch.ones(2, 1, length, 40, dtype=torch.bool, device=device)
    options: dict[str, Any] = {}
    if how == "lengths":
        visible[0] = False
        options["key_lengths"] = torch.tensor([0, 40], device=device)
    else:
        visible[:, :, 1] = False
        options["attn_mask"] = visible if how == "bool" else torch.where(visible, 0.0, -math.inf)
    dead = ~visible.any(-1).expand(2, 2, length)
    q[dead] = math.nan  # nobody reads it
    for pin in pins(device):
        out, weights, lse, gq, gk, gv = step_with(pin, monkeypatch, q, k, v, **options)
        assert (out[dead] == 0).all()
        assert (weights[dead] == 0).all()
        assert (lse[dead] == -math.inf).all()
        assert (gq[dead] == 0).all()
        for tensor in (out, weights, gq, gk, gv):
            assert tensor.isfinite().all()
        assert lse[~dead].isfinite().all()


@pytest.mark.parametrize("length", [2, 30])
def test_a_mask_of_the_lowest_number_is_no_minus_infinity(
    device: str, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """A row that holds nothing else is the mean of the values, as in torch, and its gradients are finite."""
    q, k, v = (normal((1, 2, n, 16), n, torch.float32).to(device) for n in (length, 20, 20))
    mask = torch.zeros(length, 20, device=device)
    mask[0] = torch.finfo(torch.float32).min
    for pin in pins(device):
        results = step_with(pin, monkeypatch, q, k, v, attn_mask=mask)
        torch.testing.assert_close(results[0], sdpa(q, k, v, mask), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(results[0][:, :, 0], v.mean(2), rtol=1e-4, atol=1e-5)
        assert all(t.isfinite().all() for t in results)


@pytest.mark.parametrize("length", [2, 30])
def test_large_logits(device: str, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    q, k, v = (normal((1, 2, n, 16), n, torch.float32).to(device) for n in (length, 50, 50))
    q = q * 1e4
    exact = [t.double() for t in (q, k, v)]
    weights = torch.softmax(exact[0] @ exact[1].transpose(-1, -2), -1)
    for pin in pins(device):
        results = step_with(pin, monkeypatch, q, k, v, scale=1.0)
        assert all(t.isfinite().all() for t in results)
        torch.testing.assert_close(results[0].double(), weights @ exact[2], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(results[1].sum(-1), torch.ones_like(results[1].sum(-1)), rtol=0, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_without_a_gradient_may_hold_anything_finite(device: str, dtype: torch.dtype) -> None:
    # Logits beyond 1e16 are rounded by more than 1: a weight recomputed from them must not come out infinite.
    for seed in range(20):
        q, k, v = (normal((1, 1, 6, 8), seed + n, dtype).to(device) for n in (0, 100, 200))
        for t in (q, k, v):
            t[:, :, 4:] = -1e30
            t.requires_grad_()
        F.scaled_dot_product_attention(q, k, v, key_lengths=torch.tensor([4]))[:, :, :4].sum().backward()
        assert all(t.grad.isfinite().all() for t in (q, k, v))
        assert q.grad[:, :, 4:].count_nonzero() == 0


@pytest.mark.parametrize("length", [3, 40])
def test_a_nan_that_is_seen_shows(device: str, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    q, k, v = (normal((1, 2, n, 16), n, torch.float32).to(device) for n in (length, 50, 50))
    k[0, 0, 7, 3] = math.nan
    for pin in pins(device):
        out, weights, lse, *_ = step_with(pin, monkeypatch, q, k, v)
        assert out[0, 0].isnan().all()
        assert lse[0, 0].isnan().all()
        assert weights[0, 0, :, 7].isnan().all()
        assert out[0, 1].isfinite().all()


def test_later_tokens_change_no_bit(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """E14: under causality the outputs up to t do not depend on what comes after."""
    for length in (4, 150):
        x = normal((1, 2, length, 16), 0, torch.float32).to(device)
        for pin in pins(device):
            before = step_with(pin, monkeypatch, x, x, x, is_causal=True)
            for t in range(0, length - 1, 37 if length > 10 else 1):
                changed = x.clone()
                changed[:, :, t + 1 :] = 5.0
                after = step_with(pin, monkeypatch, changed, changed, changed, is_causal=True)
                for a, b in zip(before[:3], after[:3], strict=True):
                    assert torch.equal(a[:, :, : t + 1], b[:, :, : t + 1])


@pytest.mark.parametrize("keys", [1, 7, 200])
@pytest.mark.parametrize("causal", [False, True])
def test_the_plain_call_is_the_general_one(device: str, keys: int, causal: bool) -> None:
    """Calls with nothing beside query, key and value have a shorter way to the same kernels."""
    q, k, v = (normal((2, 3, n, 8), n, torch.float32).to(device).requires_grad_() for n in (130, keys, keys))
    for options in ({}, {"scale": 0.3}):
        plain = F.scaled_dot_product_attention(q, k, v, is_causal=causal, **options)
        general = F.scaled_dot_product_attention(q, k, v, is_causal=causal, **options, return_lse=True)[0]
        assert torch.equal(plain, general)
        gradient = normal(plain.shape, 5, torch.float32).to(device)
        for one, other in zip(*(torch.autograd.grad(o, (q, k, v), gradient) for o in (plain, general)), strict=True):
            assert torch.equal(one, other)
    only = torch.autograd.grad(F.scaled_dot_product_attention(q.detach(), k, v.detach()).sum(), k)[0]
    assert only.isfinite().all()


def test_step_by_step_is_the_whole(device: str) -> None:
    """E13: decoding with a cache of keys and values."""
    q, k, v = (normal((2, 3, 40, 16), n, torch.float32).to(device) for n in range(3))
    whole = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for t in range(40):
        one = F.scaled_dot_product_attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
        torch.testing.assert_close(one, whole[:, :, t : t + 1], rtol=1e-5, atol=1e-5)


def test_bottom_right_alignment_of_the_raw_operations(device: str) -> None:
    """For decoding several tokens at once: the last query sees every key."""
    q, k, v = (normal((2, 3, n, 16), n, torch.float32).to(device) for n in (5, 30, 30))
    extras, options = Extras(), Options(BOTTOM_RIGHT, 0.25, 0.0, 0.0, 0, 0)
    out, lse = ops.attention_forward(q, k, v, *extras, *options)
    visible = torch.ones(5, 30, dtype=torch.bool, device=device).tril(25)
    torch.testing.assert_close(out, sdpa(q, k, v, visible, scale=0.25), rtol=1e-5, atol=1e-5)
    found = ops.attention_backward(
        torch.ones_like(out), q, k, v, out, lse, *extras, None, None, None, *options, True, True, False
    )
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    sdpa(*inputs, visible, scale=0.25).sum().backward()
    for ours, theirs in zip(found, inputs, strict=False):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=1e-5)


def test_the_same_word_in_two_places(device: str) -> None:
    """D9: "I saw a saw". Without positions equal tokens attend equally; under causality they need not."""
    words = normal((4, 8), 0, torch.float32)
    x = words[[0, 1, 2, 1]].to(device)
    out = F.scaled_dot_product_attention(x, x, x)
    torch.testing.assert_close(out[1], out[3])
    causal = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    assert (causal[1] - causal[3]).abs().max() > 1e-3


def test_weights_are_a_distribution(device: str) -> None:
    q, k, v = (normal((2, 3, n, 16), n, torch.float32).to(device) for n in (20, 30, 30))
    out, weights, lse = F.scaled_dot_product_attention(q, k, v, return_weights=True, return_lse=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(lse))
    assert (weights >= 0).all()
    torch.testing.assert_close(out, weights @ v, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, torch.logsumexp(q @ k.transpose(-1, -2) / 4, -1), rtol=1e-5, atol=1e-5)
    assert lse.dtype == torch.float32


# --- dropout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [3, 70])
def test_dropout_is_the_references(device: str, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """The same bits in every kernel, in forward and backward, and in plain torch."""
    q, k, v = (normal((2, 2, n, 16), n, torch.float32).to(device) for n in (length, 90, 90))
    options = {"dropout_p": 0.3, "is_causal": length > 10}

    def seeded(function) -> list[Tensor]:
        torch.manual_seed(5)
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        out, weights = function(*inputs, **options, return_weights=True)
        return [out.detach(), weights.detach(), *torch.autograd.grad([out.sum(), weights.square().sum()], inputs)]

    expected = seeded(F.scaled_dot_product_attention_reference)
    for pin in pins(device):
        step_with(pin, monkeypatch, q, k, v)  # pins
        for ours, theirs in zip(seeded(F.scaled_dot_product_attention), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_dropout_drops_at_its_rate_and_keeps_the_mean(device: str) -> None:
    v = torch.ones(4, 4, 256, 1, device=device)
    q = torch.zeros(4, 4, 128, 1, device=device)
    for p in (0.1, 0.5, 0.9):
        out, weights = F.scaled_dot_product_attention(q, v, v, dropout_p=p, return_weights=True)
        dropped = (weights == 0).float()
        deviation = math.sqrt(p * (1 - p))
        assert abs(dropped.mean().item() - p) < 5 * deviation / math.sqrt(weights.numel())
        # Neither rows, columns nor neighbours are related.
        assert (dropped.mean(-1) - p).abs().max() < 6 * deviation / math.sqrt(256)
        assert (dropped.mean((0, 1, 2)) - p).abs().max() < 6 * deviation / math.sqrt(4 * 4 * 128)
        for a, b in ((dropped[..., 1:], dropped[..., :-1]), (dropped[..., 1:, :], dropped[..., :-1, :])):
            correlation = ((a - p) * (b - p)).mean().item() / deviation**2
            assert abs(correlation) < 5 / math.sqrt(a.numel())
        torch.testing.assert_close(weights[weights > 0], torch.full_like(weights[weights > 0], 1 / 256 / (1 - p)))
        assert abs(out.mean().item() - 1) < 0.02 / (1 - p)


def test_dropout_follows_torchs_generator(device: str) -> None:
    q = normal((2, 2, 30, 16), 0, torch.float32).to(device)

    def draw(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [F.scaled_dot_product_attention(q, q, q, dropout_p=0.5) for _ in range(2)]

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_dropping_everything(device: str) -> None:
    q = normal((2, 2, 5, 16), 0, torch.float32).to(device).requires_grad_()
    out, weights = F.scaled_dot_product_attention(q, q, q, dropout_p=1.0, return_weights=True)
    assert (out == 0).all()
    assert (weights == 0).all()
    out.sum().backward()
    assert (q.grad == 0).all()
