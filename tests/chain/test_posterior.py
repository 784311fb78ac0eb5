"""Entropy, samples, constraints and margins of the CRF, against the enumeration of all tag sequences (C40-C42)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support import normal
from torch import Tensor

import pyseqnet.functional as F
from pyseqnet import chain, nn

Potentials = tuple[Tensor, Tensor, Tensor]


def problem(seed: int, batch: int, steps: int, tags: int, dtype: torch.dtype = torch.float64):
    """Emissions, mask, potentials, gold tags; lengths 1 to `steps`, the first one `steps`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, steps + 1, (batch,), generator=generator)
    lengths[0] = steps
    e = normal((batch, steps, tags), seed, dtype)
    potentials = tuple(normal(shape, seed + 1 + k, dtype) for k, shape in enumerate(((tags,), (tags,), (tags, tags))))
    gold = torch.randint(0, tags, (batch, steps), generator=generator)
    return e, torch.arange(steps) < lengths[:, None], potentials, gold


def every_sequence(e: Tensor, n: int, potentials: Potentials) -> tuple[Tensor, Tensor]:
    """All tag sequences of one sentence (C^n, n), and their scores."""
    start, end, transitions = potentials
    y = torch.tensor(list(itertools.product(range(e.shape[1]), repeat=n)))
    score = start[y[:, 0]] + end[y[:, -1]] + e[torch.arange(n), y].sum(1) + transitions[y[:, :-1], y[:, 1:]].sum(1)
    return y, score


def forbid_some(potentials: Potentials) -> Potentials:
    start, end, transitions = (x.clone() for x in potentials)
    start[1], end[0], transitions[0, 2], transitions[2, 1] = (-math.inf,) * 4
    return start, end, transitions


@pytest.mark.parametrize("forbidden", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_entropy_counts_every_sequence(seed: int, forbidden: bool) -> None:
    e, mask, potentials, _ = problem(seed, 4, 5, 3)
    e = 2 * e
    if forbidden:
        potentials = forbid_some(potentials)
    found = chain.crf_entropy(e, mask, *potentials)
    poisoned = e.masked_fill(~mask[:, :, None], math.nan)
    assert torch.equal(chain.crf_entropy(poisoned, mask, *potentials), found)
    for b, n in enumerate(mask.sum(1).tolist()):
        p = every_sequence(e[b], n, potentials)[1].softmax(0)
        assert found[b].item() == pytest.approx(-torch.xlogy(p, p).sum().item(), abs=1e-10)


def test_entropy_has_gradients() -> None:
    e, mask, potentials, _ = problem(7, 3, 4, 3)
    inputs = [x.requires_grad_() for x in (e, *potentials)]
    assert torch.autograd.gradcheck(lambda e, *p: chain.crf_entropy(e, mask, *p), inputs)
    assert torch.autograd.gradgradcheck(lambda e, *p: chain.crf_entropy(e, mask, *p), inputs)
    never = [x.detach().requires_grad_() for x in (e, *forbid_some(potentials))]
    gradients = torch.autograd.grad(chain.crf_entropy(never[0], mask, *never[1:]).sum(), never)
    assert all(g.isfinite().all() for g in gradients)


def test_entropy_of_nothing_and_of_certainty() -> None:
    zeros = torch.zeros(3)
    uniform = chain.crf_entropy(torch.zeros(1, 4, 3), None, zeros, zeros, torch.zeros(3, 3))
    assert uniform.item() == pytest.approx(4 * math.log(3), abs=1e-5)
    sure = torch.zeros(1, 4, 3)
    sure[..., 1] = 1000
    assert chain.crf_entropy(sure, None, zeros, zeros, torch.zeros(3, 3)).item() == 0
    forbidden = torch.full((3, 3), -math.inf)
    assert chain.crf_entropy(sure, None, zeros, zeros, forbidden).isnan().all()
    assert chain.crf_sample(sure, None, zeros, zeros, forbidden).eq(-1).all()


def test_samples_have_the_posteriors_frequencies() -> None:
    """Pearson's statistic over all sequences, of 20000 draws; its 1 - 1e-6 quantile by Wilson and Hilferty."""
    e, mask, potentials, _ = problem(3, 2, 3, 3, torch.float32)
    draws = 20000
    found = chain.crf_sample(e, mask, *potentials, draws, generator=torch.Generator().manual_seed(0))
    assert found.shape == (draws, 2, 3)
    for b, n in enumerate(mask.sum(1).tolist()):
        assert found[:, b, n:].eq(-1).all()
        p = every_sequence(e[b], n, potentials)[1].double().softmax(0)
        index = (found[:, b, :n] * 3 ** torch.arange(n - 1, -1, -1)).sum(1)
        seen = torch.bincount(index, minlength=3**n).double()
        common = p * draws >= 5
        expected = torch.cat([p[common], p[~common].sum()[None]]) * draws
        counted = torch.cat([seen[common], seen[~common].sum()[None]])
        statistic = ((counted - expected).square() / expected.clamp(min=1e-9)).sum().item()
        freedom = int(common.sum())
        assert statistic < freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3


def test_samples_obey_constraints_and_seeds() -> None:
    e, mask, potentials, _ = problem(3, 4, 6, 3, torch.float32)
    never = forbid_some(potentials)
    draw = lambda seed: chain.crf_sample(e, mask, *never, 50, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    llh = [F.crf_log_likelihood(e, y.clamp(min=0), mask, *never) for y in draw(1)]
    assert torch.stack(llh).isfinite().all()
    with pytest.raises(ValueError, match="num_samples must be positive, got 0"):
        chain.crf_sample(e, mask, *never, 0)


# ---------------------------------------------------------------- constraints


def well_formed(names: list[str], scheme: str) -> bool:
    """Reads a sequence as its definition says: chunk by chunk."""
    closing = {"BIOUL": ("B", "I", "L", "U"), "BMES": ("B", "M", "E", "S")}
    kind = None  # of the open chunk
    for name in names:
        position, _, of = name.partition("-")
        if scheme == "BIO":
            if position == "I" and kind != of:
                return False
            kind = None if position == "O" else of
            continue
        begin, middle, last, unit = closing[scheme]
        if (position in (middle, last)) != (kind is not None) or (position in (middle, last) and kind != of):
            return False
        assert position in (begin, middle, last, unit, "O")
        kind = of if position in (begin, middle) else None
    return scheme == "BIO" or kind is None


TAGS = {
    "BIO": ["O", "B-X", "I-X", "B-Y", "I-Y"],
    "BIOUL": ["O", "B-X", "I-X", "L-X", "U-X", "B-Y", "L-Y"],
    "BMES": ["B", "M", "E", "S"],
}


@pytest.mark.parametrize("scheme", TAGS)
def test_constraints_allow_exactly_the_well_formed(scheme: str) -> None:
    names = TAGS[scheme]
    start, end, transitions = chain.allowed_transitions(names, scheme)
    for n in (1, 2, 3, 4):
        for y in itertools.product(range(len(names)), repeat=n):
            allowed = start[y[0]] and end[y[-1]] and all(transitions[i, j] for i, j in itertools.pairwise(y))
            assert bool(allowed) == well_formed([names[j] for j in y], scheme), [names[j] for j in y]


@pytest.mark.parametrize("scheme", TAGS)
def test_a_constrained_layer_knows_only_the_well_formed(scheme: str) -> None:
    torch.manual_seed(0)
    names = TAGS[scheme]
    crf = nn.CRF(len(names), batch_first=True, allowed=chain.allowed_transitions(names, scheme))
    assert sorted(crf.state_dict()) == ["end_transitions", "start_transitions", "transitions"]
    e = 3 * torch.randn(50, 7, len(names))
    for path in crf.decode(e) + crf.sample(e)[0].tolist():
        assert well_formed([names[j] for j in path], scheme)
    gold = torch.tensor(crf.decode(e))
    inputs = e.requires_grad_()
    llh = crf(inputs, gold, reduction="none")
    gradients = torch.autograd.grad(llh.sum(), [inputs, *crf.parameters()])
    assert all(g.isfinite().all() for g in gradients)
    total = sum(
        math.exp(crf(e[:1, :3].detach(), torch.tensor([y])).item())
        for y in itertools.product(range(len(names)), repeat=3)
        if well_formed([names[j] for j in y], scheme)
    )
    assert total == pytest.approx(1, abs=1e-4)
    broken = torch.full((50, 7), 2)  # begins inside a chunk
    assert crf(e, broken, reduction="none").eq(-math.inf).all()


def test_bad_constraints() -> None:
    for tags, scheme, message in (
        (["O"], "IOB", "scheme must be one of BIO, BIOUL, BMES; got 'IOB'"),
        (["O", "L-X"], "BIO", "'L-X' is no tag of BIO"),
        (["O-X"], "BIO", "'O-X' is no tag of BIO"),
        (["B-"], "BIO", "'B-' is no tag of BIO"),
        (["O", "O"], "BIO", "different names"),
        ([], "BIO", "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            chain.allowed_transitions(tags, scheme)
    with pytest.raises(ValueError, match=r"allowed.start must be bool \(4,\)"):
        nn.CRF(4, allowed=chain.allowed_transitions(["O"], "BIO"))


# ---------------------------------------------------------------- losses of margins


@pytest.mark.parametrize("cost", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("seed", range(5))
def test_margins_count_every_sequence(seed: int, cost: float) -> None:
    e, mask, potentials, gold = problem(seed, 4, 5, 3)
    found = chain.structured_hinge_loss(e, gold, mask, *potentials, cost=cost)
    if cost == 0:
        assert torch.equal(chain.structured_perceptron_loss(e, gold, mask, *potentials), found)
    for b, n in enumerate(mask.sum(1).tolist()):
        y, score = every_sequence(e[b], n, potentials)
        wrong = (y != gold[b, :n]).sum(1)
        right = score[wrong == 0]
        assert found[b].item() == pytest.approx(((score + cost * wrong).max() - right).item(), abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_hinge_is_never_less_than_the_error(dtype: torch.dtype) -> None:
    slack = 1e-9 if dtype == torch.float64 else 1e-4
    for seed in range(200):
        e, mask, potentials, gold = problem(seed, 8, 6, 4)
        e, potentials = (0.5 * e).to(dtype), tuple(x.to(dtype) for x in potentials)
        hinge = chain.structured_hinge_loss(e, gold, mask, *potentials)
        best = F.crf_decode(e, mask, *potentials)
        errors = [
            sum(a != b for a, b in zip(path, y.tolist(), strict=False)) for path, y in zip(best, gold, strict=True)
        ]
        assert (hinge >= torch.tensor(errors) - slack).all()


def test_margins_have_the_perceptrons_gradient() -> None:
    e, mask, potentials, gold = problem(1, 3, 5, 4)
    inputs = [x.requires_grad_() for x in (e, *potentials)]
    loss = chain.structured_perceptron_loss(e, gold, mask, *potentials)
    gradients = torch.autograd.grad(loss.sum(), inputs)
    features = [torch.zeros_like(x) for x in inputs]
    for b, path in enumerate(F.crf_decode(e, mask, *potentials)):
        for sign, y in ((1, path), (-1, gold[b].tolist()[: len(path)])):
            features[1][y[0]] += sign
            features[2][y[-1]] += sign
            for t, j in enumerate(y):
                features[0][b, t, j] += sign
                if t:
                    features[3][y[t - 1], j] += sign
    assert all(torch.equal(a, b) for a, b in zip(gradients, features, strict=True))


def test_perceptron_converges_on_what_is_separable() -> None:
    torch.manual_seed(0)
    symbols = torch.randint(0, 5, (20, 8))
    gold = (symbols + torch.nn.functional.pad(symbols, (1, 0))[:, :-1]) % 2  # parity of two neighbours: needs both
    features = torch.nn.functional.one_hot(symbols * 5 + torch.nn.functional.pad(symbols, (1, 0))[:, :-1], 25).float()
    weight, crf = torch.nn.Parameter(torch.zeros(25, 2)), nn.CRF(2, batch_first=True)
    optimizer = torch.optim.SGD([weight, *crf.parameters()], lr=1.0)
    for _ in range(60):
        optimizer.zero_grad()
        crf.hinge_loss(features @ weight, gold, cost=0).sum().backward()
        optimizer.step()
    assert crf.decode((features @ weight).detach()) == gold.tolist()


def test_bad_margins() -> None:
    e, mask, potentials, gold = problem(0, 2, 3, 3)
    with pytest.raises(ValueError, match="cost must not be negative, got -1"):
        chain.structured_hinge_loss(e, gold, mask, *potentials, cost=-1)
    with pytest.raises(ValueError, match="tags must lie between 0 and C - 1"):
        chain.structured_hinge_loss(e, gold + 3, mask, *potentials)
    strange = torch.where(mask, gold, -100)
    expected = chain.structured_hinge_loss(e, gold, mask, *potentials)
    assert torch.equal(chain.structured_hinge_loss(e, strange, mask, *potentials), expected)
    e[1, 0, 0] = math.nan
    assert chain.structured_hinge_loss(e, gold, mask, *potentials).isnan().tolist() == [False, True]
