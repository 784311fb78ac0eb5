"""What a model must offer to be decoded: one step, and the choice of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

LogitsHook = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class Stepper(Protocol):
    """A decoder with incremental state: what `generate` asks of a model.

    R is the number of rows that are decoded side by side: sequences, times beams or samples. The state is the model's
    own affair; `generate` only hands it on, and never uses again one that it has passed to `step` or `reorder`: both
    may change it in place.

    A decoder that attends may have a third method, ``alignment(state) -> (R, S)``: the weights of the last step over
    the source. `generate` calls it if alignments are asked for.
    """

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Takes the next token of each row, ``(R,)`` int64; returns logits ``(R, V)`` of the one behind, new state."""
        ...

    def reorder(self, state: Any, index: Tensor) -> Any:
        """The state of the rows `index`, int64; rows may repeat, and there may be more or fewer than before."""
        ...


@dataclass(frozen=True)
class Generated:
    """What was decoded: N results for each of B sequences, best first (samples: in the order they were drawn).

    Attributes:
        tokens: ``(B, N, T)``, without the token that it began with; END is the last token where a sequence has ended,
            padding behind it.
        lengths: ``(B, N)``, END counted.
        log_probs: ``(B, N)``, natural log of the probability that the model gives the whole sequence, END included.
            Temperature, top-k and top-p do not enter; logits hooks and the minimum length do.
        scores: ``(B, N)``: ``log_probs`` divided by the length penalty; what beams are ranked by. -inf marks a row
            that does not exist, where there are fewer sequences than results asked for: its length is 0.
        alignments: ``(B, N, T, S)``: for each written token the attention over the source by which it was chosen, 0 in
            the padding; None if not asked for.
    """

    tokens: Tensor
    lengths: Tensor
    log_probs: Tensor
    scores: Tensor
    alignments: Tensor | None = None

    def sequences(self, end: int | None = None) -> list[list[list[int]]]:
        """As lists, ``[b][n]``, cut to their lengths, without a closing ``end`` if it is given."""
        result = []
        for rows, lengths in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True):
            cut = [row[:length] for row, length in zip(rows, lengths, strict=True)]
            result.append([row[:-1] if row and row[-1] == end else row for row in cut])
        return result


def alignment_of(stepper: Any, state: Any) -> Tensor:
    """The weights (R, S) of the last step; TypeError where the decoder has none."""
    if not hasattr(stepper, "alignment"):
        raise TypeError(f"{type(stepper).__name__} has no alignment(state): it cannot return alignments")
    weights: Tensor | None = stepper.alignment(state)
    if weights is None:
        raise TypeError(f"{type(stepper).__name__} does not attend to a source: it cannot return alignments")
    return weights


def forbid(*tokens: int) -> LogitsHook:
    """A logits hook: these tokens are never written.

    >>> forbid(0)(torch.zeros(1, 3), torch.zeros(1, 0, dtype=torch.int64))
    tensor([[-inf, 0., 0.]])
    """

    def hook(logits: Tensor, written: Tensor) -> Tensor:
        del written
        index = torch.tensor(tokens, device=logits.device)
        return logits.index_fill(1, index, float("-inf"))

    return hook
