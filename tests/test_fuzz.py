"""A few problems of `make fuzz` for every function, that its checks notice a fault, and cases that it has found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import fuzz
import pytest
import torch
from fuzz_problems import FUNCTIONS
from hypothesis import given, settings
from torch import Tensor

import pyseqnet.functional as F
from pyseqnet import _C

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def test_every_function_is_fuzzed() -> None:
    names = {name for name in F.__all__ if not name.endswith("_reference")}
    assert set(FUNCTIONS) == names


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_some_problems(name: str) -> None:
    counts: Counter[str] = Counter()

    @settings(max_examples=25)
    @given(fuzz.problems(_C.dispatch_tables(), name))
    def run(problem: fuzz.Problem) -> None:
        counts[fuzz.check(problem)] += 1

    run()
    assert counts["passed"] > 0


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_planted_fault_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part in a hundred of the first output, or of what flows back."""
    honest = getattr(F, name)

    def faulty(*args: Any, **options: Any) -> Any:
        result = honest(*args, **options)
        if isinstance(result, Tensor):
            return result * 1.01
        return (result[0] * 1.01 if isinstance(result[0], Tensor) else result[0], *result[1:])

    monkeypatch.setattr(F, name, faulty)
    assert fuzz.batch(1, name, Counter(), examples=40, shrink=False) is not None


def run(name: str, *shapes: tuple[int, ...], call: Callable[..., Any], **more: Any) -> str:
    """A found case."""
    plain: dict[str, Any] = {"options": {}, "dtype": torch.float32, "views": ("contiguous",) * len(shapes)}
    plain |= {"seed": 0, "kernel": "", "threads": 1, **more}
    return fuzz.check(fuzz.Problem(name, shapes, call=call, **plain))


def test_a_chain_of_one_tag_has_gradients_of_rounding_only() -> None:
    for batch, steps, dtype in ((6, 1, torch.float32), (4, 15, torch.float64)):
        potentials = ((batch, steps, 1), (1,), (1,), (1, 1))
        tags = torch.zeros(batch, steps, dtype=torch.int64)
        call = lambda f, x, *p, tags=tags: f(x, tags, None, *p)  # noqa: E731
        assert run("crf_log_likelihood", *potentials, call=call, dtype=dtype) == "passed"
