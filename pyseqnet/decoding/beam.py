"""Beam search, for all sequences of a batch at once.

Graves: Sequence transduction with recurrent neural networks, 2012.
Sutskever, Vinyals, Le: Sequence to sequence learning with neural networks, 2014.
Wu et al.: Google's neural machine translation system, 2016 (length penalty).

Live hypotheses are nodes of a tree: each step stores the token of its K nodes and which node of the step before is the
parent, ``(B, K)`` each. A hypothesis that ends is a row of a bank: its score and the node that it ended behind. At the
end the bank's paths are followed backwards. So a step costs the same at every position, and nothing is done row by row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyseqnet.decoding.protocol import Generated, Stepper, alignment_of
from pyseqnet.decoding.rules import Rules

_NEVER = float("-inf")


@dataclass
class _Tree:
    """Nodes of all steps so far."""

    tokens: list[Tensor] = field(default_factory=list)  # each (B, K)
    parents: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)  # (B, K, S) of the parents' rows, if alignments are wanted

    def paths(self, step: Tensor, node: Tensor, ends: Tensor, rules: Rules) -> tuple[Tensor, Tensor | None]:
        """The tokens (B, N, T), and alignments, that lead to `node` (B, N) of `step` (-1: the root), END behind it."""
        lengths = step + 1 + ends
        total = max(int(lengths.max()), 1) if lengths.numel() else 1
        written = node.new_full((*node.shape, total), rules.padding)
        size = self.weights[0].shape[-1] if self.weights else 0
        seen = self.weights[0].new_zeros((*node.shape, total, size)) if self.weights else None
        for position in range(total - 1, -1, -1):
            closing = ends & (position == step + 1)
            inside = position <= step
            token = torch.where(closing, -1 if rules.end is None else rules.end, rules.padding)
            if position < len(self.tokens):
                token = torch.where(inside, self.tokens[position].gather(1, node), token)
                parent = self.parents[position].gather(1, node)
                node = torch.where(inside, parent, node)
            written[..., position] = token
            if seen is not None and position < len(self.weights):
                row = self.weights[position].gather(1, node.unsqueeze(2).expand(-1, -1, size))
                seen[:, :, position] = row * (inside | closing).unsqueeze(2)
        return written, seen


@dataclass
class _Bank:
    """The best hypotheses that have ended, K places a sequence, best first; -inf marks a free one."""

    scores: Tensor
    log_probs: Tensor
    step: Tensor
    node: Tensor
    ends: Tensor

    @staticmethod
    def empty(batch: int, places: int, like: Tensor) -> _Bank:
        scores = like.new_full((batch, places), _NEVER)
        nowhere = torch.zeros(batch, places, dtype=torch.int64, device=like.device)
        return _Bank(scores, scores, nowhere - 1, nowhere, torch.zeros_like(nowhere, dtype=torch.bool))

    def add(self, scores: Tensor, log_probs: Tensor, step: int, node: Tensor, ends: bool) -> _Bank:
        """With more candidates (B, K); those of score -inf are none."""
        joined = torch.cat([self.scores, scores], 1)
        best = joined.topk(self.scores.shape[1], 1)

        def pick(old: Tensor, new: Tensor) -> Tensor:
            return torch.cat([old, new], 1).gather(1, best.indices)

        return _Bank(
            best.values,
            pick(self.log_probs, log_probs),
            pick(self.step, torch.full_like(node, step)),
            pick(self.node, node),
            pick(self.ends, torch.full_like(node, ends, dtype=torch.bool)),
        )

    def result(self, count: int, tree: _Tree, rules: Rules) -> Generated:
        exists = self.scores[:, :count] > _NEVER
        step = torch.where(exists, self.step[:, :count], -1)
        ends = self.ends[:, :count] & exists
        tokens, seen = tree.paths(step, self.node[:, :count], ends, rules)
        return Generated(tokens, step + 1 + ends, self.log_probs[:, :count], self.scores[:, :count], seen)


def beam_search(
    stepper: Stepper, state: Any, rules: Rules, beams: int, results: int, return_alignments: bool
) -> Generated:
    """The `results` best of what `beams` live hypotheses a sequence find; see `generate`."""
    batch, device = rules.batch, rules.device
    first_row = torch.arange(batch, device=device).unsqueeze(1) * beams
    logits, state = rules.read_prompt(stepper, rules.prompt, state)
    size = logits.shape[1]
    live = logits.new_full((batch, beams), _NEVER, dtype=rules.score_dtype(logits))
    live[:, :1] = 0.0  # all beams start as the same hypothesis: it counts once
    state = stepper.reorder(state, torch.arange(batch, device=device).repeat_interleave(beams))
    logits = logits.repeat_interleave(beams, 0)
    bank, tree = _Bank.empty(batch, beams, live), _Tree()
    ended = torch.zeros(batch, dtype=torch.int64, device=device)
    longest = torch.tensor(rules.max_length, device=device)
    written = rules.prompt.new_zeros((batch * beams, 0))
    closed = torch.zeros(batch, dtype=torch.bool, device=device)

    for position in range(rules.max_length):
        if position:
            logits, state = stepper.step(tree.tokens[-1].flatten(), state)
        if return_alignments:
            tree.weights.append(alignment_of(stepper, state).view(batch, beams, -1))
        log_probs = rules.log_probs(logits, written, position).view(batch, beams, size)
        # K live hypotheses may all have END among their K best: 2 K candidates hold K that go on.
        found = (live.unsqueeze(2) + log_probs).flatten(1).topk(min(2 * beams, beams * size), 1)
        rules.refuse_nan(found.values)
        token, parent = found.indices % size, found.indices // size
        is_end = torch.zeros_like(token, dtype=torch.bool) if rules.end is None else token == rules.end

        # Those that end, among the K best; a sequence that is done takes no more.
        worth = found.values / rules.penalty(torch.tensor(position + 1, device=device))
        closing = (is_end & ~closed.unsqueeze(1) & (found.values > _NEVER))[:, :beams]
        bank = bank.add(worth[:, :beams].masked_fill(~closing, _NEVER), found.values[:, :beams],
                        position - 1, parent[:, :beams], True)  # fmt: skip
        ended = ended + closing.sum(1)

        # Those that go on: the K best of the others.
        going = found.values.masked_fill(is_end, _NEVER)
        kept = going.topk(min(beams, going.shape[1]), 1)
        live = _padded(kept.values, beams, _NEVER)
        tree.tokens.append(_padded(token.gather(1, kept.indices), beams, rules.padding))
        tree.parents.append(_padded(parent.gather(1, kept.indices), beams, 0))
        hopeless = live.amax(1) / rules.penalty(longest) <= bank.scores[:, results - 1]
        closed = closed | (ended >= beams) | hopeless
        if bool(closed.all()):
            break
        rows = (first_row + tree.parents[-1]).flatten()
        state = stepper.reorder(state, rows)
        if rules.hooks:
            written = torch.cat([written.index_select(0, rows), tree.tokens[-1].view(-1, 1)], 1)

    # What has not ended when the room is used up counts as it stands.
    worth = (live / rules.penalty(longest)).masked_fill(closed.unsqueeze(1), _NEVER)
    nodes = torch.arange(beams, device=device).expand(batch, beams)
    bank = bank.add(worth, live, len(tree.tokens) - 1, nodes, False)
    return bank.result(results, tree, rules)


def _padded(values: Tensor, count: int, filler: float) -> Tensor:
    """(B, <= count) -> (B, count): a vocabulary smaller than the beam fills it only after some steps."""
    missing = count - values.shape[1]
    return torch.nn.functional.pad(values, (0, missing), value=filler) if missing else values
