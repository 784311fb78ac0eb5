"""CTC: every kernel of the dispatch table on random problems, then its rules one by one (C25, golden G8)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    DEVICES,
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

import pyseqnet
import pyseqnet.functional as F
import pyseqnet.nn as nn

torch_ctc_loss = torch.nn.functional.ctc_loss


@dataclass(frozen=True)
class Problem:
    T: int
    B: int
    C: int
    S: int
    blank: int
    dtype: torch.dtype
    scale: float
    from_logits: bool
    concatenated: bool
    repeats: bool
    zero_infinity: bool
    view: str
    seed: int

    def input(self, device: str) -> Tensor:
        x = self.scale * normal((self.T, self.B, self.C), self.seed)
        return view_as((x if self.from_logits else x.log_softmax(2)).to(device, self.dtype), self.view)

    def labels(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        counts = torch.randint(0, self.S + 1, (self.B,), generator=generator)
        steps = torch.randint(0, self.T + 1, (self.B,), generator=generator)
        classes = torch.tensor([c for c in range(self.C) if c != self.blank])
        if self.repeats:
            classes = classes[:2]
        padded = classes[torch.randint(0, len(classes), (self.B, self.S), generator=generator)]
        targets = padded[torch.arange(self.S) < counts[:, None]] if self.concatenated else padded
        return targets.to(device), steps.to(device), counts.to(device)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    classes = draw(st.sampled_from((2, 3, 5, 17, 33, 70)))
    return Problem(
        T=draw(st.sampled_from((1, 2, 5, 20, 60))),
        B=draw(st.integers(0, 5)),
        C=classes,
        S=draw(st.sampled_from((0, 1, 3, 7, 16, 33))),
        blank=draw(st.sampled_from((0, 0, classes - 1, classes // 2))),
        dtype=draw(dtypes),
        scale=draw(st.sampled_from((0.0, 1.0, 10.0))),
        from_logits=draw(st.booleans()),
        concatenated=draw(st.booleans()),
        repeats=draw(st.booleans()),
        zero_infinity=draw(st.booleans()),
        view=draw(st.sampled_from(("contiguous", "narrowed", "transposed", "offset", "step", "expanded"))),
        seed=draw(seeds),
    )


def gradient_of(loss: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    finite = torch.where(loss.isinf(), torch.zeros_like(loss), loss)
    return torch.autograd.grad(finite, x, weights.to(loss.dtype))[0]


@pytest.mark.parametrize("implementation", implementations("ctc"))
def test_kernels_agree_with_torch(implementation: Implementation) -> None:
    ran = 0

    @settings(max_examples=80)
    @given(problems())
    def check(p: Problem) -> None:
        nonlocal ran
        device = implementation.device
        x = p.input(device).requires_grad_()
        labels = p.labels(device)
        weights = normal((p.B,), p.seed + 1).to(device)
        options = {"blank": p.blank, "reduction": "none", "zero_infinity": p.zero_infinity}
        with implementation.pinned(), poisoned_memory():
            try:
                loss = F.ctc_loss(x, *labels, **options, from_logits=p.from_logits)
                gradient = gradient_of(loss, x, weights)
                alone = F.ctc_loss(x.detach(), *labels, **options, from_logits=p.from_logits)
            except RuntimeError as error:
                if is_refusal(error) or is_beyond_this_machine(error):
                    return
                raise
        ran += 1
        assert torch.equal(alone, loss.detach()), "with and without a gradient"
        if p.B == 0:  # torch takes no empty batch
            assert loss.shape == (0,)
            assert gradient.shape == x.shape
            return

        def by_torch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            copy = x.detach().cpu().to(dtype).requires_grad_()
            y = copy.log_softmax(2) if p.from_logits else copy
            # the infinite losses' gradients are NaN unless zeroed
            arguments = [t.cpu() for t in labels]
            value = torch_ctc_loss(y, *arguments, **options)
            zeroed = torch_ctc_loss(y, *arguments, **{**options, "zero_infinity": True})
            return value.detach(), torch.autograd.grad(zeroed, copy, weights.cpu().to(dtype))[0]

        exact, exact_gradient = by_torch(torch.float64)
        work = torch.float64 if p.dtype == torch.float64 else torch.float32
        usual, usual_gradient = by_torch(work)
        assert torch.equal(loss.cpu().isinf(), exact.isinf())
        finite = ~exact.isinf()
        magnitude = x.detach().cpu().double().abs().amax((1, 2)).sum()
        allowed = allowed_error(usual[finite], exact[finite], magnitude, 2)
        assert error_of(loss.detach()[finite], exact[finite]) <= allowed
        # A posterior is off by as much, relatively, as the sum of paths is absolutely.
        terms = weights.cpu().abs().sum() * (1 + magnitude)
        allowed = allowed_error(usual_gradient.to(p.dtype), exact_gradient, terms, 3)
        assert error_of(gradient, exact_gradient) <= allowed
        for b, n in enumerate(labels[1].tolist()):
            assert not gradient[n:, b].any(), "steps beyond the sequence"
            if exact[b].isinf():
                assert not gradient[:, b].any(), "no alignment, no gradient"

    check()
    if not ran:
        pytest.skip("refuses every problem here")


# (T, C, target) -> loss for uniform probabilities, blank 0
GOLDEN = [
    (3, 3, [1], 1.504077),
    (4, 3, [1, 2], 1.686399),
    (4, 3, [1, 1], 2.785011),
    (3, 3, [1, 1], 3.295837),
    (2, 3, [1, 1], math.inf),
    (6, 3, [1, 1, 2], 3.259469),
    (2, 3, [], 2.197225),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("steps", "classes", "target", "loss"), GOLDEN)
def test_golden_losses(device: str, steps: int, classes: int, target: list[int], loss: float) -> None:
    logits = torch.zeros(steps, 1, classes, device=device)
    labels = torch.tensor([target], dtype=torch.int64, device=device)
    found = F.ctc_loss(logits, labels, [steps], [len(target)], reduction="sum", from_logits=True)
    assert found.item() == pytest.approx(loss, abs=1e-5)


def test_golden_reductions() -> None:
    y = torch.zeros(4, 2, 3).log_softmax(2)
    arguments = (y, torch.tensor([[1, 2], [1, 0]]), torch.tensor([4, 4]), torch.tensor([2, 1]))
    assert F.ctc_loss(*arguments, reduction="none").tolist() == pytest.approx([1.686399, 2.091864], abs=1e-5)
    assert F.ctc_loss(*arguments, reduction="sum").item() == pytest.approx(3.778263, abs=1e-5)
    assert F.ctc_loss(*arguments).item() == pytest.approx(1.467532, abs=1e-5)


def test_every_path_counted() -> None:
    """The definition: the probabilities of all paths that collapse to the target, summed."""
    y = normal((5, 1, 3), 7).log_softmax(2)
    for target in ([], [1], [1, 1], [2, 1], [1, 2, 1]):
        total = 0.0
        for path in itertools.product(range(3), repeat=5):
            merged = [c for c, _ in itertools.groupby(path) if c != 0]
            if merged == target:
                total += math.exp(sum(y[t, 0, c].item() for t, c in enumerate(path)))
        labels = torch.tensor([target], dtype=torch.int64)
        loss = F.ctc_loss(y, labels, [5], [len(target)], reduction="sum")
        assert loss.item() == pytest.approx(-math.log(total), abs=1e-10)


def test_long_targets_and_many_steps() -> None:
    """Rounding does not grow with T: the scan is kept relative to the step before."""
    x = 5 * normal((2000, 2, 40), 3)
    targets = torch.randint(1, 40, (2, 700), generator=torch.Generator().manual_seed(0))
    lengths = ([2000, 1500], [700, 300])
    exact = F.ctc_loss(x, targets, *lengths, reduction="none", from_logits=True)
    found = F.ctc_loss(x.float(), targets, *lengths, reduction="none", from_logits=True)
    assert error_of(found, exact) < 2e-6 * exact.max()


def test_states_that_vanish_and_come_back() -> None:
    """Blank is all but certain, yet hardly a step is free for it: the states that count fall to 2^-3000 of the best."""
    steps, labels = 60, 58
    logits = torch.zeros(steps, 2, 5)
    logits[:, :, 0] = 40
    targets = torch.arange(labels).remainder(4).add(1).expand(2, -1)
    arguments = (targets, torch.tensor([steps, steps]), torch.tensor([labels, labels - 20]))
    exact = logits.double().log_softmax(2).requires_grad_()
    wanted = torch_ctc_loss(exact, *arguments, reduction="none")
    (wanted_grad,) = torch.autograd.grad(wanted.sum(), exact)
    for from_logits in (True, False):
        x = (logits if from_logits else logits.log_softmax(2)).requires_grad_()
        loss = F.ctc_loss(x, *arguments, reduction="none", from_logits=from_logits)
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            alone = F.ctc_loss(x, *arguments, reduction="none", from_logits=from_logits)
        torch.testing.assert_close(alone, loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_padding_does_not_matter(device: str) -> None:
    x = normal((6, 2, 4), 1, torch.float32).to(device)
    poisoned = x.clone()
    poisoned[4:, 0] = math.nan
    poisoned = poisoned.requires_grad_()
    targets = torch.tensor([[1, 2, -7], [3, 3, 1]], device=device)
    loss = F.ctc_loss(poisoned, targets, [4, 6], [2, 3], reduction="none", from_logits=True)
    assert torch.equal(loss, F.ctc_loss(x, targets, [4, 6], [2, 3], reduction="none", from_logits=True))
    (gradient,) = torch.autograd.grad(loss.sum(), poisoned)
    assert gradient.isfinite().all()
    assert not gradient[4:, 0].any()


def test_nan_is_not_hidden() -> None:
    for value in (math.nan, math.inf):
        x = normal((5, 3, 4), 1, torch.float32)
        x[2, 1, 3] = value
        x = x.requires_grad_()
        loss = F.ctc_loss(x, torch.tensor([[1], [1], [1]]), [5] * 3, [1] * 3, reduction="none", from_logits=True)
        assert loss.isnan().tolist() == [False, True, False]
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert gradient[:, 1].isnan().all()
        assert gradient[:, ::2].isfinite().all()


def test_zero_infinity_and_infeasible_gradients() -> None:
    x = normal((3, 2, 4), 1, torch.float32).requires_grad_()
    arguments = (torch.tensor([[1, 1, 2], [1, 2, 3]]), [3, 3], [3, 3])  # 1 1 needs a blank between
    assert F.ctc_loss(x, *arguments, reduction="none", from_logits=True).isinf().tolist() == [True, False]
    loss = F.ctc_loss(x, *arguments, reduction="none", from_logits=True, zero_infinity=True)
    assert loss[0] == 0
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert not gradient[:, 0].any()
    assert gradient[:, 1].any()


def test_deterministic_for_any_number_of_threads() -> None:
    x = normal((120, 9, 30), 5, torch.float32).requires_grad_()
    targets = torch.randint(1, 30, (9, 20), generator=torch.Generator().manual_seed(0))
    results = []
    for count in (1, 2, 3):
        with threads(count):
            loss = F.ctc_loss(x, targets, [120] * 9, [20] * 9, from_logits=True)
            results.append((loss.detach(), *torch.autograd.grad(loss, x)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradcheck_and_double_backward(from_logits: bool, reduction: str) -> None:
    x = normal((5, 2, 4), 2).requires_grad_()
    arguments = (torch.tensor([[1, 1], [3, 2]]), [5, 4], [2, 1])

    def loss(x: Tensor) -> Tensor:
        y = x if from_logits else x.log_softmax(2)
        return F.ctc_loss(y, *arguments, reduction=reduction, from_logits=from_logits)

    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)


def test_reference_agrees() -> None:
    x = normal((9, 3, 5), 2).requires_grad_()
    arguments = (torch.tensor([[1, 1, 4], [3, 2, 0], [2, 2, 2]]), [9, 0, 4], [3, 2, 3])
    for from_logits in (False, True):
        results = [
            f(x, *arguments, reduction="none", from_logits=from_logits) for f in (F.ctc_loss, F.ctc_loss_reference)
        ]
        assert torch.allclose(*results, rtol=0, atol=1e-12)
        gradients = [torch.autograd.grad(r[:1].sum(), x)[0] for r in results]
        assert torch.allclose(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic: bool) -> None:
    def step(x: Tensor, targets: Tensor, steps: Tensor, counts: Tensor) -> Tensor:
        return F.ctc_loss(x, targets, steps, counts, from_logits=True)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for steps in (8, 11):
        x = normal((steps, 2, 5), 1, torch.float32).requires_grad_()
        arguments = (torch.tensor([[1, 2], [3, 3]]), torch.tensor([steps, 7]), torch.tensor([2, 2]))
        results = [f(x, *arguments) for f in (step, compiled)]
        assert torch.allclose(*results)
        gradients = [torch.autograd.grad(r, x)[0] for r in results]
        assert torch.allclose(*gradients)


def test_unbatched_and_layer() -> None:
    x = normal((6, 4), 3, torch.float32)
    target = torch.tensor([2, 1])
    expected = torch_ctc_loss(x.log_softmax(1), target, torch.tensor(6), torch.tensor(2))
    assert torch.allclose(F.ctc_loss(x.log_softmax(1), target, torch.tensor(6), torch.tensor(2)), expected)
    assert torch.allclose(nn.CTCLoss(from_logits=True)(x, target, torch.tensor(6), torch.tensor(2)), expected)
    assert F.ctc_loss(x.log_softmax(1), target, (6,), (2,), reduction="none").shape == ()
    assert isinstance(nn.CTCLoss(blank=3), torch.nn.CTCLoss)
    converted = torch.nn.CTCLoss()
    pyseqnet.convert(converted)
    assert type(converted) is nn.CTCLoss
    assert torch.allclose(converted(x.log_softmax(1), target, torch.tensor(6), torch.tensor(2)), expected)


def test_autocast_computes_in_float32() -> None:
    x = normal((6, 1, 4), 3, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.ctc_loss(x.log_softmax(2), torch.tensor([[1]]), [6], [1]).dtype == torch.float32


Y = torch.zeros(4, 2, 3).log_softmax(2)
GOOD = {"targets": torch.tensor([[1, 2], [1, 0]]), "input_lengths": [4, 4], "target_lengths": [2, 1]}
BAD = [
    ({"targets": torch.tensor([[1, 2], [0, 0]])}, ValueError, "targets must not contain blank"),
    ({"targets": torch.tensor([[1, 3], [1, 0]])}, ValueError, "targets must lie between 0 and C - 1"),
    ({"targets": torch.tensor([[1, -1], [1, 0]])}, ValueError, "targets must lie between 0 and C - 1"),
    ({"targets": torch.tensor([[1.0, 2], [1, 0]])}, TypeError, "targets must be integers"),
    ({"input_lengths": [5, 4]}, RuntimeError, "input_lengths"),
    ({"input_lengths": [4]}, RuntimeError, "input_lengths"),
    ({"target_lengths": [3, 1]}, RuntimeError, "targets|target_lengths"),
    ({"target_lengths": [2, -1]}, (RuntimeError, ValueError), "target"),
    ({"target_lengths": torch.tensor([2.0, 1.0])}, (RuntimeError, TypeError), "target_lengths"),
    ({"blank": 3}, RuntimeError, "blank must be in label range"),
    ({"reduction": "median"}, ValueError, "median is not a valid value for reduction"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        F.ctc_loss(Y, **{**GOOD, **change})


def test_bad_dtype_and_shape() -> None:
    with pytest.raises(RuntimeError, match="log_probs tensor must not be empty"):
        F.ctc_loss(torch.zeros(4, 2, 0), **GOOD)
    with pytest.raises((TypeError, RuntimeError), match=r"int64|Long"):
        F.ctc_loss(Y.long(), **GOOD)
    with pytest.raises((ValueError, RuntimeError)):
        F.ctc_loss(Y[0, 0], **GOOD)
