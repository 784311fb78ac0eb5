"""One token a row: the likeliest, or drawn; and the loop that writes a sequence of them.

Fan, Lewis, Dauphin: Hierarchical neural story generation, 2018 (top-k).
Holtzman, Buys, Du, Forbes, Choi: The curious case of neural text degeneration, 2019 (top-p, the nucleus).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyseqnet.decoding.protocol import Generated, Stepper, alignment_of
from pyseqnet.decoding.rules import Rules


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all but the `k` largest of each row; of equal ones at the border all stay.

    >>> keep_top_k(torch.tensor([[1.0, 3.0, 2.0]]), 2)
    tensor([[-inf, 3., 2.]])
    """
    if k < 1:
        raise ValueError(f"top_k must be at least 1, got {k}")
    if k >= logits.shape[-1]:
        return logits
    border = logits.topk(k, -1).values[..., -1:]
    return logits.masked_fill(logits < border, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf for all but the nucleus: the smallest set of likeliest tokens whose mass is at least `p`.

    The token that crosses p belongs to it, so that it is never empty; ``p=1`` keeps everything.

    >>> keep_top_p(torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.6).exp()
    tensor([[0.5000, 0.3000, 0.0000]])
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {p}")
    if p == 1:
        return logits
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    mass = ranked.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    before = mass.cumsum(-1) - mass
    outside = (before >= p).scatter(-1, order, before >= p)
    return logits.masked_fill(outside, float("-inf"))


@dataclass(frozen=True)
class Chooser:
    """How the next token is chosen from log-probabilities; temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def __call__(self, log_probs: Tensor) -> Tensor:
        """(R, V) -> (R,)"""
        if self.temperature == 0:
            return log_probs.argmax(-1)
        scaled = log_probs / self.temperature
        if self.top_k is not None:
            scaled = keep_top_k(scaled, self.top_k)
        if self.top_p is not None:
            scaled = keep_top_p(scaled, self.top_p)
        return torch.multinomial(scaled.softmax(-1), 1, generator=self.generator).squeeze(1)


def choose_tokens(
    stepper: Stepper, state: Any, rules: Rules, choose: Chooser, results: int, return_alignments: bool
) -> Generated:
    """Writes one sequence a row, `results` rows for each sequence of the batch."""
    rows = rules.batch * results
    if results > 1:
        state = stepper.reorder(state, torch.arange(rules.batch, device=rules.device).repeat_interleave(results))
    prompt = rules.prompt.repeat_interleave(results, 0)
    logits, state = rules.read_prompt(stepper, prompt, state)
    open_rows = torch.ones(rows, dtype=torch.bool, device=rules.device)
    lengths = torch.zeros(rows, dtype=torch.int64, device=rules.device)
    total = torch.zeros(rows, dtype=rules.score_dtype(logits), device=rules.device)
    written = prompt.new_full((rows, rules.max_length), rules.padding)
    alignments = []
    steps = 0
    for position in range(rules.max_length):
        if position:
            logits, state = stepper.step(written[:, position - 1], state)
        log_probs = rules.log_probs(logits, written[:, :position], position)
        token = choose(log_probs)
        gained = log_probs.gather(1, token.unsqueeze(1)).squeeze(1)
        rules.refuse_nan(gained.masked_fill(~open_rows, 0.0))
        written[:, position] = torch.where(open_rows, token, rules.padding)
        total = total + gained.masked_fill(~open_rows, 0.0)
        lengths = lengths + open_rows
        if return_alignments:
            alignments.append(alignment_of(stepper, state) * open_rows.unsqueeze(1))
        open_rows = open_rows & (token != rules.end)
        steps = position + 1
        if not bool(open_rows.any()):
            break
    shape = (rules.batch, results)
    seen = torch.stack(alignments, 1) if alignments else None
    return Generated(
        written[:, :steps].view(*shape, steps),
        lengths.view(shape),
        total.view(shape),
        (total / rules.penalty(lengths)).view(shape),
        None if seen is None else seen.view(*shape, *seen.shape[1:]),
    )
