"""Gradients of softmax attention in every way that torch asks for them; compilers, threads, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import (
    normal,
    run_python,
    threads,
)
from torch import Tensor

import pyseqnet.functional as F
from pyseqnet import masks
from pyseqnet.functional._attention_reference import Extras, Options

ops = torch.ops.pyseqnet
sdpa = torch.nn.functional.scaled_dot_product_attention

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
    everything = Extras(
        mask=torch.rand(2, 1, 6, 7, device=device) > 0.2,
        bias=normal((1, 4, 1, 7), 3, torch.float32).to(device),
        slopes=torch.rand(4, device=device),
        key_lengths=torch.tensor([3, 7], device=device),
        pattern=masks.Local(3).compile(6, 7, device=device),
        seed=torch.tensor([5], device=device),
    )
    ends = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)
    packed = Extras(cu_q=ends, cu_k=ends)
    plain = Options(1, 0.5, 0.0, 0.0, 0, 0)
    for inputs, extras, options in (
        ((q, k, v), Extras(), plain),
        ((inside, k, v), everything, Options(1, 0.5, 9.0, 0.2, 0, 0)),
        ((q[:1], k[:1, :, :6], v[:1, :, :6]), packed, Options(2, 0.5, 0.0, 0.0, 4, 4)),
    ):
        out, lse = ops.attention_forward(*inputs, *extras, *options)
        weights = ops.attention_weights(*inputs[:2], lse, *extras, *options)
        yield ops.attention_forward, (*inputs, *extras, *options)
        yield ops.attention_weights, (*inputs[:2], lse, *extras, *options)
        if options is plain:
            yield ops.attention_plain, (*inputs, True, 0.5)
        for need in (True, False):
            more = (weights, torch.ones_like(weights), torch.ones_like(lse)) if need else (None, None, None)
            needs = (need, True, need and extras.bias is not None)
            yield ops.attention_backward, (out, *inputs, out, lse, *extras, *more, *options, *needs)


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


MEMORY = {
    "dropout": "dropout_p=0.1, is_causal=True",
    "bias": "bias=torch.randn(1, 1, 1, n, requires_grad=True), return_lse=True, pattern=masks.Local(64)",
    "alibi": "alibi_slopes=torch.ones(1), softcap=9.0, pattern=masks.Local(64) | masks.Strided(512) | masks.Global(1)",
    "packed": "cu_seqlens_q=ends, cu_seqlens_k=ends, is_causal=True",
}


@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_linear(name: str, dtype: str) -> None:
    """What forward and what backward add to the peak, at 4096, 8192 and 16384 positions: the weights alone would take
    64 MB, 256 MB and a gigabyte (half in bfloat16)."""
    code = f"""
import resource, torch
import pyseqnet.functional as F
from pyseqnet import masks
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for n in (64, 4096, 8192, 16384):
    q, k, v = (torch.randn(1, 1, n, 8, dtype=torch.{dtype}, requires_grad=True) for _ in range(3))
    ends = torch.tensor([0, n], dtype=torch.int32)
    before = peak()
    out = F.scaled_dot_product_attention(q, k, v, {MEMORY[name]})
    between = peak()
    sum(o.float().sum() for o in (out if isinstance(out, tuple) else (out,))).backward()
    if n > 64:
        print(between - before, peak() - between)
"""
    result = run_python(code, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    added = [float(word) for word in result.stdout.split()]
    assert len(added) == 6
    for n, forward, backward in zip((4096, 8192, 16384), added[::2], added[1::2], strict=True):
        assert forward < 8 + n / 1024
        assert backward < 8 + n / 1024


def test_outputs_are_laid_out_for_multi_head_layers(device: str) -> None:
    """Heads inside positions, as torch's own CPU kernel does: merging the heads is a view."""
    q = torch.randn(2, 3, 5, 4, device=device)
    out = F.scaled_dot_product_attention(q, q, q)
    assert out.transpose(1, 2).is_contiguous()
