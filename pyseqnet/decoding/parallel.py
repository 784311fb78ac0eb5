"""Non-autoregressive decoding: all positions at once, then the length: predicted, or where END was written.

Gu, Bradbury, Xiong, Li, Socher: Non-autoregressive neural machine translation, 2018; Lee, Mansimov, Cho: Deterministic
non-autoregressive neural sequence modeling by iterative refinement, 2018 (a length predictor).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet.decoding.protocol import Generated


def truncate_at_end(tokens: Tensor, end: int, padding: int = 0) -> tuple[Tensor, Tensor]:
    """What stands before the first END of each row, END included, and how long it is.

    ``(..., T)`` int64 gives the same shape with `padding` behind END, and lengths ``(...)``; T where there is no END.

    >>> truncate_at_end(torch.tensor([[5, 6, 2, 7, 2], [5, 6, 7, 8, 9]]), end=2)
    (tensor([[5, 6, 2, 0, 0],
            [5, 6, 7, 8, 9]]), tensor([3, 5]))
    """
    before = (tokens == end).cumsum(-1) - (tokens == end).long()
    kept = before == 0
    return tokens.masked_fill(~kept, padding), kept.sum(-1)


def decode_parallel(
    logits: Tensor, *, lengths: Tensor | None = None, end: int | None = None, padding: int = 0
) -> Generated:
    """The likeliest token at every position in one pass, one result a row: greedy over independent positions.

    Args:
        logits: ``(B, T, V)``, as a decoder without causal mask gives them.
        lengths: ``(B,)``, 0 to T: known or predicted lengths; what lies beyond is padding.
        end: where a row writes it, the rest is ignored. Exactly one of `lengths` and `end` is given.

    ``log_probs`` sums over the positions that were kept.
    """
    if logits.dim() != 3:
        raise ValueError(f"logits must be (B, T, V); got {tuple(logits.shape)}")
    if (lengths is None) == (end is None):
        raise ValueError("one of lengths and end must be given")
    batch, steps, _ = logits.shape
    best = logits.log_softmax(2, dtype=torch.promote_types(logits.dtype, torch.float32)).max(2)
    if bool(best.values.isnan().any()):
        raise ValueError("logits hold NaN")
    tokens = best.indices
    if end is not None:
        tokens, counts = truncate_at_end(tokens, end, padding)
    else:
        assert lengths is not None
        if lengths.shape != (batch,) or bool(((lengths < 0) | (lengths > steps)).any()):
            raise ValueError(f"lengths must be {batch} numbers from 0 to {steps}; got {lengths.tolist()}")
        counts = lengths.to(tokens.device)
    kept = torch.arange(steps, device=tokens.device) < counts.unsqueeze(1)
    total = best.values.masked_fill(~kept, 0.0).sum(1, keepdim=True)
    return Generated(tokens.masked_fill(~kept, padding).unsqueeze(1), counts.unsqueeze(1), total, total)


class LengthPredictor(torch.nn.Module):
    """How long the output is, told from the encoder's states: mean over the source, one linear layer, classes 0 to N.

    Shapes: memory ``(B, S, E)``, ignored ``(B, S)`` (True = padding) or None; scores ``(B, max_length + 1)``, for
    `torch.nn.functional.cross_entropy` with the lengths.

    >>> LengthPredictor(8, max_length=20)(torch.zeros(3, 5, 8)).shape
    torch.Size([3, 21])

    Paper: Lee, Mansimov, Cho, 2018, section 4.2.
    """

    def __init__(self, features: int, max_length: int) -> None:
        super().__init__()
        self.head = torch.nn.Linear(features, max_length + 1)

    def forward(self, memory: Tensor, ignored: Tensor | None = None) -> Tensor:
        if ignored is None:
            pooled = memory.mean(1)
        else:
            kept = memory.masked_fill(ignored.unsqueeze(2), 0.0)
            pooled = kept.sum(1) / (~ignored).sum(1, keepdim=True).clamp(min=1)
        scores: Tensor = self.head(pooled)
        return scores
