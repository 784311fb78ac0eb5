"""Ten thousand random sequences each for CTC and the CRF, against the enumeration of all paths in float64."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor

import pyseqnet.functional as F
from pyseqnet.decoding import ctc_collapse

pytestmark = pytest.mark.slow
CALLS, BATCH = 1250, 8


@functools.cache
def sequences(symbols: int, steps: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(symbols), repeat=steps)))


@functools.cache
def labels_of_paths(classes: int, steps: int, blank: int) -> list[tuple[int, ...]]:
    return [tuple(ctc_collapse(path, blank)) for path in sequences(classes, steps).tolist()]


def test_ctc() -> None:
    generator = torch.Generator().manual_seed(1)
    integer = lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))  # noqa: E731
    for _ in range(CALLS):
        classes, steps = integer(2, 4), integer(1, 5)
        blank = integer(0, classes - 1)
        x = (integer(1, 6) * torch.randn(steps, BATCH, classes, generator=generator)).requires_grad_()
        lengths = torch.randint(1, steps + 1, (BATCH,), generator=generator)
        counts = torch.randint(0, steps + 1, (BATCH,), generator=generator)
        others = torch.tensor([c for c in range(classes) if c != blank])
        targets = others[torch.randint(0, classes - 1, (BATCH, steps), generator=generator)]
        loss = F.ctc_loss(x, targets, lengths, counts, blank, "none", from_logits=True)
        finite = loss.isfinite()
        (gradient,) = torch.autograd.grad(loss.masked_fill(~finite, 0).sum(), x)
        exact_x = x.detach().double().requires_grad_()
        log_probs, total = exact_x.log_softmax(2), torch.zeros((), dtype=torch.float64)
        for b, (n, m) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
            wanted = tuple(targets[b, :m].tolist())
            mine = [i for i, labels in enumerate(labels_of_paths(classes, n, blank)) if labels == wanted]
            assert bool(finite[b]) == bool(mine)
            if mine:
                paths = sequences(classes, n)[mine]
                exact = -log_probs[torch.arange(n), b, paths].sum(1).logsumexp(0)
                assert loss[b].item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-5)
                total = total + exact
        exact_gradient = torch.autograd.grad(total, exact_x)[0] if total.requires_grad else torch.zeros_like(exact_x)
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=0, atol=5e-5)


def test_crf() -> None:
    generator = torch.Generator().manual_seed(2)
    integer = lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))  # noqa: E731
    for _ in range(CALLS):
        tags, steps = integer(1, 4), integer(1, 5)
        shapes = ((BATCH, steps, tags), (tags,), (tags,), (tags, tags))
        inputs = [integer(1, 6) * torch.randn(shape, generator=generator) for shape in shapes]
        lengths = torch.randint(1, steps + 1, (BATCH,), generator=generator)
        mask = torch.arange(steps) < lengths[:, None]
        gold = torch.randint(0, tags, (BATCH, steps), generator=generator)
        leaves = [x.requires_grad_() for x in inputs]
        llh = F.crf_log_likelihood(leaves[0], gold, mask, *leaves[1:])
        gradients = torch.autograd.grad(llh.sum(), leaves)
        paths, scores = F.crf_decode(leaves[0], mask, *leaves[1:], return_scores=True)
        e, start, end, transitions = (exact := [x.detach().double().requires_grad_() for x in inputs])
        total = torch.zeros((), dtype=torch.float64)
        for b, n in enumerate(lengths.tolist()):
            y = sequences(tags, n)
            score = start[y[:, 0]] + end[y[:, -1]] + e[b, torch.arange(n), y].sum(1)
            score = score + transitions[y[:, :-1], y[:, 1:]].sum(1)
            right = score[(y == gold[b, :n]).all(1)].squeeze() - score.logsumexp(0)
            assert llh[b].item() == pytest.approx(right.item(), rel=1e-5, abs=3e-5)
            found = score[(y == torch.tensor(paths[b])).all(1)].item()
            assert found >= score.max().item() - 3e-5
            assert scores[b].item() == pytest.approx(found, rel=1e-5, abs=3e-5)
            total = total + right
        for mine, wanted in zip(gradients, torch.autograd.grad(total, exact, materialize_grads=True), strict=True):
            torch.testing.assert_close(mine.double(), wanted, rtol=0, atol=3e-4)
