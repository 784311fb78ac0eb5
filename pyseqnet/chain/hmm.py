"""Hidden Markov models: a linear chain whose scores are log-probabilities.

Rabiner: A tutorial on hidden Markov models and selected applications in speech recognition, 1989.
Baum, Petrie, Soules, Weiss: A maximization technique occurring in the statistical analysis of probabilistic functions
of Markov chains, 1970.
Bourlard, Morgan: Connectionist speech recognition: a hybrid approach, 1994.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyseqnet import functional as F
from pyseqnet.functional.crf import expected_counts


class HmmParameters(NamedTuple):
    """Log-probabilities: initial ``(S,)``, transitions ``(S, S)`` of state j after i at ``[i, j]``, emissions
    ``(S, V)`` of symbols."""

    initial: Tensor
    transitions: Tensor
    emissions: Tensor


class HmmCounts(NamedTuple):
    """What is expected given the observations: how often states come first ``(S,)``, how often j follows i
    ``(S, S)``, and the probability of each state at each step ``(B, T, S)``."""

    initial: Tensor
    transitions: Tensor
    posteriors: Tensor


def hmm_log_likelihood(observations: Tensor, mask: Tensor | None, initial: Tensor, transitions: Tensor) -> Tensor:
    """Log-probability of the observations, over all state sequences (the forward algorithm).

    Equivalent to::

        joint = initial[y[0]] + transitions[y[:-1], y[1:]].sum() + observations[b, range(n), y].sum()
        torch.stack([joint(y) for y in all_state_sequences]).logsumexp(0)

    Args:
        observations: ``(B, T, S)`` log-probabilities of what is seen at each step, given each state.
        mask: ``(B, T)`` bool, on for steps that exist; None: all.
        initial: ``(S,)`` and transitions ``(S, S)``: log-probabilities; -inf forbids.

    Returns ``(B)``. Differentiable. Errors as `pyseqnet.functional.crf_log_partition`, which computes it.

    Paper: Rabiner, A tutorial on hidden Markov models, 1989.
    """
    return F.crf_log_partition(observations, mask, initial, torch.zeros_like(initial), transitions)


def hmm_posteriors(observations: Tensor, mask: Tensor | None, initial: Tensor, transitions: Tensor) -> Tensor:
    """``(B, T, S)``: probability of each state at each step given all observations (forward-backward).

    Args as `hmm_log_likelihood`; see `pyseqnet.functional.crf_marginals`.
    """
    return F.crf_marginals(observations, mask, initial, torch.zeros_like(initial), transitions)


def hmm_decode(observations: Tensor, mask: Tensor | None, initial: Tensor, transitions: Tensor, nbest: int = 1) -> Any:
    """The most probable state sequences (Viterbi); args as `hmm_log_likelihood`, result as
    `pyseqnet.functional.crf_decode`."""
    return F.crf_decode(observations, mask, initial, torch.zeros_like(initial), transitions, nbest)


def hmm_expected_counts(observations: Tensor, mask: Tensor | None, initial: Tensor, transitions: Tensor) -> HmmCounts:
    """The expectations of the E step of EM. Args as `hmm_log_likelihood`. No gradient flows through."""
    posteriors, first, _, pairs = expected_counts(observations, mask, initial, torch.zeros_like(initial), transitions)
    return HmmCounts(first, pairs, posteriors)


@torch.no_grad()
def hmm_baum_welch_step(
    symbols: Tensor, mask: Tensor | None, parameters: HmmParameters, *, pseudo_count: float = 0.0
) -> tuple[HmmParameters, Tensor]:
    """One step of EM on symbols: parameters under which they are at least as probable.

    Args:
        symbols: ``(B, T)`` integers, 0 to V - 1; those of steps that are off may be anything.
        mask: as `hmm_log_likelihood`.
        parameters: see `HmmParameters`.
        pseudo_count: added to every expected count; above 0 nothing becomes impossible.

    Returns:
        New parameters, and ``(B)`` log-likelihoods under the old ones. A state that is never reached keeps its rows.

    Paper: Baum et al., A maximization technique, 1970.
    """
    if pseudo_count < 0:
        raise ValueError(f"pseudo_count must not be negative, got {pseudo_count}")
    initial, transitions, emissions = parameters
    observations = emissions_of_symbols(symbols, mask, emissions)
    log_likelihood = hmm_log_likelihood(observations, mask, initial, transitions)
    counts = hmm_expected_counts(observations, mask, initial, transitions)
    seen = torch.nn.functional.one_hot(_kept_symbols(symbols, mask), emissions.shape[1]).to(emissions.dtype)
    produced = torch.einsum("bts,btv->sv", counts.posteriors.to(emissions.dtype), seen)

    def normalized(count: Tensor, old: Tensor) -> Tensor:
        total = (count + pseudo_count).sum(-1, keepdim=True)
        return torch.where(total > 0, ((count + pseudo_count) / total).log(), old)

    found = HmmParameters(
        normalized(counts.initial, initial),
        normalized(counts.transitions, transitions),
        normalized(produced, emissions),
    )
    return found, log_likelihood


def _kept_symbols(symbols: Tensor, mask: Tensor | None) -> Tensor:
    symbols = symbols.to(torch.int64)
    return symbols if mask is None else symbols.masked_fill(mask == 0, 0)


def emissions_of_symbols(symbols: Tensor, mask: Tensor | None, emissions: Tensor) -> Tensor:
    """``(B, T, S)``: log-probabilities ``emissions`` (S, V) of symbols (B, T), for each state."""
    if symbols.dim() != 2:
        raise ValueError(f"symbols must be (B, T), got {tuple(symbols.shape)}")
    if symbols.is_floating_point() or symbols.is_complex() or symbols.dtype == torch.bool:
        raise TypeError(f"symbols must be integers, got {symbols.dtype}")
    if mask is not None and mask.shape != symbols.shape:
        raise ValueError(f"symbols and mask must match, got {tuple(symbols.shape)} and {tuple(mask.shape)}")
    kept = _kept_symbols(symbols, mask)
    if not kept.is_cuda and not kept.is_meta and bool(((kept < 0) | (kept >= emissions.shape[1])).any()):
        raise ValueError("symbols must lie between 0 and V - 1")
    return emissions.t()[kept]


def scaled_log_likelihoods(log_posteriors: Tensor, log_priors: Tensor) -> Tensor:
    """A network's state posteriors as an HMM's observations, by Bayes: log p(x | s) = log p(s | x) - log p(s) + const.

    The constant, log p(x), is the same for all states: decoding and posteriors do not depend on it.

    Args:
        log_posteriors: ``(B, T, S)`` log-softmax of a network over states.
        log_priors: ``(S,)`` log of the share of each state in the training alignments.

    Paper: Bourlard and Morgan, Connectionist speech recognition: a hybrid approach, 1994.
    """
    if log_priors.dim() != 1 or log_posteriors.shape[-1] != log_priors.shape[0]:
        raise ValueError(
            f"log_priors must be one value a state, got {tuple(log_priors.shape)} for {tuple(log_posteriors.shape)}"
        )
    return log_posteriors - log_priors
