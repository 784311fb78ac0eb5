"""Softmax attention: every kernel of the dispatch tables on random problems, then its rules one by one.

Golden numbers G6; mechanisms D9, D12-D19, E13, E14, E19.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    Implementation,
    allowed_error,
    dtypes,
    error_of,
    implementations,
    is_beyond_this_machine,
    is_refusal,
    normal,
    poisoned_memory,
    run_python,
    seeds,
    threads,
    view_as,
)
from torch import Tensor

import pyseqnet.functional as F
from pyseqnet import _C
from pyseqnet.functional import attention as module

EXAMPLES = 60
ops = torch.ops.pyseqnet
sdpa = torch.nn.functional.scaled_dot_product_attention
VIEWS = ("contiguous", "heads inside", "narrowed", "transposed", "step", "expanded")


def arranged(tensor: Tensor, view: str) -> Tensor:
    if view == "heads inside":  # as multi-head layers have them
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return view_as(tensor, view)


@dataclass(frozen=True)
class Problem:
    B: int
    H: int
    group: int
    L: int
    S: int
    D: int
    E: int
    causal: bool
    mask: str
    mask_shape: tuple[bool, bool, bool]  # whether batch, heads, queries are broadcast
    lengths: bool
    dropout_p: float
    scale: float | None
    dtype: torch.dtype
    view: str
    with_weights: bool
    with_lse: bool
    seed: int

    def tensors(self, device: str) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """[query, key, value], mask, key_lengths; in the problem's dtype."""
        shapes = ((self.H * self.group, self.L, self.D), (self.H, self.S, self.D), (self.H, self.S, self.E))
        inputs = [normal((self.B, *shape), self.seed + n, self.dtype) for n, shape in enumerate(shapes)]
        generator = torch.Generator().manual_seed(self.seed)
        full = (self.B, self.H * self.group, self.L)
        shape = (*(1 if one else f for one, f in zip(self.mask_shape, full, strict=True)), self.S)
        mask = None
        if self.mask == "bool":
            mask = torch.rand(shape, generator=generator) > 0.4
        elif self.mask != "none":
            mask = normal(shape, self.seed + 3, self.dtype if self.mask == "additive" else torch.float32)
            mask = mask.masked_fill(torch.rand(shape, generator=generator) > 0.8, -math.inf)
            if self.dtype == torch.float64:
                mask = mask.double()
        lengths = torch.randint(0, self.S + 1, (self.B,), generator=generator) if self.lengths else None
        inputs = [arranged(t.to(device), self.view) for t in inputs]
        return inputs, None if mask is None else mask.to(device), None if lengths is None else lengths.to(device)

    def options(self) -> tuple[int, float, float]:
        return int(self.causal), 1 / math.sqrt(self.D) if self.scale is None else self.scale, self.dropout_p


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    length = st.one_of(st.integers(1, 5), st.integers(1, 70))
    width = st.one_of(st.sampled_from((1, 8, 16, 32, 64)), st.integers(1, 70))
    d = draw(width)
    return Problem(
        B=draw(st.integers(1, 2)),
        H=draw(st.integers(1, 2)),
        group=draw(st.sampled_from((1, 1, 2, 3))),
        L=draw(st.one_of(length, st.just(130))),
        S=draw(st.one_of(length, st.just(300))),
        D=d,
        E=draw(st.one_of(st.just(d), width)),
        causal=draw(st.sampled_from((False, False, True))),
        mask=draw(st.sampled_from(("none", "none", "bool", "additive", "additive f32"))),
        mask_shape=draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        lengths=draw(st.sampled_from((False, False, True))),
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.3))),
        scale=draw(st.sampled_from((None, None, 1.0, 0.25))),
        dtype=draw(dtypes),
        view=draw(st.sampled_from(VIEWS)),
        with_weights=draw(st.booleans()),
        with_lse=draw(st.booleans()),
        seed=draw(seeds),
    )


def plain(p: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    """Results and gradients in plain torch in this dtype, on the CPU."""
    inputs, mask, lengths = p.tensors("cpu")
    inputs = [t.to(dtype).contiguous().requires_grad_() for t in inputs]
    leaves = list(inputs)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype).requires_grad_()
        leaves.append(mask)
    seed = torch.tensor([p.seed])
    out, weights, lse = _in_dtype(*inputs, mask, lengths, seed, p)
    gout, gweights, glse = gradients_of(p)
    pairs = [(out, gout.to(dtype))]
    if p.with_weights:
        pairs.append((weights, gweights.to(dtype)))
    if p.with_lse:
        pairs.append((torch.where(lse.isinf(), 0.0, lse), glse.to(lse.dtype)))
    found = torch.autograd.grad([r for r, _ in pairs], leaves, [g for _, g in pairs])
    names = ("gq", "gk", "gv", "gmask")[: len(found)]
    return {"out": out, "weights": weights, "lse": lse, **dict(zip(names, found, strict=True))}


def _in_dtype(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor | None, seed: Tensor, p: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    """What a user would write: products and softmax in the dtype of the inputs."""
    key, value = (t.repeat_interleave(p.group, dim=1) for t in (key, value))
    visible = torch.ones(p.B, p.H * p.group, p.L, p.S, dtype=torch.bool)
    if p.causal:
        visible = visible.tril()
    if lengths is not None:
        visible = visible & (torch.arange(p.S) < lengths.view(-1, 1, 1, 1))
    if mask is not None:
        visible = visible & (mask if mask.dtype == torch.bool else mask != -math.inf)
    logits = query @ key.transpose(-1, -2) * p.options()[1]
    if mask is not None and mask.dtype != torch.bool:
        logits = logits + mask.masked_fill(mask == -math.inf, 0.0)
    sees = visible.any(-1, keepdim=True)
    logits = logits.masked_fill(~visible, -math.inf).masked_fill(~sees, 0.0)
    weights = torch.softmax(logits, -1).masked_fill(~sees, 0.0)
    lse = torch.logsumexp(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    if p.dropout_p > 0:
        weights = weights * module._keep_factors(tuple(weights.shape), seed, p.dropout_p).to(weights.dtype)
    return weights @ value, weights, lse.masked_fill(~sees.squeeze(-1), -math.inf)


def gradients_of(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    heads = p.H * p.group
    return (
        normal((p.B, heads, p.L, p.E), p.seed + 5, p.dtype),
        normal((p.B, heads, p.L, p.S), p.seed + 6, p.dtype),
        normal((p.B, heads, p.L), p.seed + 7, torch.float64 if p.dtype == torch.float64 else torch.float32),
    )


def run_pass(p: Problem, operation: str, device: str) -> dict[str, Tensor]:
    """The results of the raw operations that this table entry belongs to."""
    inputs, mask, lengths = p.tensors(device)
    seed = torch.tensor([p.seed], device=device)
    extras = (mask, lengths, seed)
    out, lse = ops.attention_forward(*inputs, *extras, *p.options())
    if operation == "attention_forward":
        return {"out": out, "lse": lse}
    weights = ops.attention_weights(*inputs[:2], lse, *extras, *p.options())
    if operation == "attention_weights":
        return {"weights": weights}
    gout, gweights, glse = (t.to(device) for t in gradients_of(p))
    additive = mask is not None and mask.dtype != torch.bool
    found = ops.attention_backward(
        arranged(gout, p.view if p.view != "expanded" else "contiguous"), *inputs, out, lse, *extras,
        weights if p.with_weights else None, gweights if p.with_weights else None, glse if p.with_lse else None,
        *p.options(), True, True, additive,
    )  # fmt: skip
    names = ("gq", "gk", "gv", "gmask")
    return dict(zip(names if additive else names[:3], found, strict=False))


@pytest.mark.parametrize("entry", implementations("attention"))
def test_every_kernel_matches_torch(entry: Implementation) -> None:
    """At most twice (gradients three times) the error of plain torch in this dtype, measured against float64."""
    taken = [0]

    @settings(max_examples=EXAMPLES // 2 if entry.kernel == "reference" else EXAMPLES)
    @given(problems())
    def check(p: Problem) -> None:
        try:
            with entry.pinned(), poisoned_memory():
                found = run_pass(p, entry.operation, entry.device)
        except RuntimeError as error:
            if is_refusal(error):
                return
            raise
        taken[0] += 1
        exact, theirs = plain(p, torch.float64), plain(p, p.dtype)
        for name, result in found.items():
            factor = 3.0 if name.startswith("g") else 2.0
            if name == "lse":
                assert torch.equal(result.cpu().isinf(), exact["lse"].isinf())
                result, expected = (torch.where(t.isinf(), 0, t.double()) for t in (result.cpu(), exact["lse"]))
                yardstick = torch.where(theirs["lse"].isinf(), 0, theirs["lse"])
            else:
                expected, yardstick = exact[name], theirs[name]
            # Sums of terms as large as these: a gradient may cancel to nothing.
            magnitude = expected.abs() + terms(p)[name]
            allowed = allowed_error(yardstick, expected, magnitude, factor)
            assert error_of(result, expected) <= allowed, (name, error_of(result, expected), allowed)

    try:
        check()
    except RuntimeError as error:
        if is_beyond_this_machine(error):
            pytest.skip(str(error).splitlines()[0])
        raise
    assert taken[0] > 0, f"{entry} refused every problem"


def terms(p: Problem) -> dict[str, float]:
    """About how large the terms of each result's sums are, inputs being standard normal.

    A logit is off by some ulp of its own size; the weights, exponentials, are then off by so much of theirs.
    """
    (q, k, _), mask, _ = p.tensors("cpu")
    k = k.repeat_interleave(p.group, dim=1)
    logit = 1 + (q.double() @ k.double().transpose(-1, -2)).abs().max().item() * abs(p.options()[1])
    if mask is not None and mask.dtype != torch.bool:
        logit += 4
    gradient = (3 * math.sqrt(p.E) / (1 - p.dropout_p) + 3) * logit
    rows = math.sqrt(p.L * p.group)
    return {
        "out": 3 * logit, "weights": logit, "lse": logit + math.log(p.S), "gq": gradient, "gk": gradient * rows,
        "gv": 3 * logit * rows, "gmask": gradient * math.sqrt(p.B * p.H) * rows,
    }  # fmt: skip


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
    bottom_right = 2
    out, lse = ops.attention_forward(q, k, v, None, None, None, bottom_right, 0.25, 0.0)
    visible = torch.ones(5, 30, dtype=torch.bool, device=device).tril(25)
    torch.testing.assert_close(out, sdpa(q, k, v, visible, scale=0.25), rtol=1e-5, atol=1e-5)
    found = ops.attention_backward(
        torch.ones_like(out), q, k, v, out, lse, None, None, None, None, None, None, bottom_right, 0.25, 0.0,
        True, True, False,
    )  # fmt: skip
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


# --- gradients ----------------------------------------------------------------------------------------------------

GRADIENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "grouped": {"enable_gqa": True},
    "bool mask": {"mask": "bool"},
    "additive mask": {"mask": "additive"},
    "lengths": {"lengths": True},
    "weights and lse": {"results": True},
    "dropout": {"dropout_p": 0.4},
    "everything": {"is_causal": True, "mask": "additive", "lengths": True, "results": True, "dropout_p": 0.2},
}


def gradient_problem(name: str, device: str) -> tuple[Any, list[Tensor]]:
    options = dict(GRADIENTS[name])
    kind, lengths, results = options.pop("mask", ""), options.pop("lengths", False), options.pop("results", False)
    kv_heads = 1 if "enable_gqa" in options else 2
    shapes = ((2, 2, 4, 3), (2, kv_heads, 5, 3), (2, kv_heads, 5, 2))
    inputs = [normal(s, n).to(device).requires_grad_() for n, s in enumerate(shapes)]
    if lengths:
        options["key_lengths"] = torch.tensor([3, 5], device=device)
    mask = None
    if kind == "bool":
        mask = (normal((2, 1, 4, 5), 5) > -0.7).to(device)
        mask[0, 0, 1] = False
    elif kind == "additive":
        mask = normal((1, 2, 4, 5), 5).to(device)
        mask[:, :, 0, 1] = -math.inf
        inputs.append(mask.requires_grad_())

    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None = None) -> Any:
        torch.manual_seed(3)
        return F.scaled_dot_product_attention(
            q, k, v, mask if m is None else m, **options, return_weights=results, return_lse=results
        )

    return function, inputs


def without_infinities(function: Any) -> Any:
    """gradcheck steps away from -inf into NaN: those entries are put in inside."""

    def wrapped(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Any:
        if rest:
            hole = torch.zeros_like(rest[0], dtype=torch.bool)
            hole[:, :, 0, 1] = True
            rest = (rest[0].masked_fill(hole, -math.inf),)
        return function(q, k, v, *rest)

    return wrapped


def finite_leaves(inputs: list[Tensor]) -> list[Tensor]:
    return [torch.where(t.isinf(), 0.0, t).detach().requires_grad_() for t in inputs]


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradcheck(device: str, name: str) -> None:
    function, inputs = gradient_problem(name, device)
    torch.autograd.gradcheck(without_infinities(function), finite_leaves(inputs))


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradgradcheck(device: str, name: str) -> None:
    function, inputs = gradient_problem(name, device)
    torch.autograd.gradgradcheck(
        without_infinities(function),
        finite_leaves(inputs),
        fast_mode=True,
        nondet_tol=1e-12 if device == "cuda" else 0.0,
    )


def test_one_tensor_as_query_key_and_value(device: str) -> None:
    """Each place has a gradient of its own, in double backward too."""
    x = normal((1, 2, 5, 4), 0).to(device).requires_grad_()
    (g,) = torch.autograd.grad(F.scaled_dot_product_attention(x, x, x).square().sum(), x, create_graph=True)
    (gg,) = torch.autograd.grad(g.square().sum(), x)
    y = x.detach().clone().requires_grad_()
    (h,) = torch.autograd.grad(F.scaled_dot_product_attention_reference(y, y, y).square().sum(), y, create_graph=True)
    (hh,) = torch.autograd.grad(h.square().sum(), y)
    torch.testing.assert_close(g, h)
    torch.testing.assert_close(gg, hh)


@pytest.mark.parametrize("wanted", range(1, 16))
def test_any_subset_of_inputs_may_want_gradients(device: str, wanted: int) -> None:
    shapes = ((2, 2, 6, 4), (2, 2, 7, 4), (2, 2, 7, 4), (6, 7))
    inputs = [
        normal(s, n, torch.float32).to(device).requires_grad_(bool(wanted >> n & 1)) for n, s in enumerate(shapes)
    ]
    twins = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    F.scaled_dot_product_attention(*inputs).square().sum().backward()
    F.scaled_dot_product_attention_reference(*twins).square().sum().backward()
    for ours, theirs in zip(inputs, twins, strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("used", ["out", "weights", "lse", "weights and lse", "none"])
def test_any_result_may_go_unused(device: str, used: str) -> None:
    inputs = [normal((2, 2, 6, 4), n).to(device).requires_grad_() for n in range(3)]

    def loss(function) -> Tensor:
        out, weights, lse = function(*inputs, return_weights=True, return_lse=True)
        parts = {"out": out, "weights": weights, "lse": lse}
        return sum((t.square().sum() for n, t in parts.items() if n in used), inputs[0].sum() * 0)

    ours = torch.autograd.grad(loss(F.scaled_dot_product_attention), inputs, allow_unused=True)
    theirs = torch.autograd.grad(loss(F.scaled_dot_product_attention_reference), inputs, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        zero = torch.zeros(2, 2, 6, 4, dtype=torch.float64, device=device)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b)


@pytest.mark.parametrize("arrival", ["sum", "transposed", "narrowed", "heads inside"])
def test_gradients_arrive_with_any_strides(device: str, arrival: str) -> None:
    def loss(y: Tensor) -> Tensor:
        if arrival == "sum":
            return y.sum()  # strides 0
        if arrival == "transposed":
            return (y.transpose(-1, -2).contiguous() ** 2).sum()
        if arrival == "narrowed":
            return y.new_zeros([s + 2 for s in y.shape])[1:-1, 1:-1, 1:-1, 1:-1].add(y).square().sum()
        return (y.transpose(1, 2).flatten(2) ** 3).sum()

    inputs = [normal((2, 3, 6, 8), n).to(device).requires_grad_() for n in range(3)]
    ours = torch.autograd.grad(loss(F.scaled_dot_product_attention(*inputs)), inputs)
    theirs = torch.autograd.grad(loss(sdpa(*inputs)), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


# --- torch's machinery --------------------------------------------------------------------------------------------


def raw_calls(device: str):
    q, k, v = (normal((2, h, n, 4), n, torch.float32).to(device) for h, n in ((4, 6), (2, 7), (2, 7)))
    inside = q.transpose(1, 2).contiguous().transpose(1, 2)
    mask = normal((1, 4, 1, 7), 3, torch.float32).to(device)
    lengths, seed = torch.tensor([3, 7], device=device), torch.tensor([5], device=device)
    for query, extras in ((q, (None, None, None)), (inside, (mask, lengths, seed))):
        options = (1, 0.5, 0.2 if extras[2] is not None else 0.0)
        out, lse = ops.attention_forward(query, k, v, *extras, *options)
        weights = ops.attention_weights(query, k, lse, *extras, *options)
        yield ops.attention_forward, (query, k, v, *extras, *options)
        yield ops.attention_weights, (query, k, lse, *extras, *options)
        for need in (True, False):
            more = (weights, torch.ones_like(weights), torch.ones_like(lse)) if need else (None, None, None)
            yield (
                ops.attention_backward,
                (out, query, k, v, out, lse, *extras, *more, *options, need, True, need and extras[0] is not None),
            )


def test_opcheck(device: str) -> None:
    for operation, arguments in raw_calls(device):
        torch.library.opcheck(operation.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["plain", "causal", "additive mask", "lengths", "weights and lse"])
def test_compile(device: str, name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    options = dict(GRADIENTS[name])
    results = options.pop("results", False)
    additive, lengths = options.pop("mask", None), options.pop("lengths", None)

    def model(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None, n: Tensor | None) -> Any:
        found = F.scaled_dot_product_attention(
            q * 2, k, v, m, **options, key_lengths=n, return_weights=results, return_lse=results
        )
        return sum(t.square().sum() for t in found) if results else found.square().sum()

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length, keys in ((6, 9), (11, 13)) if dynamic else ((6, 9),):
        inputs = [normal((2, 2, n, 8), n, torch.float32).to(device).requires_grad_() for n in (length, keys, keys)]
        m = normal((length, keys), 4, torch.float32).to(device).requires_grad_() if additive else None
        n = torch.tensor([2, keys], device=device) if lengths else None
        wanted = [*inputs, m] if additive else inputs
        ours = torch.autograd.grad(compiled(*inputs, m, n), wanted)
        eager = torch.autograd.grad(model(*inputs, m, n), wanted)
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_self_attention_with_dropout(device: str, dynamic: bool) -> None:
    """One tensor in three places, and random numbers in the graph."""
    torch._dynamo.reset()

    def model(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, None, 0.5, True)

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    x = normal((2, 2, 9, 8), 0, torch.float32).to(device).requires_grad_()
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    (gradient,) = torch.autograd.grad(first.sum(), x)
    assert gradient.isfinite().all()
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device: str, dtype: torch.dtype) -> None:
    q, k, v = (normal((2, 2, 6, 8), n, torch.float32).to(device).requires_grad_() for n in range(3))
    mask = normal((6, 6), 5, torch.float32).to(device)
    with torch.autocast(device, dtype):
        ours, theirs = F.scaled_dot_product_attention(q, k, v, mask), sdpa(q, k, v, mask)
        assert ours.dtype == theirs.dtype == dtype
        assert F.scaled_dot_product_attention(q.double(), k.double(), v.double()).dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    (gradient,) = torch.autograd.grad(ours.float().sum(), q)
    assert gradient.dtype == torch.float32


def test_functorch_says_so(device: str) -> None:
    q = torch.randn(1, 2, 3, 4, device=device)
    with pytest.raises(RuntimeError, match=r"functorch|setup_context|vmap|transforms"):
        torch.func.grad(lambda x: F.scaled_dot_product_attention(x, x, x).sum())(q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_equal_for_any_number_of_threads_and_from_run_to_run(dtype: torch.dtype) -> None:
    for shape, heads in (((2, 4, 200, 16), 2), ((1, 1, 700, 8), 1), ((3, 2, 2, 16), 2)):
        q = normal(shape, 0, dtype).requires_grad_()
        k, v = (normal((shape[0], heads, 500, shape[3]), n, dtype).requires_grad_() for n in (1, 2))
        m = normal((shape[2], 500), 3, torch.float32).requires_grad_()

        def step(q: Tensor = q, k: Tensor = k, v: Tensor = v, m: Tensor = m) -> list[Tensor]:
            torch.manual_seed(1)
            out = F.scaled_dot_product_attention(q, k, v, m, 0.1, enable_gqa=True, is_causal=True)
            return [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v, m))]

        with threads(1):
            alone = step()
        for count in (1, 2, 3):
            with threads(count):
                assert all(torch.equal(a, b) for a, b in zip(alone, step(), strict=True))


def test_memory_is_linear() -> None:
    """Forward and backward at 16384 positions: the weights alone would take a gigabyte."""
    code = """
import resource, torch
import pyseqnet.functional as F
q, k, v = (torch.randn(1, 1, 16384, 8, requires_grad=True) for _ in range(3))
F.scaled_dot_product_attention(q[:, :, :64], k[:, :, :64], v[:, :, :64]).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    result = run_python(code, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 64


def test_outputs_are_laid_out_for_multi_head_layers(device: str) -> None:
    """Heads inside positions, as torch's own CPU kernel does: merging the heads is a view."""
    q = torch.randn(2, 3, 5, 4, device=device)
    out = F.scaled_dot_product_attention(q, q, q)
    assert out.transpose(1, 2).is_contiguous()


# --- errors -------------------------------------------------------------------------------------------------------


def attention_arguments(**changes: Any) -> dict[str, Any]:
    q, k, v = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 7, 6), torch.randn(2, 4, 7, 3)
    return {"query": q, "key": k, "value": v, **changes}


REFUSED: dict[str, dict[str, Any]] = {
    "one dimension": {"query": torch.randn(6)},
    "head dimensions": {"key": torch.randn(2, 4, 7, 5)},
    "heads": {"key": torch.randn(2, 2, 7, 6), "value": torch.randn(2, 2, 7, 3)},
    "heads that do not divide": {"key": torch.randn(2, 3, 7, 6), "value": torch.randn(2, 3, 7, 3), "enable_gqa": True},
    "batches": {"key": torch.randn(3, 4, 7, 6), "value": torch.randn(3, 4, 7, 3)},
    "dtypes": {"key": torch.randn(2, 4, 7, 6).double()},
    "mask dtype": {"attn_mask": torch.ones(5, 7, dtype=torch.int32)},
    "mask of another float": {"attn_mask": torch.ones(5, 7, dtype=torch.float64)},
    "mask shape": {"attn_mask": torch.ones(5, 8, dtype=torch.bool)},
    "mask of one dimension": {"attn_mask": torch.ones(7, dtype=torch.bool)},
    "mask larger than the batch": {"attn_mask": torch.ones(3, 4, 5, 7, dtype=torch.bool)},
    "mask no tensor": {"attn_mask": [1]},
    "dropout": {"dropout_p": 1.5},
    "negative dropout": {"value": torch.randn(2, 4, 7, 6), "dropout_p": -0.5},
    "causal": {"is_causal": 1},
    "scale": {"scale": "a"},
    "query no tensor": {"query": 3},
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_are_torchs(name: str) -> None:
    arguments = attention_arguments(**REFUSED[name])
    places = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False}
    positional = [arguments.pop(name, defaults.get(name)) for name in places]
    with pytest.raises(Exception) as theirs:
        sdpa(*positional, **arguments)
    with pytest.raises(type(theirs.value)) as ours:
        F.scaled_dot_product_attention(*positional, **arguments)
    assert str(ours.value) == str(theirs.value)


OURS_ALONE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "lengths shape": ({"key_lengths": torch.ones(3, dtype=torch.int64)}, ValueError, r"key_lengths.*\(2,\).*\(3,\)"),
    "lengths dtype": ({"key_lengths": torch.ones(2)}, TypeError, "key_lengths.*int64.*float32"),
    "lengths no tensor": ({"key_lengths": [1, 2]}, TypeError, "key_lengths.*list"),
    "lengths too large": ({"key_lengths": torch.tensor([1, 8])}, ValueError, "key_lengths.*7.*8"),
    "lengths negative": ({"key_lengths": torch.tensor([1, -1])}, ValueError, "key_lengths.*-1"),
    "values": ({"value": torch.randn(2, 4, 8, 6)}, ValueError, "7.*8"),  # torch reads past the end
    "pattern": ({"pattern": None}, TypeError, "pattern"),
}


@pytest.mark.parametrize("name", OURS_ALONE)
def test_errors_of_our_own(name: str) -> None:
    changes, kind, words = OURS_ALONE[name]
    with pytest.raises(kind, match=words) as caught:
        F.scaled_dot_product_attention(**attention_arguments(**changes))
    assert ".cpp" not in str(caught.value)


def test_other_dtypes_are_refused_by_name() -> None:
    q = torch.randn(1, 2, 3, 4).to(torch.float8_e4m3fn)
    with pytest.raises((TypeError, RuntimeError, NotImplementedError)):
        F.scaled_dot_product_attention(q, q, q)


def hostile_calls() -> list[tuple[Any, tuple[Any, ...]]]:
    q, k, v = torch.randn(2, 4, 5, 6), torch.randn(2, 2, 7, 6), torch.randn(2, 2, 7, 3)
    lse, out = torch.randn(2, 4, 5), torch.randn(2, 4, 5, 3)
    none, options = (None, None, None), (0, 1.0, 0.0)
    forward, backward, weights = ops.attention_forward, ops.attention_backward, ops.attention_weights
    flags = (True, True, False)
    w = torch.ones(2, 4, 5, 7)
    return [
        (forward, (q[0], k, v, *none, *options)),
        (forward, (q, k[:1], v, *none, *options)),
        (forward, (q, k, v[:, :, :3], *none, *options)),
        (forward, (q, k[..., :3], v, *none, *options)),
        (forward, (q[:, :3], k, v, *none, *options)),
        (forward, (q, k[:, :0], v[:, :0], *none, *options)),
        (forward, (q, k.double(), v, *none, *options)),
        (forward, (q, k, v.half(), *none, *options)),
        (forward, (q[..., :0], k[..., :0], v, *none, *options)),
        (forward, (q.int(), k.int(), v.int(), *none, *options)),
        (forward, (q, k, v, torch.ones(5, 7, dtype=torch.bool), None, None, *options)),
        (forward, (q, k, v, torch.ones(2, 4, 6, 7, dtype=torch.bool), None, None, *options)),
        (forward, (q, k, v, torch.ones(1, 1, 5, 7).half(), None, None, *options)),
        (forward, (q, k, v, torch.ones(1, 1, 5, 7, dtype=torch.uint8), None, None, *options)),
        (forward, (q, k, v, None, torch.tensor([1]), None, *options)),
        (forward, (q, k, v, None, torch.tensor([1, 99]), None, *options)),
        (forward, (q, k, v, None, torch.tensor([1.0, 2.0]), None, *options)),
        (forward, (q, k, v, *none, 3, 1.0, 0.0)),
        (forward, (q, k, v, *none, 0, 1.0, 1.0)),
        (forward, (q, k, v, *none, 0, 1.0, -1.0)),
        (forward, (q, k, v, *none, 0, 1.0, math.nan)),
        (forward, (q, k, v, *none, 0, 1.0, 0.5)),  # no seed
        (forward, (q, k, v, None, None, torch.zeros(0, dtype=torch.int64), 0, 1.0, 0.5)),
        (weights, (q, k, lse[:, :2], *none, *options)),
        (weights, (q, k, lse.double(), *none, *options)),
        (backward, (out[..., :2], q, k, v, out, lse, *none, *none, *options, *flags)),
        (backward, (out, q, k, v, out[:, :2], lse, *none, *none, *options, *flags)),
        (backward, (out, q, k, v, out, lse[..., :2], *none, *none, *options, *flags)),
        (backward, (out, q, k, v, out, lse, *none, None, w, None, *options, *flags)),
        (backward, (out, q, k, v, out, lse, *none, w, w[0], None, *options, *flags)),
        (backward, (out, q, k, v, out, lse, *none, None, None, torch.ones(3), *options, *flags)),
        (backward, (out, q, k, v, out, lse, *none, *none, *options, True, True, True)),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(hostile_calls())))
def test_raw_operations_refuse_what_is_not_safe(number: int) -> None:
    operation, arguments = hostile_calls()[number]
    with pytest.raises((ValueError, RuntimeError)) as caught:
        operation(*arguments)
    assert ".cpp" not in str(caught.value)


def test_tables() -> None:
    for operation in ("forward", "weights", "delta", "backward", "mask_gradient"):
        names = KERNELS[f"attention_{operation}"]["cpu"]
        assert names[-1] == "reference"
        assert len(set(names)) == len(names)


def test_float64_is_exact_to_its_precision() -> None:
    inputs = [normal((1, 2, 9, 8), n).requires_grad_() for n in range(3)]
    ours = F.scaled_dot_product_attention(*inputs, return_lse=True)
    theirs = F.scaled_dot_product_attention_reference(*inputs, return_lse=True)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
