"""The linear-chain CRF: every kernel of the dispatch tables on random problems, then its rules one by one (C39, C40,
C43, golden G9)."""

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
    environment,
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
import pyseqnet.nn as nn

Potentials = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    B: int
    T: int
    C: int
    dtype: torch.dtype
    scale: float  # of emissions
    spread: float  # of transitions
    forbidden: str  # nothing, some with -inf, some with -1e4
    view: str
    ragged: bool
    seed: int

    def emissions(self, device: str) -> Tensor:
        return view_as((self.scale * normal((self.B, self.T, self.C), self.seed)).to(device, self.dtype), self.view)

    def potentials(self, device: str) -> Potentials:
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        start, end = normal((self.C,), self.seed + 1), normal((self.C,), self.seed + 2)
        transitions = self.spread * normal((self.C, self.C), self.seed + 3)
        if self.forbidden:
            never = torch.rand(self.C, self.C, generator=torch.Generator().manual_seed(self.seed)) < 0.3
            never.fill_diagonal_(False)
            transitions = transitions.masked_fill(never, float(self.forbidden))
        return tuple(x.to(device, dtype) for x in (start, end, transitions))

    def labels(self, device: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        # one tag all the way: never forbidden
        tags = torch.randint(0, self.C, (self.B, 1), generator=generator).repeat(1, self.T)
        if not self.forbidden:
            tags = torch.randint(0, self.C, (self.B, self.T), generator=generator)
        lengths = torch.randint(1, self.T + 1, (self.B,), generator=generator)
        mask = torch.arange(self.T) < (lengths[:, None] if self.ragged else self.T)
        return tags.to(device), mask.expand(self.B, self.T).to(device)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    return Problem(
        B=draw(st.sampled_from((0, 1, 3, 8, 11))),
        T=draw(st.sampled_from((1, 2, 7, 25))),
        C=draw(st.sampled_from((1, 2, 5, 16, 17, 33, 70))),
        dtype=draw(dtypes),
        scale=draw(st.sampled_from((0.0, 1.0, 5.0, 60.0))),
        spread=draw(st.sampled_from((1.0, 1.0, 30.0))),
        forbidden=draw(st.sampled_from(("", "", "-inf", "-1e4"))),
        view=draw(st.sampled_from(("contiguous", "narrowed", "transposed", "offset", "step", "expanded"))),
        ragged=draw(st.booleans()),
        seed=draw(seeds),
    )


def run_pinned(implementation: Implementation, p: Problem, run) -> object:
    """What run() gives, or None where the pinned kernel refuses."""
    with implementation.pinned(), poisoned_memory():
        try:
            return run()
        except RuntimeError as error:
            if is_refusal(error) or is_beyond_this_machine(error):
                return None
            raise


def magnitude(p: Problem, emissions: Tensor, potentials: Potentials) -> Tensor:
    finite = [x.masked_fill(x.isinf(), 0).abs().double().cpu() for x in (emissions, *potentials)]
    return finite[0].amax(2).sum(1).max() + p.T * finite[3].max() if p.B else torch.zeros(())


@pytest.mark.parametrize("implementation", implementations("crf"))
def test_kernels_agree_with_the_definition(implementation: Implementation) -> None:
    ran = 0

    @settings(max_examples=60)
    @given(problems())
    def check(p: Problem) -> None:
        nonlocal ran
        emissions, potentials = p.emissions(implementation.device), p.potentials(implementation.device)
        tags, mask = p.labels(implementation.device)
        exact_inputs = [x.detach().cpu().double() for x in (emissions, *potentials)]
        if "viterbi" in implementation.operation:
            run = lambda: F.crf_decode(emissions, mask, *potentials, return_scores=True)  # noqa: E731
            found = run_pinned(implementation, p, run)
            if found is None:
                return
            ran += 1
            paths, scores = found
            exact = F.crf_decode_reference(exact_inputs[0], mask.cpu(), *exact_inputs[1:])
            for b, (path, best) in enumerate(zip(paths, exact, strict=True)):
                row, on = exact_inputs[0][b : b + 1], mask[b : b + 1].cpu()
                score = [
                    F.crf_log_likelihood(row, pad(y, p.T), on, *exact_inputs[1:])
                    + F.crf_log_partition(row, on, *exact_inputs[1:])
                    for y in (path, best)
                ]
                # Equal up to rounding, where sums are made in float.
                slack = 4e-7 * (1 + float(magnitude(p, emissions, potentials)))
                assert score[0].item() >= score[1].item() - slack
                assert abs(scores[b].item() - score[0].item()) <= slack
            return
        inputs = [x.detach().requires_grad_() for x in (emissions, *potentials)]
        weights = normal((p.B,), p.seed + 4).to(inputs[1])

        def run() -> tuple[Tensor, ...]:
            llh = F.crf_log_likelihood(inputs[0], tags, mask, *inputs[1:])
            if "gradient" not in implementation.operation:
                return (llh.detach(),)
            return (llh.detach(), *torch.autograd.grad(llh, inputs, weights))

        found = run_pinned(implementation, p, run)
        if found is None:
            return
        ran += 1

        def by_definition(dtype: torch.dtype) -> list[Tensor]:
            copies = [x.detach().cpu().to(dtype).requires_grad_() for x in inputs]
            # -inf in a sum of logarithms has NaN for its gradient in torch: a number no path survives stands for it
            low = [x.masked_fill(x == -math.inf, -1e4) for x in copies]
            llh = F.crf_log_likelihood_reference(low[0], tags.cpu(), mask.cpu(), *low[1:])
            return [llh.detach(), *torch.autograd.grad(llh, copies, weights.cpu().to(llh.dtype))]

        exact = by_definition(torch.float64)
        usual = by_definition(inputs[1].dtype)
        sizes = magnitude(p, emissions, potentials)
        assert error_of(found[0], exact[0]) <= allowed_error(usual[0], exact[0], sizes, 2)
        for mine, theirs, right in zip(found[1:], usual[1 : len(found)], exact[1 : len(found)], strict=True):
            # A marginal is off by as much, relatively, as log Z is absolutely.
            terms = weights.cpu().abs().sum() * (1 + sizes)
            assert error_of(mine, right) <= allowed_error(theirs.to(mine.dtype), right, terms, 3)

    check()
    if not ran:
        pytest.skip("refuses every problem here")


def pad(path: list[int], steps: int) -> Tensor:
    return torch.tensor([path + [0] * (steps - len(path))])


EMISSIONS = torch.tensor([[[1.0, 0], [0, 1], [1, 1]]])
START, END, TRANSITIONS = torch.tensor([0.1, 0.2]), torch.tensor([0.3, -0.3]), torch.tensor([[0.5, -0.5], [-1, 1]])
GOLDEN_SCORES = {"000": 3.4, "001": 1.8, "010": 1.9, "011": 3.3, "100": 1.0, "101": -0.6, "110": 2.5, "111": 3.9}


@pytest.mark.parametrize("device", DEVICES)
def test_golden(device: str) -> None:
    arguments = [x.to(device) for x in (START, END, TRANSITIONS)]
    e = EMISSIONS.to(device)
    assert F.crf_log_partition(e, None, *arguments).item() == pytest.approx(4.902785, abs=1e-6)
    llh = F.crf_log_likelihood(e, torch.tensor([[0, 1, 1]], device=device), None, *arguments)
    assert llh.item() == pytest.approx(-1.602785, abs=1e-6)
    assert F.crf_decode(e, None, *arguments) == [[1, 1, 1]]


def test_nbest_lists_every_sequence_in_order() -> None:
    (paths,), scores = F.crf_decode(EMISSIONS, None, START, END, TRANSITIONS, nbest=10, return_scores=True)
    names = ["".join(map(str, path)) for path in paths]
    assert names == sorted(GOLDEN_SCORES, key=GOLDEN_SCORES.get, reverse=True)
    assert scores[0, :8].tolist() == pytest.approx(sorted(GOLDEN_SCORES.values(), reverse=True), abs=1e-5)
    assert scores[0, 8:].tolist() == [-math.inf] * 2


def test_brute_force() -> None:
    """All sequences counted: partition, marginals, best (C39, C43)."""
    p = Problem(2, 4, 3, torch.float64, 1.0, 1.0, "", "contiguous", True, 5)
    e, potentials, (_, mask) = p.emissions("cpu"), p.potentials("cpu"), p.labels("cpu")
    start, end, transitions = potentials
    z, marginals = F.crf_log_partition(e, mask, *potentials), F.crf_marginals(e, mask, *potentials)
    best = F.crf_decode(e, mask, *potentials)
    for b, n in enumerate(mask.sum(1).tolist()):
        scores = {}
        for y in itertools.product(range(3), repeat=n):
            path = torch.tensor(y)
            scores[y] = float(
                start[y[0]] + end[y[-1]] + e[b, range(n), path].sum() + transitions[path[:-1], path[1:]].sum()
            )
        total = sum(math.exp(s) for s in scores.values())
        assert z[b].item() == pytest.approx(math.log(total), abs=1e-10)
        for t, j in itertools.product(range(n), range(3)):
            share = sum(math.exp(s) for y, s in scores.items() if y[t] == j) / total
            assert marginals[b, t, j].item() == pytest.approx(share, abs=1e-10)
        assert not marginals[b, n:].any()
        assert best[b] == list(max(scores, key=scores.get))


@pytest.mark.parametrize("never", [-math.inf, -1e4])
def test_what_becomes_likely_later_is_not_lost(never: float) -> None:
    """Two tags that never follow each other; the first wins every step by 1 nat, the end allows only the second."""
    steps = 300
    e = torch.zeros(1, steps, 2)
    e[:, :, 0] = 1
    transitions = torch.tensor([[0.0, never], [never, 0.0]])
    end = torch.tensor([never, 0.0])
    z = F.crf_log_partition(e, None, torch.zeros(2), end, transitions)
    assert z.item() == pytest.approx(0.0, abs=1e-3)
    assert F.crf_decode(e, None, torch.zeros(2), end, transitions) == [[1] * steps]
    marginals = F.crf_marginals(e, None, torch.zeros(2), end, transitions)
    assert torch.allclose(marginals[..., 1], torch.ones(1, steps))


def test_everything_forbidden() -> None:
    e, zeros = torch.zeros(1, 3, 2), torch.zeros(2)
    forbidden = torch.full((2, 2), -math.inf)
    assert F.crf_log_partition(e, None, zeros, zeros, forbidden).item() == -math.inf
    assert F.crf_decode(e, None, zeros, zeros, forbidden, return_scores=True)[1].item() == -math.inf


def test_equal_scores_prefer_the_lower_tag() -> None:
    zeros = torch.zeros(20)
    for kernel in ("avx512", "avx2", "portable", "reference"):
        with environment(PYSEQNET_FORCE=f"crf_viterbi:{kernel}"):
            try:
                found = F.crf_decode(torch.zeros(2, 4, 20), None, zeros, zeros, torch.zeros(20, 20))
            except RuntimeError as error:
                if not is_beyond_this_machine(error):
                    raise
                continue
        assert found == [[0] * 4] * 2


def test_nan_is_not_hidden() -> None:
    for value in (math.nan, math.inf):
        e = normal((3, 5, 4), 1, torch.float32)
        e[1, 2, 3] = value
        e = e.requires_grad_()
        potentials = [normal((4,), 2, torch.float32), normal((4,), 3, torch.float32), normal((4, 4), 4, torch.float32)]
        tags = torch.zeros(3, 5, dtype=torch.int64)
        llh = F.crf_log_likelihood(e, tags, None, *potentials)
        assert llh.isnan().tolist() == [False, True, False]
        (gradient,) = torch.autograd.grad(llh.sum(), e)
        assert gradient[1].isnan().all()
        assert gradient[::2].isfinite().all()
        paths, scores = F.crf_decode(e, None, *potentials, return_scores=True)
        assert scores.isnan().tolist() == [False, True, False]
        assert paths[1] == []


def test_padding_does_not_matter() -> None:
    e = normal((2, 5, 4), 1, torch.float32)
    potentials = [normal((4,), 2, torch.float32), normal((4,), 3, torch.float32), normal((4, 4), 4, torch.float32)]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    tags = torch.randint(0, 4, (2, 5), generator=torch.Generator().manual_seed(0))
    poisoned, strange = e.clone(), tags.clone()
    poisoned[0, 3:], strange[0, 3:] = math.nan, -100
    poisoned = poisoned.requires_grad_()
    llh = F.crf_log_likelihood(poisoned, strange, mask, *potentials)
    assert torch.equal(llh, F.crf_log_likelihood(e, tags, mask, *potentials))
    (gradient,) = torch.autograd.grad(llh.sum(), poisoned)
    assert gradient.isfinite().all()
    assert not gradient[0, 3:].any()
    assert F.crf_decode(poisoned, mask, *potentials) == F.crf_decode(e, mask, *potentials)


def test_deterministic_for_any_number_of_threads() -> None:
    p = Problem(37, 40, 21, torch.float32, 1.0, 1.0, "", "contiguous", True, 5)
    inputs = [x.requires_grad_() for x in (p.emissions("cpu"), *p.potentials("cpu"))]
    tags, mask = p.labels("cpu")
    results = []
    for count in (1, 2, 3):
        with threads(count):
            llh = F.crf_log_likelihood(inputs[0], tags, mask, *inputs[1:])
            results.append((llh.detach(), *torch.autograd.grad(llh.sum(), inputs)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck_and_double_backward() -> None:
    p = Problem(2, 4, 3, torch.float64, 1.0, 1.0, "", "contiguous", True, 5)
    inputs = [x.requires_grad_() for x in (p.emissions("cpu"), *p.potentials("cpu"))]
    tags, mask = p.labels("cpu")
    for function in (
        lambda e, s, z, a: F.crf_log_likelihood(e, tags, mask, s, z, a),
        lambda e, s, z, a: F.crf_log_partition(e, mask, s, z, a),
        lambda e, s, z, a: F.crf_marginals(e, mask, s, z, a),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_gradients_of_odd_strides() -> None:
    e = normal((3, 5, 4), 1, torch.float32).requires_grad_()
    potentials = [normal((4,), 2, torch.float32), normal((4,), 3, torch.float32), normal((4, 4), 4, torch.float32)]
    tags = torch.zeros(3, 5, dtype=torch.int64)
    (expanded,) = torch.autograd.grad(F.crf_log_likelihood(e, tags, None, *potentials).sum(), e)
    llh = F.crf_log_likelihood(e, tags, None, *potentials)
    (dense,) = torch.autograd.grad(llh, e, torch.ones(3))
    assert torch.equal(expanded, dense)
    (stepped,) = torch.autograd.grad(F.crf_log_likelihood(e, tags, None, *potentials), e, torch.ones(6)[::2])
    assert torch.equal(stepped, dense)


def test_compiles_in_one_graph() -> None:
    def step(e: Tensor, tags: Tensor, mask: Tensor, s: Tensor, z: Tensor, a: Tensor) -> Tensor:
        return -F.crf_log_likelihood(e, tags, mask, s, z, a).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    p = Problem(3, 6, 4, torch.float32, 1.0, 1.0, "", "contiguous", True, 5)
    inputs = [x.requires_grad_() for x in (p.emissions("cpu"), *p.potentials("cpu"))]
    results = [f(inputs[0], *p.labels("cpu"), *inputs[1:]) for f in (step, compiled)]
    assert torch.allclose(*results)
    for a, b in zip(*(torch.autograd.grad(r, inputs) for r in results), strict=True):
        assert torch.allclose(a, b)


def test_references() -> None:
    p = Problem(4, 7, 5, torch.float64, 1.0, 1.0, "", "contiguous", True, 6)
    e, potentials, (tags, mask) = p.emissions("cpu"), p.potentials("cpu"), p.labels("cpu")
    for ours, theirs in (
        (F.crf_log_partition, F.crf_log_partition_reference),
        (F.crf_marginals, F.crf_marginals_reference),
    ):
        assert torch.allclose(ours(e, mask, *potentials), theirs(e, mask, *potentials), rtol=0, atol=1e-12)
    assert F.crf_decode(e, mask, *potentials) == F.crf_decode_reference(e, mask, *potentials)
    assert F.crf_log_likelihood_reference(e, tags, mask, *potentials).shape == (4,)


# ---------------------------------------------------------------- the layer


def test_layer_is_what_pytorch_crf_users_write() -> None:
    torch.manual_seed(0)
    crf = nn.CRF(5)
    assert sorted(crf.state_dict()) == ["end_transitions", "start_transitions", "transitions"]
    assert all(parameter.abs().max() <= 0.1 for parameter in crf.parameters())
    assert repr(crf) == "CRF(num_tags=5)"
    emissions, tags = torch.randn(3, 2, 5), torch.tensor([[0, 1], [2, 4], [3, 1]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0]], dtype=torch.uint8)
    each = crf(emissions, tags, mask, reduction="none")
    assert each.shape == (2,)
    assert torch.allclose(crf(emissions, tags, mask), each.sum())
    assert torch.allclose(crf(emissions, tags, mask, reduction="mean"), each.mean())
    assert torch.allclose(crf(emissions, tags, mask, reduction="token_mean"), each.sum() / 5)
    assert torch.allclose(crf(emissions, tags, reduction="token_mean"), crf(emissions, tags) / 6)
    assert [len(path) for path in crf.decode(emissions, mask)] == [3, 2]
    assert [len(paths) for paths in crf.decode(emissions, mask, nbest=4)] == [4, 4]
    assert crf.marginals(emissions, mask).sum(2).allclose(mask.float())
    first = nn.CRF(5, batch_first=True)
    first.load_state_dict(crf.state_dict())
    swapped = first(emissions.transpose(0, 1), tags.t(), mask.t(), reduction="none")
    assert torch.equal(swapped, each)


def test_layer_learns() -> None:
    """Tags that depend on the tag before alone: emissions say nothing, transitions learn it."""
    torch.manual_seed(0)
    crf = nn.CRF(3, batch_first=True)
    tags = (torch.arange(12) % 3).expand(4, 12)
    emissions = torch.zeros(4, 12, 3)
    optimizer = torch.optim.SGD(crf.parameters(), lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        (-crf(emissions, tags, reduction="mean")).backward()
        optimizer.step()
    assert crf.decode(emissions) == tags.tolist()


E3, T3 = torch.zeros(2, 3, 2), torch.zeros(2, 3, dtype=torch.int64)
ZEROS = (torch.zeros(2), torch.zeros(2), torch.zeros(2, 2))
BAD = [
    ((E3[0], T3, None, *ZEROS), ValueError, "emissions must have dimension of 3, got 2"),
    ((E3, T3[:1], None, *ZEROS), ValueError, r"emissions and tags must match, got \(2, 3\) and \(1, 3\)"),
    ((E3, T3, torch.ones(2, 2, dtype=torch.bool), *ZEROS), ValueError, "emissions and mask must match"),
    ((E3, T3, torch.tensor([[0, 1, 1]] * 2).bool(), *ZEROS), ValueError, "mask of the first timestep must all be on"),
    ((E3, T3, torch.tensor([[1, 0, 1]] * 2).bool(), *ZEROS), ValueError, "without holes"),
    ((E3, T3, torch.ones(2, 3), *ZEROS), TypeError, "mask must be bool or uint8"),
    ((E3, T3 + 2, None, *ZEROS), ValueError, "tags must lie between 0 and C - 1"),
    ((E3, T3 - 1, None, *ZEROS), ValueError, "tags must lie between 0 and C - 1"),
    ((E3, T3.float(), None, *ZEROS), TypeError, "tags must be integers"),
    ((E3, T3, None, torch.zeros(3), *ZEROS[1:]), ValueError, r"start must be \(2,\) for 2 tags, got \(3,\)"),
    ((E3.long(), T3, None, *ZEROS), TypeError, "expected one of float32"),
    ((E3[:, :0], T3[:, :0], None, *ZEROS), ValueError, "at least one step"),
    ((E3[..., :0], T3, None, *[z[..., :0] for z in ZEROS[:2]], torch.zeros(0, 0)), ValueError, "at least one tag"),
    (("emissions", T3, None, *ZEROS), TypeError, "expected a Tensor, got str"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        F.crf_log_likelihood(*arguments)


def test_bad_layer_input() -> None:
    with pytest.raises(ValueError, match="invalid number of tags: 0"):
        nn.CRF(0)
    crf = nn.CRF(2, batch_first=True)
    with pytest.raises(ValueError, match="invalid reduction: median"):
        crf(E3, T3, reduction="median")
    with pytest.raises(ValueError, match="expected last dimension of emissions is 2, got 3"):
        crf(torch.zeros(2, 3, 3), T3)
    with pytest.raises(ValueError, match="nbest must be a positive integer"):
        crf.decode(E3, nbest=0)
