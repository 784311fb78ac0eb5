"""Packed sequences (cu_seqlens): each attends to itself alone, as if it stood by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import DEVICES, implementations, is_beyond_this_machine, is_refusal, normal
from torch import Tensor

import pyseqnet.functional as F
import pyseqnet.masks as M

LENGTHS_Q, LENGTHS_K = (5, 0, 130, 1, 64), (7, 3, 100, 0, 64)
H, HK, D, E = 4, 2, 16, 8


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ends(lengths: tuple[int, ...], device: str) -> Tensor:
    return torch.tensor((0, *lengths), device=device).cumsum(0).to(torch.int32)


def packed(device: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Any]]:
    shapes = ((sum(LENGTHS_Q), H, D), (sum(LENGTHS_K), HK, D), (sum(LENGTHS_K), HK, E))
    inputs = [normal(s, n, dtype).to(device).requires_grad_() for n, s in enumerate(shapes)]
    cu = {"cu_seqlens_q": ends(LENGTHS_Q, device), "cu_seqlens_k": ends(LENGTHS_K, device)}
    return inputs, {**cu, "enable_gqa": True}


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom right": {"pattern": M.Causal("bottom_right")},
    "local": {"pattern": M.Local(9) | M.Global(1)},
    "per head": {"pattern": M.per_head([M.Local(3), M.Strided(5), M.Causal(), M.Global(2)])},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
    "softcap": {"softcap": 2.0, "scale": 0.7},
}


def one_by_one(inputs: list[Tensor], options: dict[str, Any], device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Every sequence by itself, through the reference with a dense mask: nothing of the packed way."""
    found = []
    q0 = k0 = 0
    for lq, lk in zip(LENGTHS_Q, LENGTHS_K, strict=True):
        one = [
            t[a : a + n].transpose(0, 1).unsqueeze(0)
            for t, a, n in zip(inputs, (q0, k0, k0), (lq, lk, lk), strict=True)
        ]
        given = dict(options)
        pattern = given.pop("pattern", None)
        if pattern is not None:
            longest = (lq, lk) if isinstance(pattern, M.Causal) else (max(LENGTHS_Q), max(LENGTHS_K))
            given["attn_mask"] = pattern.to_dense(*longest)[..., :lq, :lk].to(device)
        if "alibi_slopes" in given:
            given["alibi_slopes"] = given["alibi_slopes"].to(device)
        found.append(
            F.scaled_dot_product_attention_reference(
                *one, **given, enable_gqa=True, return_weights=True, return_lse=True
            )
        )
        q0, k0 = q0 + lq, k0 + lk
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_each_sequence_stands_alone(device: str, name: str) -> None:
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in OPTIONS[name].items()}
    inputs, given = packed(device)
    out, weights, lse = F.scaled_dot_product_attention(
        *inputs, **given, **options, return_weights=True, return_lse=True
    )
    assert out.shape == (sum(LENGTHS_Q), H, E)
    assert lse.shape == (H, sum(LENGTHS_Q))
    assert weights.shape == (len(LENGTHS_Q), H, max(LENGTHS_Q), max(LENGTHS_K))
    alone = one_by_one(inputs, options, device)
    torch.testing.assert_close(out, torch.cat([o[0].transpose(0, 1) for o, _, _ in alone]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, torch.cat([s[0] for _, _, s in alone], 1), rtol=1e-4, atol=1e-5)
    for b, (_, w, _) in enumerate(alone):
        lq, lk = w.shape[-2:]
        torch.testing.assert_close(weights[b, :, :lq, :lk], w[0], rtol=1e-4, atol=1e-5)
        assert not weights[b, :, lq:].any()
        assert not weights[b, :, :, lk:].any()
    weight = normal(out.shape, 7, torch.float32).to(device)
    theirs = torch.autograd.grad((torch.cat([o[0].transpose(0, 1) for o, _, _ in alone]) * weight).sum(), inputs)
    for a, b in zip(torch.autograd.grad((out * weight).sum(), inputs), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    reference = F.scaled_dot_product_attention_reference(*inputs, **given, **options, return_weights=True)
    torch.testing.assert_close(reference[0], out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reference[1], weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entry", implementations("attention"))
def test_every_kernel_takes_packed_sequences_or_says_that_not(entry: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs, given = packed(entry.device, dtype)
        bias = normal((len(LENGTHS_Q), 1, 1, max(LENGTHS_K)), 4, torch.float32).to(entry.device).requires_grad_()
        options = {**given, "pattern": M.Local(40) | M.Global(1), "bias": bias, "is_causal": True}
        leaves = (*inputs, bias)

        def both(function: Any, options: dict[str, Any] = options, leaves: Any = leaves) -> tuple[Tensor, ...]:
            out, weights = function(*leaves[:3], **options, return_weights=True)
            loss = out.float().square().sum() + weights.float().square().sum()
            return out, weights, *torch.autograd.grad(loss, leaves)

        try:
            with entry.pinned():
                ours = both(F.scaled_dot_product_attention)
        except RuntimeError as error:
            if is_beyond_this_machine(error):
                pytest.skip(str(error).splitlines()[0])
            if is_refusal(error):
                return
            raise
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype]
        for a, b in zip(ours, both(F.scaled_dot_product_attention_reference), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_four_dimensions(device: str) -> None:
    inputs, given = packed(device)
    flat = F.scaled_dot_product_attention(*inputs, **given, return_lse=True)
    heads = F.scaled_dot_product_attention(*(t.transpose(0, 1).unsqueeze(0) for t in inputs), **given, return_lse=True)
    assert torch.equal(flat[0], heads[0].squeeze(0).transpose(0, 1))
    assert torch.equal(flat[1], heads[1].squeeze(0))


def test_dropout_is_one_and_the_same(device: str) -> None:
    inputs, given = packed(device)
    results = []
    for function in (F.scaled_dot_product_attention, F.scaled_dot_product_attention_reference):
        torch.manual_seed(3)
        results.append(function(*inputs, **given, dropout_p=0.4))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_double_backward(device: str) -> None:
    cu = ends((3, 4), device)
    inputs = [normal((7, 2, 3), n).to(device).requires_grad_() for n in range(3)]

    def function(*tensors: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            *tensors, cu_seqlens_q=cu, cu_seqlens_k=cu, alibi_slopes=torch.tensor([0.3, 0.6]).to(device), is_causal=True
        )

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_same_sequences_may_be_aligned_bottom_right(device: str) -> None:
    cu = ends((30, 90), device)
    x = normal((120, 2, 8), 0, torch.float32).to(device)
    local = F.scaled_dot_product_attention(
        x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu, pattern=M.Local(5, align="bottom_right")
    )
    torch.testing.assert_close(
        local, F.scaled_dot_product_attention(x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu, pattern=M.Local(5))
    )


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "alone": ({"cu_seqlens_k": None}, ValueError, "cu_seqlens_q and cu_seqlens_k"),
    "with lengths": ({"key_lengths": torch.tensor([3])}, ValueError, "key_lengths"),
    "dtype": ({"cu_seqlens_q": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens_q.*float32"),
    "list": ({"cu_seqlens_q": [0, 5]}, TypeError, "cu_seqlens_q.*list"),
    "shape": ({"cu_seqlens_q": torch.tensor([[0, 5]])}, ValueError, "cu_seqlens_q"),
    "counts": ({"cu_seqlens_k": torch.tensor([0, 5])}, ValueError, "cu_seqlens_q names 2.*1"),
    "end": ({"cu_seqlens_q": torch.tensor([0, 3, 4])}, ValueError, "cu_seqlens_q.*5"),
    "falling": ({"cu_seqlens_k": torch.tensor([0, 7, 5])}, ValueError, "cu_seqlens_k.*5"),
    "heads": ({"query": torch.randn(5, 3, 8)}, ValueError, "3 heads.*2"),
    "groups": ({"query": torch.randn(5, 4, 8)}, ValueError, "enable_gqa"),
    "dimensions": ({"query": torch.randn(2, 5, 2, 8)}, ValueError, "packed.*2, 5, 2, 8"),
    "pattern": ({"pattern": M.Local(2, align="bottom_right")}, ValueError, "bottom_right"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_name_the_argument(name: str) -> None:
    changes, kind, words = REFUSED[name]
    cu = torch.tensor([0, 2, 5])
    call: dict[str, Any] = {n: torch.randn(5, 2, 8) for n in ("query", "key", "value")}
    call.update(cu_seqlens_q=cu, cu_seqlens_k=cu.clone())
    call.update(changes)
    with pytest.raises(kind, match=words):
        F.scaled_dot_product_attention(**call)
