"""Torch's own samples and error inputs of conv1d, conv2d, max_pool1d and max_pool2d, run on our functions.

Not collected by name: importing torch's database freezes flags of the whole process, so test_operator_database.py runs
this file in one of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

import pyseqnet.functional as F

NAMES = ("conv1d", "conv2d", "max_pool1d", "max_pool2d")
OPERATORS = {op.name.rpartition(".")[2]: op for op in op_db if op.name in [f"nn.functional.{name}" for name in NAMES]}
MOST_SAMPLES = 120  # max_pool2d has 1440: every twelfth
BOUND = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def results(function: Any, sample: Any) -> list[torch.Tensor]:
    """Outputs, and the gradients of every tensor that can have one."""
    given = [sample.input, *sample.args, *sample.kwargs.values()]
    leaves = [t for t in given if isinstance(t, torch.Tensor) and t.is_floating_point() and t.requires_grad]
    found = function(sample.input, *sample.args, **sample.kwargs)
    outputs = list(found) if isinstance(found, (tuple, list)) else [found]
    generator = torch.Generator().manual_seed(0)
    y = outputs[0]
    weights = torch.randn(y.shape, generator=generator).to(y.dtype)
    gradients = torch.autograd.grad(y, leaves, weights, allow_unused=True) if y.requires_grad else ()
    return [t.detach() for t in [*outputs, *(g for g in gradients if g is not None)]]


@pytest.mark.parametrize("dtype", BOUND, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", NAMES)
def test_samples(name: str, dtype: torch.dtype) -> None:
    operator = OPERATORS[name]
    samples = list(operator.sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) >= 10
    for sample in samples[:: -(-len(samples) // MOST_SAMPLES)]:
        expected, found = results(operator.op, sample), results(getattr(F, name), sample)
        assert len(found) == len(expected), sample
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert a.stride() == b.stride() or a.numel() <= 1, sample
            scale = float(b.abs().max()) if b.numel() and b.is_floating_point() else 1.0
            assert torch.equal(a.isnan(), b.isnan()), sample
            error = (a.double() - b.double()).nan_to_num(0).abs().max() if a.numel() else 0.0
            assert float(error) <= BOUND[dtype] * max(scale, 1.0), sample


@pytest.mark.parametrize("name", NAMES)
def test_error_inputs(name: str) -> None:
    inputs = list(OPERATORS[name].error_inputs("cpu"))
    assert len(inputs) >= 5
    for given in inputs:
        sample, found = given.sample_input, []
        for function in (OPERATORS[name].op, getattr(F, name)):
            with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
                function(sample.input, *sample.args, **sample.kwargs)
            found.append((caught.type, str(caught.value).splitlines()[0]))
        assert found[0] == found[1]
