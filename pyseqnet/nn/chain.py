"""Layers on linear chains: the CTC loss, the conditional random field, the hidden Markov model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import CTCLoss as _TorchCTCLoss

from pyseqnet import chain
from pyseqnet import functional as F


class CTCLoss(_TorchCTCLoss):
    """Drop-in for `torch.nn.CTCLoss`; see `pyseqnet.functional.ctc_loss`.

    Args:
        blank, reduction, zero_infinity: as torch's.
        from_logits: the input are logits; the log-softmax is part of the kernel.
    """

    from_logits = False  # of a layer that was torch's and was converted

    def __init__(
        self, blank: int = 0, reduction: str = "mean", zero_infinity: bool = False, *, from_logits: bool = False
    ) -> None:
        super().__init__(blank, reduction, zero_infinity)
        self.from_logits = from_logits

    def forward(self, log_probs: Tensor, targets: Tensor, input_lengths: Any, target_lengths: Any) -> Tensor:
        return F.ctc_loss(
            log_probs,
            targets,
            input_lengths,
            target_lengths,
            self.blank,
            self.reduction,
            self.zero_infinity,
            from_logits=self.from_logits,
        )


class CRF(torch.nn.Module):
    """Linear-chain conditional random field, with the interface that pytorch-crf made common.

    ``forward`` gives the log-likelihood, which training maximises: the loss is ``-crf(emissions, tags, mask)``.

    Args:
        num_tags: number of tags C.
        batch_first: tensors come as ``(B, T, ...)``; the default is ``(T, B, ...)``.
        allowed: which tags may begin, end, and follow each other, as `pyseqnet.chain.allowed_transitions` makes it from
            names. What is not allowed has score -inf, in training and decoding; sequences that break the rules have
            probability 0. The ``state_dict`` does not hold it.

    Attributes:
        start_transitions: ``(C,)``, end_transitions: ``(C,)``, transitions: ``(C, C)``, uniform in [-0.1, 0.1] at
            first. ``transitions[i, j]`` is the score of tag j after tag i.

    Paper: Lafferty, McCallum, Pereira, Conditional random fields, 2001.
    """

    allowed_start: Tensor
    allowed_end: Tensor
    allowed_transitions: Tensor

    def __init__(
        self, num_tags: int, batch_first: bool = False, *, allowed: chain.AllowedTransitions | None = None
    ) -> None:
        if num_tags <= 0:
            raise ValueError(f"invalid number of tags: {num_tags}")
        super().__init__()
        self.num_tags = num_tags
        self.batch_first = batch_first
        self.start_transitions = torch.nn.Parameter(torch.empty(num_tags))
        self.end_transitions = torch.nn.Parameter(torch.empty(num_tags))
        self.transitions = torch.nn.Parameter(torch.empty(num_tags, num_tags))
        self.constrained = allowed is not None
        shapes = ((num_tags,), (num_tags,), (num_tags, num_tags))
        for name, value, shape in zip(chain.AllowedTransitions._fields, allowed or (None,) * 3, shapes, strict=True):
            if value is not None and (value.dtype != torch.bool or tuple(value.shape) != shape):
                raise ValueError(f"allowed.{name} must be bool {shape}, got {value.dtype} {tuple(value.shape)}")
            self.register_buffer(f"allowed_{name}", value, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all scores from the uniform distribution on [-0.1, 0.1]."""
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -0.1, 0.1)

    def extra_repr(self) -> str:
        return f"num_tags={self.num_tags}" + (", batch_first=True" if self.batch_first else "")

    def forward(self, emissions: Tensor, tags: Tensor, mask: Tensor | None = None, reduction: str = "sum") -> Tensor:
        """The log-likelihood of tag sequences.

        Args:
            emissions: ``(T, B, C)``, or ``(B, T, C)`` if ``batch_first``; see `pyseqnet.functional.crf_log_likelihood`.
            tags, mask: ``(T, B)``, or ``(B, T)`` if ``batch_first``.
            reduction: ``"none"``, ``"sum"``, ``"mean"`` over sequences, or ``"token_mean"``: the sum over sequences
                divided by the number of steps that are on.

        Returns:
            A scalar; ``(B)`` for ``"none"``.
        """
        if reduction not in ("none", "sum", "mean", "token_mean"):
            raise ValueError(f"invalid reduction: {reduction}")
        emissions, mask, tags = self._batch_first(emissions, mask, tags)
        llh = F.crf_log_likelihood(emissions, tags, mask, *self._scores())
        if reduction == "none":
            return llh
        if reduction == "sum":
            return llh.sum()
        if reduction == "mean":
            return llh.mean()
        steps = mask.sum() if mask is not None else emissions.shape[0] * emissions.shape[1]
        return llh.sum() / steps

    def decode(self, emissions: Tensor, mask: Tensor | None = None, nbest: int = 1) -> Any:
        """The best tag sequences; see `pyseqnet.functional.crf_decode`.

        Returns:
            A list of tags for each sequence; with ``nbest > 1`` a list of such lists, best first.
        """
        emissions, mask, _ = self._batch_first(emissions, mask)
        return F.crf_decode(emissions, mask, *self._scores(), nbest=nbest)

    def marginals(self, emissions: Tensor, mask: Tensor | None = None) -> Tensor:
        """Probabilities of each tag at each step, in the shape of ``emissions``; see
        `pyseqnet.functional.crf_marginals`."""
        emissions, mask, _ = self._batch_first(emissions, mask)
        result = F.crf_marginals(emissions, mask, *self._scores())
        return result if self.batch_first else result.transpose(0, 1)

    def entropy(self, emissions: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B)``: entropy of each sequence's distribution of tags; see `pyseqnet.chain.crf_entropy`."""
        emissions, mask, _ = self._batch_first(emissions, mask)
        return chain.crf_entropy(emissions, mask, *self._scores())

    def sample(
        self,
        emissions: Tensor,
        mask: Tensor | None = None,
        num_samples: int = 1,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Tags drawn from the distribution, ``(K, T, B)``, or ``(K, B, T)`` if ``batch_first``; see
        `pyseqnet.chain.crf_sample`."""
        emissions, mask, _ = self._batch_first(emissions, mask)
        found = chain.crf_sample(emissions, mask, *self._scores(), num_samples, generator=generator)
        return found if self.batch_first else found.transpose(1, 2)

    def hinge_loss(self, emissions: Tensor, tags: Tensor, mask: Tensor | None = None, *, cost: float = 1.0) -> Tensor:
        """``(B)``: the structured support vector machine's loss, with ``cost=0`` the structured perceptron's; to be
        minimised. See `pyseqnet.chain.structured_hinge_loss`."""
        emissions, mask, tags = self._batch_first(emissions, mask, tags)
        return chain.structured_hinge_loss(emissions, tags, mask, *self._scores(), cost=cost)

    def _scores(self) -> tuple[Tensor, Tensor, Tensor]:
        scores = (self.start_transitions, self.end_transitions, self.transitions)
        if not self.constrained:
            return scores
        allowed = (self.allowed_start, self.allowed_end, self.allowed_transitions)
        start, end, transitions = (x.masked_fill(~may, -math.inf) for x, may in zip(scores, allowed, strict=True))
        return start, end, transitions

    def _batch_first(
        self, emissions: Tensor, mask: Tensor | None, tags: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Any]:
        if emissions.dim() != 3:
            raise ValueError(f"emissions must have dimension of 3, got {emissions.dim()}")
        if emissions.shape[2] != self.num_tags:
            raise ValueError(f"expected last dimension of emissions is {self.num_tags}, got {emissions.shape[2]}")
        for name, other in (("tags", tags), ("mask", mask)):  # before they are turned: in the caller's order
            if other is not None and other.shape != emissions.shape[:2]:
                raise ValueError(
                    f"the first two dimensions of emissions and {name} must match, "
                    f"got {tuple(emissions.shape[:2])} and {tuple(other.shape)}"
                )
        if self.batch_first:
            return emissions, mask, tags
        return emissions.transpose(0, 1), None if mask is None else mask.t(), None if tags is None else tags.t()


class HMM(torch.nn.Module):
    """Hidden Markov model, trained by Baum-Welch or by gradients.

    With ``num_symbols`` it reads symbols ``(B, T)``. Without, it reads ``(B, T, S)`` log-probabilities of what is seen
    at each step in each state, such as those that `pyseqnet.chain.scaled_log_likelihoods` makes from a network's
    posteriors (a hybrid of network and HMM).

    Args:
        num_states: number of states S.
        num_symbols: number of symbols V, or None.

    Attributes:
        initial_logits: ``(S,)``, as the others drawn from a standard normal at first; a log-softmax over the last
            dimension gives the log-probabilities.
        transition_logits: ``(S, S)``.
        emission_logits: ``(S, V)``, with symbols.

    Paper: Rabiner, A tutorial on hidden Markov models, 1989.
    """

    def __init__(self, num_states: int, num_symbols: int | None = None) -> None:
        for name, value in (("states", num_states), ("symbols", 1 if num_symbols is None else num_symbols)):
            if value <= 0:
                raise ValueError(f"invalid number of {name}: {value}")
        super().__init__()
        self.num_states, self.num_symbols = num_states, num_symbols
        self.initial_logits = torch.nn.Parameter(torch.empty(num_states))
        self.transition_logits = torch.nn.Parameter(torch.empty(num_states, num_states))
        self.emission_logits = None if num_symbols is None else torch.nn.Parameter(torch.empty(num_states, num_symbols))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all logits from a standard normal: states must differ at first, or EM never tells them apart."""
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter)

    def extra_repr(self) -> str:
        return f"num_states={self.num_states}, num_symbols={self.num_symbols}"

    def forward(self, observations: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B)`` log-likelihoods; see `pyseqnet.chain.hmm_log_likelihood`."""
        return chain.hmm_log_likelihood(*self._chain(observations, mask))

    def decode(self, observations: Tensor, mask: Tensor | None = None, nbest: int = 1) -> Any:
        """The most probable state sequences; see `pyseqnet.chain.hmm_decode`."""
        return chain.hmm_decode(*self._chain(observations, mask), nbest=nbest)

    def posteriors(self, observations: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, T, S)`` probabilities of states; see `pyseqnet.chain.hmm_posteriors`."""
        return chain.hmm_posteriors(*self._chain(observations, mask))

    @torch.no_grad()
    def baum_welch_step(self, symbols: Tensor, mask: Tensor | None = None, *, pseudo_count: float = 0.0) -> Tensor:
        """Replaces the parameters by a step of EM; returns ``(B)`` log-likelihoods before it.

        See `pyseqnet.chain.hmm_baum_welch_step`.
        """
        if self.emission_logits is None:
            raise ValueError("baum_welch_step needs an HMM with num_symbols")
        logits = (self.initial_logits, self.transition_logits, self.emission_logits)
        old = chain.HmmParameters(*(x.log_softmax(-1) for x in logits))
        new, log_likelihood = chain.hmm_baum_welch_step(symbols, mask, old, pseudo_count=pseudo_count)
        for parameter, value in zip(logits, new, strict=True):
            parameter.copy_(value)
        return log_likelihood

    def _chain(self, observations: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        if self.emission_logits is not None:
            observations = chain.emissions_of_symbols(observations, mask, self.emission_logits.log_softmax(-1))
        return observations, mask, self.initial_logits.log_softmax(0), self.transition_logits.log_softmax(-1)
