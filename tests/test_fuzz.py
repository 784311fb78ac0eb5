"""A few problems of `make fuzz` for every function, that its checks notice a fault, and cases that it has found."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import fuzz
import pytest
import torch
from fuzz_problems import FUNCTIONS, started
from fuzz_summary import summary
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
        first = next(n for n, part in enumerate(result) if isinstance(part, Tensor))
        return tuple(part * 1.01 if n == first else part for n, part in enumerate(result))

    monkeypatch.setattr(F, name, faulty)
    assert fuzz.batch(1, name, Counter(), examples=40, shrink=False) is not None


def test_a_wrong_path_and_a_wrong_index_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    decode, pool = F.crf_decode, F.max_pool2d
    turned = lambda *a, **o: (decode(*a, **o)[0][::-1], decode(*a, **o)[1])  # noqa: E731
    shifted = lambda *a, **o: (pool(*a, **o)[0], pool(*a, **o)[1] + 1) if o["return_indices"] else pool(*a, **o)  # noqa: E731
    monkeypatch.setattr(F, "crf_decode", turned)
    monkeypatch.setattr(F, "max_pool2d", shifted)
    assert "paths" in (fuzz.batch(1, "crf_decode", Counter(), examples=40, shrink=False) or "")
    assert "indices" in (fuzz.batch(1, "max_pool2d", Counter(), examples=40, shrink=False) or "")


def run(name: str, *shapes: tuple[int, ...], call: Callable[..., Any], **more: Any) -> str:
    """A found case."""
    plain: dict[str, Any] = {"options": {}, "dtype": torch.float32, "views": ("contiguous",) * len(shapes)}
    plain |= {"seed": 0, "kernel": "", "threads": 1, **more}
    return fuzz.check(fuzz.Problem(name, shapes, call=call, **plain))


def test_float64_is_allowed_what_the_exact_results_err_themselves() -> None:
    # Found in a layer-normalised LSTM: both sides are float64, and a nearby input moved the results half as far.
    exact, near, far = (torch.tensor([1.0 + e], dtype=torch.float64) for e in (0.0, 3.5e-12, 5e-12))
    fuzz.compare([near], [exact], [exact], 1, [1e-12])
    with pytest.raises(fuzz.Off):
        fuzz.compare([far], [exact], [exact], 1, [1e-12])


def test_a_chain_of_one_tag_has_gradients_of_rounding_only() -> None:
    for batch, steps, dtype in ((6, 1, torch.float32), (4, 15, torch.float64)):
        potentials = ((batch, steps, 1), (1,), (1,), (1, 1))
        tags = torch.zeros(batch, steps, dtype=torch.int64)
        call = lambda f, x, *p, tags=tags: f(x, tags, None, *p)  # noqa: E731
        assert run("crf_log_likelihood", *potentials, call=call, dtype=dtype) == "passed"


def test_a_clipped_unit_has_no_gradient() -> None:
    """The limit 0.7 is no float: h was stored below it, and taken for one that was not clipped."""
    call = lambda f, x, *p: f(x, None, [w / 2 for w in p], clip=0.7)  # noqa: E731
    shapes, kernel = ((1, 1, 1), (2, 1), (2, 1), (1, 2)), "recurrent_backward:reference"
    assert run("jordan", *shapes, call=call, kernel=kernel) == "passed"


def test_a_sum_of_few_features_magnifies_the_rounding_of_the_output() -> None:
    """The gradient of a query that sees one key is zero; the output, rounded to bfloat16, leaves a part of it."""
    options = {"causal": True, "feature_map": "relu", "normalize": True, "decay": 0.25}

    def call(f: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor) -> Any:
        return f(q, k, v, initial_state=started(q, s, z), **options)

    shapes = ((1, 1, 3, 1), (1, 1, 3, 1), (1, 1, 3, 7), (1, 1, 1, 7), (1, 1, 1))
    assert run("linear_attention", *shapes, call=call, options=options, dtype=torch.bfloat16, seed=1) == "passed"


def test_the_n_best_paths_are_the_best_of_all() -> None:
    """The reference that crf_decode is held against, against enumeration: scores, ties by the last tag that differs."""
    generator = torch.Generator().manual_seed(0)
    for tags, steps, nbest in ((1, 3, 2), (2, 1, 3), (2, 4, 5), (3, 3, 7), (3, 3, 40)):
        emissions = torch.randint(-1, 2, (1, steps, tags), generator=generator).double()
        start, end = (torch.randint(-1, 2, (tags,), generator=generator).double() for _ in range(2))
        transitions = torch.randint(-1, 2, (tags, tags), generator=generator).double()
        transitions[0, -1] = -math.inf

        def score(path: tuple[int, ...], e=emissions[0], start=start, end=end, transitions=transitions) -> float:
            total = start[path[0]] + end[path[-1]] + sum(e[t, tag] for t, tag in enumerate(path))
            return float(total + sum(transitions[a, b] for a, b in itertools.pairwise(path)))

        all_paths = sorted(itertools.product(range(tags), repeat=steps), key=lambda p: (-score(p), p[::-1]))
        wanted = [list(p) for p in all_paths if score(p) > -math.inf][:nbest]
        paths, scores = F.crf_decode_reference(emissions, None, start, end, transitions, nbest, return_scores=True)
        assert paths[0] == wanted
        assert scores[0, : len(wanted)].tolist() == [score(tuple(p)) for p in wanted]
        assert (scores[0, len(wanted) :] == -math.inf).all()


def test_a_chaotic_recurrence_is_held_to_what_an_ulp_of_its_inputs_moves() -> None:
    def call(f: Callable[..., Any], x: Tensor, *p: Tensor) -> Any:
        options = {"num_layers": 2, "clip": 0.7, "output_nonlinearity": "tanh", "decay": 0.5}
        return f(x, None, [w / 2 for w in p], **options)

    shapes = ((7, 1, 1), (33, 1), (33, 9), (9, 33), (33, 9), (33, 9), (9, 33))
    assert run("jordan", *shapes, call=call, seed=6) == "passed"
    assert run("jordan", *shapes, call=call, seed=6, kernel="recurrent_forward:reference") == "passed"


def test_a_step_with_few_features_magnifies_the_rounding_of_the_output() -> None:
    options = {"feature_map": "relu", "normalize": True, "decay": 0.25}

    def call(f: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor) -> Any:
        return f(q, k, v, started(q, s, z), **options)

    shapes = ((1, 1, 1), (1, 1, 1), (1, 1, 8), (1, 1, 1, 8), (1, 1, 1))
    for seed in range(20):
        assert run("linear_attention_step", *shapes, call=call, options=options, dtype=torch.bfloat16, seed=seed) == (
            "passed"
        )


def test_a_log_is_summarised() -> None:
    counts: Counter[str] = Counter()
    assert fuzz.batch(1, "max_pool1d", counts, examples=20) is None
    batches = [{"seed": 1, "commit": "abc", "counts": counts, "miss": None}]
    batches.append({"seed": 2, "commit": "abc", "counts": {"passed": 1000, "gru": 1000}, "miss": "off\n  Problem()"})
    text = summary(batches)
    assert f"{1000 + counts['passed']} problems passed in 2 batches" in text
    assert "| gru | 1000 |" in text
    assert "seed 2 at abc: off" in text
