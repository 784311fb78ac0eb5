"""Hidden Markov models (C39, C44): against the enumeration of all state sequences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support import normal
from torch import Tensor

from pyseqnet import chain, nn


def model(states: int, symbols: int, seed: int) -> chain.HmmParameters:
    shapes = ((states,), (states, states), (states, symbols))
    return chain.HmmParameters(*(normal(shape, seed + k).log_softmax(-1) for k, shape in enumerate(shapes)))


def words(batch: int, steps: int, symbols: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, steps + 1, (batch,), generator=generator)
    lengths[0] = steps
    return torch.randint(0, symbols, (batch, steps), generator=generator), torch.arange(steps) < lengths[:, None]


def every_sequence(x: list[int], parameters: chain.HmmParameters) -> dict[tuple[int, ...], float]:
    """The joint log-probability of each state sequence and the symbols."""
    initial, transitions, emissions = (p.tolist() for p in parameters)
    joint = {}
    for y in itertools.product(range(len(initial)), repeat=len(x)):
        total = initial[y[0]] + sum(emissions[s][v] for s, v in zip(y, x, strict=True))
        joint[y] = total + sum(transitions[i][j] for i, j in itertools.pairwise(y))
    return joint


@pytest.mark.parametrize("states", [1, 2, 4])
def test_forward_viterbi_and_posteriors_count_every_sequence(states: int) -> None:
    parameters = model(states, 3, states)
    x, mask = words(3, 5, 3, states)
    observations = chain.emissions_of_symbols(x, mask, parameters.emissions)
    arguments = (observations, mask, parameters.initial, parameters.transitions)
    llh, paths = chain.hmm_log_likelihood(*arguments), chain.hmm_decode(*arguments)
    posteriors = chain.hmm_posteriors(*arguments)
    for b, n in enumerate(mask.sum(1).tolist()):
        joint = every_sequence(x[b, :n].tolist(), parameters)
        total = sum(math.exp(v) for v in joint.values())
        assert llh[b].item() == pytest.approx(math.log(total), abs=1e-12)
        assert tuple(paths[b]) == max(joint, key=joint.get)
        for t, s in itertools.product(range(n), range(states)):
            share = sum(math.exp(v) for y, v in joint.items() if y[t] == s) / total
            assert posteriors[b, t, s].item() == pytest.approx(share, abs=1e-12)


def test_all_words_of_a_length_have_probability_one() -> None:
    parameters = model(3, 2, 9)
    x = torch.tensor(list(itertools.product(range(2), repeat=5)))
    observations = chain.emissions_of_symbols(x, None, parameters.emissions)
    llh = chain.hmm_log_likelihood(observations, None, parameters.initial, parameters.transitions)
    assert llh.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_a_step_of_baum_welch_is_the_ratio_of_expected_counts() -> None:
    parameters = model(3, 4, 2)
    x, mask = words(4, 4, 4, 2)
    found, _ = chain.hmm_baum_welch_step(x, mask, parameters)
    counts = [torch.zeros_like(p) for p in parameters]
    for b, n in enumerate(mask.sum(1).tolist()):
        joint = every_sequence(x[b, :n].tolist(), parameters)
        total = sum(math.exp(v) for v in joint.values())
        for y, value in joint.items():
            share = math.exp(value) / total
            counts[0][y[0]] += share
            for i, j in itertools.pairwise(y):
                counts[1][i, j] += share
            for s, v in zip(y, x[b].tolist(), strict=False):
                counts[2][s, v] += share
    for mine, count in zip(found, counts, strict=True):
        torch.testing.assert_close(mine.exp(), count / count.sum(-1, keepdim=True), rtol=0, atol=1e-12)


def test_em_never_gets_worse_and_finds_a_regular_source() -> None:
    """Two symbols in turn: with two states the log-likelihood of each word is at best log 1/2."""
    torch.manual_seed(0)
    hmm = nn.HMM(2, 2).double()
    x = (torch.arange(20) + torch.arange(6)[:, None]) % 2
    before = -math.inf
    for _ in range(60):
        now = hmm.baum_welch_step(x).sum().item()
        assert now >= before - 1e-9
        before = now
    assert before == pytest.approx(6 * math.log(0.5), abs=1e-3)
    with pytest.raises(ValueError, match="pseudo_count must not be negative"):
        hmm.baum_welch_step(x, pseudo_count=-1.0)


def test_unreached_states_keep_their_rows_and_pseudo_counts_forbid_nothing() -> None:
    initial = torch.tensor([0.0, -math.inf])
    transitions = torch.tensor([[0.0, -math.inf], [math.log(0.5)] * 2])
    old = chain.HmmParameters(initial, transitions, torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log())
    x = torch.zeros(2, 4, dtype=torch.int64)
    new, _ = chain.hmm_baum_welch_step(x, None, old)
    assert torch.equal(new.transitions[1], transitions[1])
    assert torch.equal(new.emissions[1], old.emissions[1])
    assert new.emissions[0].exp().tolist() == [1, 0]
    smooth, _ = chain.hmm_baum_welch_step(x, None, old, pseudo_count=0.1)
    assert all(p.isfinite().all() for p in smooth)


def test_layer_trains_by_gradients_too_and_takes_likelihoods() -> None:
    torch.manual_seed(0)
    hmm = nn.HMM(3, 4)
    x, mask = words(5, 6, 4, 3)
    first = hmm(x, mask).sum()
    optimizer = torch.optim.Adam(hmm.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (-hmm(x, mask).sum()).backward()
        optimizer.step()
    assert hmm(x, mask).sum() > first + 1
    plain = nn.HMM(3)
    plain.load_state_dict({k: v for k, v in hmm.state_dict().items() if k != "emission_logits"})
    observations = chain.emissions_of_symbols(x, mask, hmm.emission_logits.log_softmax(-1))
    assert torch.equal(plain(observations, mask), hmm(x, mask))
    assert plain.decode(observations, mask) == hmm.decode(x, mask)
    assert torch.equal(plain.posteriors(observations, mask), hmm.posteriors(x, mask))
    with pytest.raises(ValueError, match="baum_welch_step needs an HMM with num_symbols"):
        plain.baum_welch_step(observations)


def test_hybrid_takes_the_priors_out_of_a_networks_posteriors() -> None:
    """p(s | x) of a frame, made from a known p(x | s) by Bayes, gives back that HMM's answers; the chain corrects
    frames that a network alone gets wrong."""
    torch.manual_seed(0)
    likelihoods, priors = torch.rand(2, 3), torch.tensor([0.2, 0.8])
    x = torch.randint(0, 3, (4, 9))
    joint = priors[:, None] * likelihoods
    log_posteriors = (joint / joint.sum(0)).log().t()[x]
    hmm = nn.HMM(2)
    scaled = chain.scaled_log_likelihoods(log_posteriors, priors.log())
    torch.testing.assert_close(hmm.posteriors(scaled), hmm.posteriors(likelihoods.log().t()[x]))

    states = torch.arange(200) // 10 % 2  # stay ten frames each
    noisy = torch.nn.functional.one_hot(states, 2) + 1.2 * torch.randn(200, 2)
    posteriors = noisy.log_softmax(-1)[None]
    sticky = chain.hmm_decode(
        chain.scaled_log_likelihoods(posteriors, torch.tensor([0.5, 0.5]).log()), None,
        torch.tensor([0.5, 0.5]).log(), torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log(),
    )  # fmt: skip
    right = (torch.tensor(sticky[0]) == states).sum()
    assert right > (posteriors[0].argmax(1) == states).sum()


def test_nan_in_padding_is_not_read() -> None:
    mask = torch.arange(5) < torch.tensor([5, 2])[:, None]
    initial, transitions, emissions = (torch.randn(shape).log_softmax(-1) for shape in (3, (3, 3), (3, 4)))
    clean = chain.emissions_of_symbols(torch.randint(4, (2, 5)), mask, emissions)
    spoilt = clean.masked_fill(~mask[:, :, None], torch.nan)
    for function in (chain.hmm_log_likelihood, chain.hmm_posteriors, chain.hmm_decode):
        wanted, found = (function(x, mask, initial, transitions) for x in (clean, spoilt))
        assert torch.equal(found, wanted) if isinstance(wanted, torch.Tensor) else found == wanted


def test_bad_input() -> None:
    for size in ((0, 2), (2, 0)):
        with pytest.raises(ValueError, match=r"invalid number of (states|symbols): 0"):
            nn.HMM(*size)
    hmm = nn.HMM(2, 3)
    with pytest.raises(ValueError, match="symbols must lie between 0 and V - 1"):
        hmm(torch.tensor([[3]]))
    with pytest.raises(TypeError, match=r"symbols must be integers, got torch\.float32"):
        hmm(torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"symbols must be \(B, T\), got \(2,\)"):
        hmm(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="symbols and mask must match"):
        hmm(torch.tensor([[1, 2]]), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask of the first timestep must all be on"):
        hmm(torch.tensor([[1, 2]]), torch.tensor([[False, True]]))
    with pytest.raises(ValueError, match="mask must be on without holes"):
        hmm(torch.tensor([[1, 2, 1]]), torch.tensor([[True, False, True]]))
    with pytest.raises(ValueError, match="symbols must lie between 0 and V - 1"):
        hmm(torch.tensor([[-1]]))
    with pytest.raises(ValueError, match="at least one tag"):
        chain.hmm_log_likelihood(torch.zeros(1, 2, 0), None, torch.zeros(0), torch.zeros(0, 0))
    with pytest.raises(ValueError, match=r"log_priors must be one value a state, got \(3,\) for \(1, 1, 2\)"):
        chain.scaled_log_likelihoods(torch.zeros(1, 1, 2), torch.zeros(3))
    strange, mask = torch.tensor([[1, -7]]), torch.tensor([[True, False]])
    assert torch.equal(hmm(strange, mask), hmm(torch.tensor([[1]])))
