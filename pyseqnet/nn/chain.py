"""Layers on linear chains: the CTC loss and the conditional random field."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import CTCLoss as _TorchCTCLoss

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

    Attributes:
        start_transitions: ``(C,)``, end_transitions: ``(C,)``, transitions: ``(C, C)``, uniform in [-0.1, 0.1] at
            first. ``transitions[i, j]`` is the score of tag j after tag i.

    Paper: Lafferty, McCallum, Pereira, Conditional random fields, 2001.
    """

    def __init__(self, num_tags: int, batch_first: bool = False) -> None:
        if num_tags <= 0:
            raise ValueError(f"invalid number of tags: {num_tags}")
        super().__init__()
        self.num_tags = num_tags
        self.batch_first = batch_first
        self.start_transitions = torch.nn.Parameter(torch.empty(num_tags))
        self.end_transitions = torch.nn.Parameter(torch.empty(num_tags))
        self.transitions = torch.nn.Parameter(torch.empty(num_tags, num_tags))
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
        emissions, mask = self._batch_first(emissions, mask)
        tags = tags if self.batch_first or tags.dim() < 2 else tags.transpose(0, 1)
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
        emissions, mask = self._batch_first(emissions, mask)
        return F.crf_decode(emissions, mask, *self._scores(), nbest=nbest)

    def marginals(self, emissions: Tensor, mask: Tensor | None = None) -> Tensor:
        """Probabilities of each tag at each step, in the shape of ``emissions``; see
        `pyseqnet.functional.crf_marginals`."""
        emissions, mask = self._batch_first(emissions, mask)
        result = F.crf_marginals(emissions, mask, *self._scores())
        return result if self.batch_first else result.transpose(0, 1)

    def _scores(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.start_transitions, self.end_transitions, self.transitions

    def _batch_first(self, emissions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if emissions.dim() != 3:
            raise ValueError(f"emissions must have dimension of 3, got {emissions.dim()}")
        if emissions.shape[2] != self.num_tags:
            raise ValueError(f"expected last dimension of emissions is {self.num_tags}, got {emissions.shape[2]}")
        if self.batch_first:
            return emissions, mask
        return emissions.transpose(0, 1), mask.transpose(0, 1) if mask is not None and mask.dim() == 2 else mask
