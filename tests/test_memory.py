"""Memory: calls leave nothing behind, and none takes more at once than docs/memory.md says."""

from __future__ import annotations

import ctypes
import gc
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from catalog import FUNCTIONS, Function
from support import ROOT, environment, threads
from torch.autograd.profiler import profile

import pyseqnet.functional as F
from pyseqnet import build_info

# ---------------------------------------------------------------- growth


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def allocated() -> int:
    """Bytes that malloc has handed out and not got back, torch's tensors among them."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("this C library does not count its allocations")
    libc.mallinfo2.restype = _Mallinfo
    gc.collect()
    found = libc.mallinfo2()
    return found.uordblks + found.hblkhd


CALLS, SECONDS, WARM_UP = 10_000, 0.5, 60
ALLOWED_BYTES, ALLOWED_OBJECTS = (
    200_000,
    400,
)  # caches of the interpreter and of malloc; one byte in 50 of a small tensor


def growth(call: Callable[[], Any], calls: int = CALLS, seconds: float = SECONDS) -> tuple[int, int, int]:
    """How often it was called (cheap ones `calls` times), and by how many bytes and Python objects it grew."""
    for _ in range(WARM_UP):
        call()
    begin = time.perf_counter()
    for _ in range(WARM_UP):
        call()
    cost = (time.perf_counter() - begin) / WARM_UP
    number = int(max(200, min(calls, seconds / cost)))
    objects, before = sys.getallocatedblocks(), allocated()
    for _ in range(number):
        call()
    return number, allocated() - before, sys.getallocatedblocks() - objects


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_calls_leave_nothing_behind(function: Function) -> None:
    """As many as half a second holds, at most 10 000; `python tests/test_memory.py` makes 10 000 of each."""
    inputs = function.inputs()
    with threads(1):
        number, size, objects = growth(lambda: step(function, inputs))
    assert size < ALLOWED_BYTES, f"{size} bytes in {number} calls"
    assert objects < ALLOWED_OBJECTS, f"{objects} objects in {number} calls"


def step(function: Function, inputs: list[torch.Tensor]) -> None:
    leaves = [x.detach().requires_grad_(function.differentiable) for x in inputs]
    results = [r for r in function.run(*leaves) if r.requires_grad]
    if results:
        torch.autograd.grad(sum(r.sum() for r in results), leaves, allow_unused=True)


def test_a_leak_is_noticed() -> None:
    kept: list[Any] = []
    assert growth(lambda: kept.append(torch.zeros(1)), calls=2000)[1] > ALLOWED_BYTES
    assert growth(lambda: kept.append([]), calls=2000)[2] > ALLOWED_OBJECTS


# ---------------------------------------------------------------- peaks


def table() -> dict[str, tuple[str, str]]:
    """Of each function the two formulas of docs/memory.md."""
    found = {}
    for line in (ROOT / "docs" / "memory.md").read_text().splitlines():
        if line.startswith("| `"):
            names, *formulas = (cell.strip() for cell in line.strip("|").split("|"))
            for name in re.findall(r"`(\w+)`", names):
                found[name] = tuple(formula.strip("`") for formula in formulas)
    return found


FORMULAS = table() if (ROOT / "docs" / "memory.md").exists() else {}
TILES = 384 * 1024
ISA = str(build_info()["cpu_isa"])

pytestmark = pytest.mark.skipif(not FORMULAS, reason="an installed package has no docs")


def peak(call: Callable[[], Any]) -> int:
    """The most bytes that lived at once, of those that torch's allocator handed out meanwhile."""
    with profile(use_kineto=True, profile_memory=True) as recorded:
        result = call()
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    now = top = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    del result
    return top


@dataclass(frozen=True)
class Case:
    name: str
    shapes: tuple[tuple[int, ...], ...]
    letters: dict[str, int]  # beside x (the first shape) and w (the others)
    call: Callable[..., Any] = lambda f, *tensors: f(*tensors)


def convolutions() -> Iterator[Case]:
    for n, c, k, size in ((1, 4, 8, 16), (4, 32, 64, 28), (2, 64, 32, 40)):
        y = n * k * size * size
        shapes = ((n, c, size, size), (k, c, 3, 3), (k,))
        for name in ("conv2d", "conv2d_relu", "conv2d_relu_max_pool2d"):
            yield Case(name, shapes, {"y": y}, lambda f, x, w, b: f(x, w, b, padding=1))
        shapes = ((n, c, size * size), (k, c, 5), (k,))
        for name in ("conv1d", "conv1d_relu"):
            yield Case(name, shapes, {"y": y}, lambda f, x, w, b: f(x, w, b, padding=2))
        for name, shape in (("max_pool1d", (n, c, size * size)), ("max_pool2d", (n, c, size, size))):
            y = n * c * size * size
            yield Case(name, (shape,), {"y": y}, lambda f, x: f(x, 3, 1, 1, return_indices=True))
            yield Case(name, (shape,), {"y": y // 2 if name == "max_pool1d" else y // 4}, lambda f, x: f(x, 2))
    for n, p in ((2, 6), (8, 12)):
        yield Case("locally_connected2d", ((n, 3, p + 2, p + 2), (p, p, 8, 3, 3, 3), (8, p, p)), {})


def recurrent() -> Iterator[Case]:
    for t, b, i, h in ((10, 4, 8, 8), (60, 16, 64, 128), (200, 2, 8, 32)):
        for name, gates in (("rnn", 1), ("gru", 3), ("lstm", 4), ("jordan", 1)):
            last = ((h, h), (h,)) if name == "jordan" else ()
            order = [(gates * h, i), (gates * h, h), (gates * h,), (gates * h,), *last]
            letters = {"N": t * b, "G": gates, "H": h, "D": 1}
            yield Case(name, ((t, b, i), *order), letters, lambda f, x, *p: f(x, None, list(p)))
            states = ((b, h),) * (2 if name == "lstm" else 1)
            weights = [(gates * h, i), (gates * h, h), *last[:1], (gates * h,), (gates * h,), *last[1:]]
            yield Case(
                f"{name}_cell", ((b, i), *states, *weights), {**letters, "N": b},
                (lambda f, x, h, c, *p: f(x, (h, c), *p)) if name == "lstm" else (lambda f, *tensors: f(*tensors)),
            )  # fmt: skip


def attentions() -> Iterator[Case]:
    for b, h, length, d in ((1, 2, 64, 16), (2, 4, 600, 64), (1, 1, 2048, 32)):
        rows, q = b * h, b * h * length * d
        letters = {"B": rows, "L": length, "S": length, "y": q, "q": q, "k": q, "v": q}
        shapes = ((b, h, length, d),) * 3
        for causal in (False, True):
            call = lambda f, q, k, v, causal=causal: f(q, k, v, is_causal=causal)  # noqa: E731
            yield Case("scaled_dot_product_attention", shapes, letters, call)
            call = lambda f, q, k, v, causal=causal: f(q, k, v, causal=causal)  # noqa: E731
            yield Case("linear_attention", shapes, {**letters, "w": rows * d * (d + 1)}, call)
        state = ((b, h, d, d), (b, h, d))
        one = rows * d
        yield Case(
            "linear_attention_step", (*((b, h, d),) * 3, *state),
            {**letters, "y": one, "q": one, "k": one, "v": one, "w": one * (d + 1)},
            lambda f, q, k, v, s, z: f(
                q, k, v, tuple(t.to(torch.float64 if q.dtype == torch.float64 else torch.float32).abs() for t in (s, z))
            ),
        )  # fmt: skip
        if length < 1000:
            yield Case("additive_attention", (*((rows, length, d),) * 3, (d,)), letters)


def chains() -> Iterator[Case]:
    for t, b, c in ((20, 4, 10), (200, 16, 40), (60, 2, 120)):
        targets, labels = torch.randint(1, c, (b, t // 4)), [t // 4] * b
        yield Case(
            "ctc_loss", ((t, b, c),), {"T": t, "C": c},
            lambda f, x, g=targets, n=labels: f(x, g, [x.shape[0]] * x.shape[1], n, from_logits=True),
        )  # fmt: skip
        tags = torch.randint(c, (b, t))
        shapes = ((b, t, c), (c,), (c,), (c, c))
        yield Case("crf_log_likelihood", shapes, {"C": c}, lambda f, x, *p, tags=tags: f(x, tags, None, *p))
        yield Case("crf_log_partition", shapes, {"C": c}, lambda f, x, *p: f(x, None, *p))
        yield Case("crf_marginals", shapes, {"C": c}, lambda f, x, *p: f(x, None, *p))
        for n in (1, 3):
            yield Case("crf_decode", shapes, {"n": n}, lambda f, x, *p, n=n: f(x, None, *p, n))


CASES = [*convolutions(), *recurrent(), *attentions(), *chains()]


def test_every_function_has_a_formula() -> None:
    names = {name for name in F.__all__ if not name.endswith("_reference")}
    assert set(FORMULAS) == names == {case.name for case in CASES}


def excess(case: Case, dtype: torch.dtype, isa: str, count: int) -> Iterator[tuple[str, int, int]]:
    """Of a call and of a training step: (which, bytes measured, bytes allowed)."""
    sizes = [math.prod(shape) for shape in case.shapes]
    letters = {"a": max(4, dtype.itemsize), "t": count, "x": sizes[0], "w": sum(sizes[1:])} | case.letters
    inputs = [torch.randn(shape).to(dtype) for shape in case.shapes]
    f = getattr(F, case.name)

    def train() -> Any:
        leaves = [x.requires_grad_() for x in inputs]
        results = case.call(f, *leaves)
        result = results if isinstance(results, torch.Tensor) else results[0]
        return results, torch.autograd.grad(result, leaves, torch.ones((), dtype=result.dtype).expand(result.shape))

    with environment(PYSEQNET_ISA=isa), threads(count):
        for which, formula in zip(("call", "training step"), FORMULAS[case.name], strict=True):
            if not formula:
                continue
            with torch.set_grad_enabled(which != "call"):
                measured = peak(train if which != "call" else lambda: case.call(f, *inputs))
            yield which, measured, eval(formula, {}, letters) + TILES * (count + 1)


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_no_call_takes_more_than_its_formula(name: str) -> None:
    cases = [case for case in CASES if case.name == name]
    for case in cases:
        for dtype, isa, count in (
            (torch.float32, ISA, 1), (torch.float32, "avx2", 2), (torch.bfloat16, ISA, 2), (torch.float64, ISA, 1),
        ):  # fmt: skip
            if dtype == torch.float64 and case is not cases[0]:
                continue  # plain loops
            for which, measured, allowed in excess(case, dtype, isa, count):
                assert measured <= allowed, f"{which} {case.shapes} {dtype} {isa} threads {count}"


def test_the_formulas_are_near() -> None:
    """Of every function one case of megabytes takes at least a quarter of what is allowed."""
    for name in ("conv2d", "max_pool2d", "lstm", "scaled_dot_product_attention", "linear_attention"):
        cases = [case for case in CASES if case.name == name]
        shares = [m / allowed for case in cases for _, m, allowed in excess(case, torch.float32, ISA, 1)]
        assert max(shares) > 0.25, name


if __name__ == "__main__":
    for one in FUNCTIONS:
        data = one.inputs()
        print(one.name, *growth(lambda one=one, data=data: step(one, data), seconds=math.inf))
