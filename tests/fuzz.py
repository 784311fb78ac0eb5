"""Random problems over all functions, dtypes, layouts and kernels, against the references in plain torch.

    make fuzz FUZZ_SECONDS=600        python tests/fuzz.py --seconds 600 [--function gru] [--seed 7]

Every batch logs its seed, by which it is drawn again. A problem that fails is shrunk and printed, and the run goes on;
the exit status says whether there was one. Found cases are kept in tests/test_fuzz.py; tests/fuzz_summary.py writes
bench/results/fuzz.md from a log.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fuzz_problems import FUNCTIONS, Problem, amplification, problems
from hypothesis import HealthCheck, Phase, given, seed, settings
from support import ROOT, environment, is_beyond_this_machine, is_refusal, poisoned_memory, threads
from torch import Tensor

import pyseqnet.functional as F
from pyseqnet import _C

BATCH = 200
WITHOUT_GRADIENTS = ("crf_marginals", "crf_decode")
TORCH, ULPS, ACCUMULATED = 4.0, 16.0, 256.0  # the bound, in torch's errors, ulp of the result and of the sums
EVERY = 4  # of so many problems one is held against torch in its own dtype in any case: dtypes of results
INPUTS, DRAWS = 2.0, 4  # and where that is passed, in what the exact results move when inputs move by an ulp


class Miss(AssertionError):
    """A result that is off, a crash, or an error that is no refusal."""


class Off(Miss):
    """A result whose error is beyond the bound."""


def parts(result: Any) -> Iterator[Any]:
    if isinstance(result, (tuple, list)):
        for part in result:
            yield from parts(part)
    else:
        yield result


def floating(result: Any) -> list[Tensor]:
    return [t for t in parts(result) if isinstance(t, Tensor) and t.is_floating_point()]


def exactly(result: Any) -> list[Any]:
    """What has no error: indices, paths."""
    numbers = (t for t in parts(result) if not (isinstance(t, Tensor) and t.is_floating_point()))
    return [t.tolist() if isinstance(t, Tensor) else t for t in numbers]


def step(problem: Problem, f: Callable[..., Any], inputs: list[Tensor]) -> tuple[list[Tensor], list[Any]]:
    """Outputs and gradients, against directions that are the same for all dtypes; and what is exact."""
    leaves = [x.detach().requires_grad_(problem.function not in WITHOUT_GRADIENTS) for x in inputs]
    result = problem.call(f, *leaves)
    outputs = floating(result)
    generator = torch.Generator().manual_seed(problem.seed)
    directions = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
    if problem.integers:
        directions = [d.round() for d in directions]
    # What is not finite, a loss that no alignment has, has no gradient to compare.
    losses = [(torch.where(y.isfinite(), y, 0) * d.to(y.dtype)).sum() for y, d in zip(outputs, directions, strict=True)]
    losses = [loss for loss in losses if loss.requires_grad]
    wanted = [x for x in leaves if x.numel()] if losses else []
    found = torch.autograd.grad(sum(losses), wanted, allow_unused=True) if wanted else []
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]
    return [*(y.detach() for y in outputs), *grads], exactly(result)


def compare(
    ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor], terms: float, moved: list[float] | None = None
) -> None:
    """`terms`: how large the terms of a sum are together that may itself be zero. `moved`: see `sensitivity`."""
    if len(ours) != len(exact):
        raise Miss(f"{len(ours)} results, {len(exact)} expected")
    scale = max((float(e[e.isfinite()].abs().max()) for e in exact if e.isfinite().any()), default=0.0)
    scale = max(scale, float(terms))
    for number, (a, b, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        where = f"result {number} of {len(ours)}, shape {tuple(e.shape)}"
        if a.shape != e.shape or a.dtype != b.dtype:
            raise Miss(f"{where}: {tuple(a.shape)} {a.dtype}, expected {b.dtype}")
        if not e.numel():
            continue
        a, b = a.double(), b.double()
        finite = e.isfinite() & b.isfinite()
        if not torch.equal(a.isfinite() | ~finite, torch.ones_like(finite)):
            raise Miss(f"{where}: {(finite & ~a.isfinite()).sum()} values are not finite")
        infinite = e.isinf() & (e == b)
        if not torch.equal(a[infinite], e[infinite]):
            raise Miss(f"{where}: {(a[infinite] != e[infinite]).sum()} values are not infinite")
        a, b, e = (t.where(finite, 0) for t in (a, b, e))
        error, torchs, size = ((t.abs().max().item()) for t in (a - e, b - e, e))
        dtype = ours[number].dtype
        accumulated = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        least = torch.finfo(dtype).smallest_normal * (1 if dtype == torch.float16 else 0)
        # The output that a backward reads was rounded to the dtype: where its terms cancel, that is what is left.
        coarse = max(ACCUMULATED * accumulated, 2 * torch.finfo(dtype).eps) * scale
        bound = TORCH * torchs + ULPS * torch.finfo(dtype).eps * size + coarse + least
        # In float64 the exact results have such an error of their own.
        bound += 0 if moved is None else INPUTS * moved[number] * (2 if dtype == torch.float64 else 1)
        if not error <= bound or math.isnan(error):
            raise Off(f"{where}: error {error:.3g}, bound {bound:.3g} (torch's {torchs:.3g}, size {size:.3g})")


def check(problem: Problem) -> str:
    """Runs one problem: "passed", "refused" by the pinned kernel, or raises `Miss`."""
    inputs = problem.tensors()
    reference = getattr(F, f"{problem.function}_reference")
    with environment(PYSEQNET_FORCE=problem.kernel or None), threads(problem.threads), poisoned_memory():
        try:
            ours, our_paths = step(problem, getattr(F, problem.function), inputs)
        except RuntimeError as error:
            if problem.kernel and (is_refusal(error) or is_beyond_this_machine(error)):
                return "refused"
            raise Miss(f"{type(error).__name__}: {error}") from error
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            raise Miss(f"{type(error).__name__}: {error}") from error
    exact, exact_paths = step(problem, reference, [x.double() for x in inputs])
    if our_paths != exact_paths:
        raise Miss(f"indices or paths {our_paths}, expected {exact_paths}")
    chain = problem.function.startswith("crf_")  # gradients of transitions are differences of counts
    terms: float = math.prod(problem.shapes[0][:2]) if chain else 1
    if problem.function.startswith("linear_attention"):
        terms = amplification(problem.options, inputs)
    if (
        problem.seed % EVERY
    ):  # most are near enough whatever error torch makes, which costs a third of a problem to know
        try:
            compare(ours, [e.to(a.dtype) for a, e in zip(ours, exact, strict=False)], exact, terms)
            return "passed"
        except Miss:
            pass
    theirs = step(problem, reference, inputs)[0]
    try:
        compare(ours, theirs, exact, terms)
    except Off:
        compare(ours, theirs, exact, terms, sensitivity(problem, reference, inputs, exact))
    return "passed"


def sensitivity(
    problem: Problem, reference: Callable[..., Any], inputs: list[Tensor], exact: list[Tensor]
) -> list[float]:
    """How far each exact result moves when every input does by an ulp: a long recurrence may be chaotic, where torch
    is near by luck."""
    generator = torch.Generator().manual_seed(problem.seed)
    moved = [0.0] * len(exact)
    for _ in range(DRAWS):
        steps = [torch.randint(2, x.shape, generator=generator).double() * 2 - 1 for x in inputs]
        nearby = [x.double() * (1 + s * torch.finfo(x.dtype).eps) for x, s in zip(inputs, steps, strict=True)]
        for n, (a, e) in enumerate(zip(step(problem, reference, nearby)[0], exact, strict=True)):
            apart = (a - e)[e.isfinite() & a.isfinite()]
            moved[n] = max(moved[n], float(apart.abs().max()) if apart.numel() else 0.0)
    return moved


def batch(
    number: int, function: str | None, counts: Counter[str], examples: int = BATCH, shrink: bool = True
) -> str | None:
    """One batch of problems; the words of its smallest miss. `counts`: problems by answer, function, dtype, kernel."""

    @seed(number)
    @settings(
        max_examples=examples, deadline=None, database=None, print_blob=False,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(problems(_C.dispatch_tables(), function))
    def run(problem: Problem) -> None:
        last["problem"] = problem
        answer = check(problem)
        kinds = (problem.function, str(problem.dtype).removeprefix("torch."), problem.kernel or "own choice")
        counts.update((answer, *kinds) if answer == "passed" else (answer,))

    last: dict[str, Problem] = {}
    try:
        run()
    except Miss as miss:  # after shrinking, the smallest one is run last
        return f"{miss}\n    {last['problem']}"
    return None


def commit() -> str:
    """Of the sources that are run, by which a seed draws the same problems again."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return answer.stdout.strip() or "no commit"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--function", choices=sorted(FUNCTIONS))
    parser.add_argument("--seed", type=int, help="run this batch alone")
    parser.add_argument("--log", type=Path, help="append every batch to this file, as lines of JSON")
    options = parser.parse_args()
    begin, total, misses, version = time.monotonic(), Counter[str](), 0, commit()
    numbers = (
        iter([options.seed]) if options.seed is not None else iter(lambda: random.SystemRandom().getrandbits(32), 0)
    )
    for number in numbers:
        counts = Counter[str]()
        words = batch(number, options.function, counts)
        total += counts
        if words is not None:
            misses += 1
            print(f"MISS in batch {number}: {words}", flush=True)
        if options.log:
            line = {"seed": number, "function": options.function, "commit": version, "counts": counts, "miss": words}
            with options.log.open("a") as log:
                log.write(json.dumps(line) + "\n")
        if time.monotonic() - begin > options.seconds:
            break
    kinds = ", ".join(f"{name} {total[name]}" for name in sorted(FUNCTIONS) if total[name])
    print(f"{total['passed']} problems passed, {total['refused']} refused by a pinned kernel, {misses} missed: {kinds}")
    return int(misses > 0)


if __name__ == "__main__":
    sys.exit(main())
