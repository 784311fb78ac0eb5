"""Additive attention: every kernel of the dispatch table against plain torch and float64, and the public function."""

from __future__ import annotations

import math
import resource
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    DEVICES,
    DTYPES,
    VIEWS,
    Implementation,
    allowed_error,
    dtypes,
    error_of,
    implementations,
    is_beyond_this_machine,
    is_refusal,
    normal,
    poisoned_memory,
    seeds,
    threads,
    view_as,
)
from torch import Tensor

import pyseqnet.functional as F

EXAMPLES = 40
ops = torch.ops.pyseqnet
NAMES = ("out", "weights", "gq", "gk", "gv", "gw", "gbias")


@dataclass(frozen=True)
class Problem:
    B: int
    L: int
    S: int
    D: int
    E: int
    bias: bool
    lengths: bool
    gweights: bool
    scale: float  # of query and key: near 0 and far from it the kernels take other ways
    dtype: torch.dtype
    view: str
    seed: int

    def tensors(self) -> tuple[list[Tensor], Tensor | None]:
        """[query, key, value, weight, bias?], key_lengths; in the problem's dtype."""
        shapes = ((self.B, self.L, self.D), (self.B, self.S, self.D), (self.B, self.S, self.E), (self.D,))
        made = [normal(shape, self.seed + n) for n, shape in enumerate(shapes)]
        made[:2] = (t * self.scale for t in made[:2])
        if self.bias:
            made.append(normal((self.D,), self.seed + 4) * self.scale)
        generator = torch.Generator().manual_seed(self.seed)
        lengths = torch.randint(0, self.S + 1, (self.B,), generator=generator) if self.lengths else None
        return [t.to(self.dtype) for t in made], lengths

    def gradients(self) -> tuple[Tensor, Tensor]:
        shapes = ((self.B, self.L, self.E), (self.B, self.L, self.S))
        gout, gweights = (normal(shape, self.seed + 10 + n).to(self.dtype) for n, shape in enumerate(shapes))
        return gout, gweights if self.gweights else torch.zeros_like(gweights)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    length = st.one_of(st.integers(1, 5), st.integers(1, 70))
    width = st.one_of(st.sampled_from((1, 8, 16, 32)), st.integers(1, 40))
    return Problem(
        B=draw(st.integers(1, 3)),
        L=draw(st.one_of(length, st.just(130))),
        S=draw(st.one_of(length, st.just(300))),
        D=draw(width),
        E=draw(width),
        bias=draw(st.booleans()),
        lengths=draw(st.booleans()),
        gweights=draw(st.booleans()),
        scale=draw(st.sampled_from((1.0, 1.0, 0.01, 8.0, 60.0))),
        dtype=draw(dtypes),
        view=draw(st.sampled_from([v for v in VIEWS if v not in ("channels_last", "expanded")])),
        seed=draw(seeds),
    )


def plain(p: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a user would write, in this dtype, with gradients."""
    inputs, lengths = p.tensors()
    leaves = [t.to(dtype).requires_grad_() for t in inputs]
    query, key, value, weight = leaves[:4]
    total = query.unsqueeze(2) + key.unsqueeze(1)
    scores = torch.tanh(total + leaves[4] if p.bias else total) @ weight
    if lengths is not None:
        visible = (torch.arange(p.S) < lengths.unsqueeze(1)).unsqueeze(1)
        scores = scores.masked_fill(~visible, -math.inf)
        scores = torch.where(visible.any(-1, keepdim=True), scores, 0.0)
        weights = torch.softmax(scores, -1) * visible
    else:
        weights = torch.softmax(scores, -1)
    out = weights @ value
    gradients = torch.autograd.grad([out, weights], leaves, [g.to(dtype) for g in p.gradients()])
    return dict(zip(NAMES, (out.detach(), weights.detach(), *gradients), strict=False))


def magnitudes(p: Problem, exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums of absolute terms. Rounding moves a score by ulps of sum |w|, and weights by as much relatively."""
    inputs, _ = p.tensors()
    value, weight = inputs[2].double().abs(), inputs[3].double().abs()
    gout, gweights = (g.double().abs() for g in p.gradients())
    wobble = 1 + weight.sum()
    out = wobble * value.amax((1, 2), keepdim=True) if value.numel() else wobble
    dz = exact["weights"] * (gout.sum(2, keepdim=True) * value.amax() + gweights) * 2 * wobble
    gq, gk = dz.sum(2).amax() * weight.max(), dz.sum(1).amax() * weight.max()
    total = dz.sum()
    gv = wobble * (exact["weights"].transpose(1, 2) @ gout)
    return {
        "out": out,
        "weights": wobble * exact["weights"],
        "gq": gq,
        "gk": gk,
        "gv": gv,
        "gw": total,
        "gbias": total * weight.max(),
    }


def rounding_of_delta(p: Problem, exact: dict[str, Tensor]) -> Tensor:
    """Backward knows the output as it was stored: its rounding moves every dz of a row by P times this."""
    gout, _ = p.gradients()
    return torch.finfo(p.dtype).eps / 2 * (gout.double().abs() * exact["out"].abs()).sum(-1)


def ours(p: Problem, entry: Implementation, exact: dict[str, Tensor]) -> dict[str, Tensor]:
    inputs, lengths = p.tensors()
    gout, gweights = p.gradients()
    query, key, value = (view_as(t.to(entry.device), p.view) for t in inputs[:3])
    weight = view_as(inputs[3].to(entry.device), "contiguous" if p.view == "transposed" else p.view)
    bias = inputs[4].to(entry.device) if p.bias else None
    lengths = None if lengths is None else lengths.to(entry.device)
    if lengths is not None:  # padding is never read
        padding = torch.arange(p.S, device=entry.device) >= lengths.unsqueeze(1)
        key, value = (t.masked_fill(padding.unsqueeze(2), math.nan) for t in (key, value))
    out, lse = ops.additive_attention_forward(query, key, value, weight, bias, lengths)
    weights = ops.additive_attention_weights(query, key, weight, lse, bias, lengths)
    with poisoned_memory(), entry.pinned():
        if entry.operation.endswith("forward"):
            return {"out": ops.additive_attention_forward(query, key, value, weight, bias, lengths)[0]}
        if entry.operation.endswith("weights"):
            return {"weights": ops.additive_attention_weights(query, key, weight, lse, bias, lengths)}
        gout = view_as(gout.to(entry.device), p.view)
        saved = (weights, gweights.to(entry.device)) if p.gweights else (None, None)
        found = ops.additive_attention_backward(
            gout, query, key, value, weight, out, lse, bias, lengths, *saved, True, True
        )
    return {name: found[n] for n, name in enumerate(NAMES[2:]) if name in exact}


@pytest.mark.parametrize("entry", implementations("additive_attention"))
def test_kernels(entry: Implementation) -> None:
    @settings(max_examples=EXAMPLES, deadline=None)
    @given(problems())
    def check(p: Problem) -> None:
        exact, yardstick = plain(p, torch.float64), plain(p, p.dtype)
        magnitude = magnitudes(p, exact)
        try:
            results = ours(p, entry, exact)
        except RuntimeError as error:
            if is_beyond_this_machine(error):
                pytest.skip(str(error))
            if is_refusal(error):
                return
            raise
        for name, result in results.items():
            factor = 2.0 if name in ("out", "weights") else 3.0
            allowed = allowed_error(yardstick[name], exact[name], magnitude[name], factor)
            if name in ("gq", "gk", "gw", "gbias"):
                rounding = rounding_of_delta(p, exact)
                largest_weight = 1.0 if name == "gw" else p.tensors()[0][3].abs().max().item()
                allowed += largest_weight * (rounding.max() if name == "gq" else rounding.sum()).item()
            assert error_of(result, exact[name]) <= allowed, (name, error_of(result, exact[name]), allowed)

    check()


def test_golden_numbers() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]])
    out, weights = F.additive_attention(tokens, tokens, tokens, torch.ones(2), return_weights=True)
    expected = torch.tensor([[[0.594636, 1.216091], [0.807691, 0.794729], [0.683186, 1.009679]]])
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_function_and_reference_agree(device: str, dtype: torch.dtype) -> None:
    shapes = ((2, 5, 7), (2, 9, 7), (2, 9, 4), (7,), (7,))
    leaves = [normal(s, n).to(device, dtype).requires_grad_() for n, s in enumerate(shapes)]
    lengths = torch.tensor([3, 9], device=device, dtype=torch.int32)
    results = []
    for function in (F.additive_attention, F.additive_attention_reference):
        out, weights = function(*leaves[:4], bias=leaves[4], key_lengths=lengths, return_weights=True)
        gradients = torch.autograd.grad([out.square().sum() + weights.square().sum()], leaves)
        results.append([out, weights, *gradients])
    tolerance = 40 * torch.finfo(dtype).eps
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance * other.abs().max().item(), rtol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_padding_never_leaks(device: str) -> None:
    made = [normal(s, 1, torch.float32) for s in ((2, 3, 4), (2, 6, 4), (2, 6, 5), (4,))]
    lengths = torch.tensor([2, 0])
    runs = []
    for fill in (0.0, math.nan, math.inf):
        for b, length in enumerate(lengths.tolist()):
            made[1][b, length:], made[2][b, length:] = fill, fill
        leaves = [t.to(device, copy=True).requires_grad_() for t in made]
        out, weights = F.additive_attention(*leaves, key_lengths=lengths.to(device), return_weights=True)
        results = [out, weights, *torch.autograd.grad(out.square().sum() + weights.square().sum(), leaves)]
        assert all(r.isfinite().all() for r in results)
        assert not any(hidden.any() for hidden in (out[1], weights[1], weights[0, :, 2:]))
        assert all(not gradient[1].any() for gradient in results[2:5])
        runs.append(results)
    assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(runs[0], run, strict=True))


def test_nan_and_infinity_go_where_they_belong() -> None:
    query, key, value = (normal((1, 4, 20), n, torch.float32) for n in range(3))
    query[0, 1, 3] = math.nan
    query[0, 2, 3] = math.inf  # tanh is 1
    out = F.additive_attention(query, key, value, torch.ones(20))
    exact = F.additive_attention_reference(query.double(), key.double(), value.double(), torch.ones(20).double())
    assert out[0, 1].isnan().all()
    torch.testing.assert_close(out.double(), exact, equal_nan=True, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=["no batch", "no queries", "no keys"])
def test_empty(shape: tuple[int, int, int]) -> None:
    b, length, keys = shape
    leaves = [torch.randn(s, requires_grad=True) for s in ((b, length, 5), (b, keys, 5), (b, keys, 6), (5,), (5,))]
    out, weights = F.additive_attention(*leaves[:4], bias=leaves[4], return_weights=True)
    assert out.shape == (b, length, 6)
    assert weights.shape == shape
    assert not out.any()
    assert all(not g.any() for g in torch.autograd.grad(out.sum() + weights.sum(), leaves))


def test_same_bits_for_any_number_of_threads() -> None:
    leaves = [normal(s, 2, torch.float32).requires_grad_() for s in ((2, 200, 33), (2, 150, 33), (2, 150, 20), (33,))]
    runs = []
    for count in (1, 2, 3):
        with threads(count):
            out, weights = F.additive_attention(*leaves, return_weights=True)
            runs.append([out, weights, *torch.autograd.grad(out.square().sum() + weights.square().sum(), leaves)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_derivatives() -> None:
    leaves = [normal(s, 3).requires_grad_() for s in ((2, 3, 4), (2, 5, 4), (2, 5, 2), (4,), (4,))]
    lengths = torch.tensor([5, 2])

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return F.additive_attention(*inputs[:4], bias=inputs[4], key_lengths=lengths, return_weights=True)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    # one tensor in every place, of which one gradient is asked for twice
    one = normal((1, 4, 4), 4).requires_grad_()
    weight = normal((4,), 5)
    assert torch.autograd.gradgradcheck(lambda x: F.additive_attention(x, x, x, weight), [one])


@pytest.mark.parametrize("view", [v for v in VIEWS if v != "channels_last"])
def test_gradients_that_arrive_as_views(view: str) -> None:
    leaves = [normal(s, 6, torch.float32).requires_grad_() for s in ((2, 6, 3), (2, 4, 3), (2, 4, 3), (3,))]
    out, weights = F.additive_attention(*leaves, return_weights=True)
    gradients = [normal(tuple(t.shape), 7, torch.float32) for t in (out, weights)]
    if view == "expanded":
        gradients = [g[:1].expand(g.shape) for g in gradients]
    views = gradients if view == "expanded" else [view_as(g, view) for g in gradients]
    found = torch.autograd.grad([out, weights], leaves, views, retain_graph=True)
    wanted = torch.autograd.grad([out, weights], leaves, [g.clone() for g in gradients])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_compiles_to_one_graph() -> None:
    leaves = [normal(s, 8, torch.float32).requires_grad_() for s in ((2, 6, 3), (2, 4, 3), (2, 4, 5), (3,), (3,))]

    def function(*inputs: Tensor) -> Tensor:
        out, weights = F.additive_attention(*inputs[:4], bias=inputs[4], return_weights=True)
        return out.square().sum() + weights.square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for one, other in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (function, compiled)), strict=True):
        torch.testing.assert_close(one, other)


def test_autocast() -> None:
    inputs = [torch.randn(s) for s in ((2, 6, 3), (2, 4, 3), (2, 4, 5), (3,))]
    with torch.autocast("cpu", torch.bfloat16):
        assert F.additive_attention(*inputs).dtype == torch.bfloat16


def test_memory_is_linear() -> None:
    length, width = 2500, 64  # the plain way: 1.6 GB for one tensor
    leaves = [normal((1, length, width), n, torch.float32).requires_grad_() for n in range(3)]
    weight = torch.ones(width, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    F.additive_attention(*leaves, weight).square().sum().backward()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 100, f"{grown} MiB"


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"query": torch.zeros(3, 4)}, ValueError, "query must have 3 dimensions"),
        ({"key": torch.zeros(2, 5, 3)}, ValueError, r"key must have shape \(2, S, 4\)"),
        ({"key": torch.zeros(1, 5, 4)}, ValueError, "key must have shape"),
        ({"value": torch.zeros(2, 6, 4)}, ValueError, r"value must have shape \(2, 5, E\)"),
        ({"weight": torch.zeros(1, 4)}, ValueError, r"weight must have shape \(4,\)"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \(4,\)"),
        ({"bias": torch.zeros(4, dtype=torch.float64)}, TypeError, "bias must have the query's dtype"),
        ({"value": torch.zeros(2, 5, 4, dtype=torch.float16)}, TypeError, "value must have the query's dtype"),
        ({"query": None}, TypeError, "query must be a tensor"),
        ({"key_lengths": torch.tensor([1])}, ValueError, "key_lengths must have shape"),
        ({"key_lengths": torch.tensor([1.0, 2.0])}, TypeError, "key_lengths must be int64 or int32"),
        ({"key_lengths": [1, 2]}, TypeError, "key_lengths must be a tensor"),
        ({"key_lengths": torch.tensor([1, 6])}, ValueError, "key_lengths must be between 0 and the number of keys"),
    ],
)
def test_errors(change: dict, error: type[Exception], text: str) -> None:
    arguments = {
        "query": torch.zeros(2, 3, 4),
        "key": torch.zeros(2, 5, 4),
        "value": torch.zeros(2, 5, 6),
        "weight": torch.zeros(4),
        **change,
    }
    with pytest.raises(error, match=text):
        F.additive_attention(**arguments)


def test_other_dtypes_are_refused() -> None:
    inputs = [torch.zeros(s, dtype=torch.int32) for s in ((2, 3, 4), (2, 5, 4), (2, 5, 6), (4,))]
    with pytest.raises(TypeError, match="expected one of float32"):
        F.additive_attention(*inputs)
