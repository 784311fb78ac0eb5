"""`generate`: one entrance to greedy decoding, beam search and sampling, for any decoder that can take a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyseqnet.decoding.beam import beam_search
from pyseqnet.decoding.protocol import Generated, LogitsHook, Stepper
from pyseqnet.decoding.rules import Rules
from pyseqnet.decoding.sampling import Chooser, choose_tokens


@torch.no_grad()
def generate(
    stepper: Stepper,
    state: Any,
    *,
    begin: Tensor,
    end: int | None,
    max_length: int,
    min_length: int = 0,
    padding: int = 0,
    beams: int = 1,
    results: int = 1,
    length_penalty: float = 0.0,
    sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    logits_hooks: Sequence[LogitsHook] = (),
    return_alignments: bool = False,
) -> Generated:
    """Writes sequences token by token. One call of ``stepper.step`` a position, whatever the batch and the beams.

    By default greedily: the likeliest token at each position. ``beams > 1`` searches: the K best hypotheses go on.
    ``sample=True`` draws from the distribution. Sequences end each for itself, at END or at ``max_length``.

    Args:
        stepper: a decoder; see `Stepper` for the two methods and `TransformerStepper`, `RecurrentStepper` and the
            models in `pyseqnet.models` for such that have them.
        state: of B rows, before the first token; as the decoder's ``start`` makes it.
        begin: ``(B,)`` int64, the first token read, or ``(B, P)``, a prompt. It is not part of the result.
        end: the token that closes a sequence; None: all are ``max_length`` long.
        max_length, min_length: most tokens written, END counted; fewest before END.
        padding: what stands behind END.
        beams: K, live hypotheses a sequence. 1 is greedy decoding; with K at least V^T the search is exhaustive.
        results: N results for each sequence: the N best (at most K), or N independent samples.
        length_penalty: beams are ranked by ``log p / ((5 + n) / 6) ** length_penalty``; 0 is plain log p.
        sample: draw each token. ``temperature`` divides the log-probabilities (0: the likeliest), then ``top_k`` keeps
            the k likeliest, then ``top_p`` the smallest set whose mass reaches p. ``generator`` makes it repeatable.
        logits_hooks: each ``hook(logits (R, V), written (R, t)) -> logits``, before the softmax; see `forbid`.
        return_alignments: also what the decoder attended to.

    A search over beams is over when K hypotheses have ended or when no live one can still be among the N best. Those
    that have not ended at ``max_length`` compete with those that have.

    Raises:
        ValueError: options that do not go together, sizes that are not possible, NaN among the logits.

    >>> class Coin:  # 0 and 1 by turns, END (2) ever more likely
    ...     def step(self, tokens, state):
    ...         logits = torch.zeros(len(tokens), 3)
    ...         logits[:, 2] = state - 2
    ...         return logits.scatter_add(1, tokens[:, None] % 2, -torch.ones(len(tokens), 1)), state + 1
    ...     def reorder(self, state, index):
    ...         return state
    >>> generate(Coin(), 0, begin=torch.tensor([0, 1]), end=2, max_length=9).sequences()
    [[[1, 0, 1, 2]], [[0, 1, 0, 2]]]

    Papers: Sutskever, Vinyals, Le, 2014 (END, beams); Wu et al., 2016 (length penalty); Holtzman et al., 2019 (top-p).
    """
    if begin.dim() not in (1, 2) or begin.dtype != torch.int64 or (begin.dim() == 2 and begin.shape[1] == 0):
        raise ValueError(f"begin must be int64 (B,) or (B, P) with P > 0; got {begin.dtype} {tuple(begin.shape)}")
    for name, value in (("max_length", max_length), ("beams", beams), ("results", results)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if not 0 <= min_length <= max_length:
        raise ValueError(f"min_length must be between 0 and max_length, {max_length}; got {min_length}")
    if not length_penalty >= 0:
        raise ValueError(f"length_penalty must not be negative; got {length_penalty}")
    prompt = begin.unsqueeze(1) if begin.dim() == 1 else begin
    rules = Rules(prompt, end, padding, max_length, min_length, length_penalty, tuple(logits_hooks))
    if sample:
        if beams > 1:
            raise ValueError("sample=True draws each token; it does not go with beams")
        if not temperature >= 0:
            raise ValueError(f"temperature must not be negative; got {temperature}")
        choose = Chooser(temperature, top_k, top_p, generator)
        return choose_tokens(stepper, state, rules, choose, results, return_alignments)
    if top_k is not None or top_p is not None or temperature != 1.0:
        raise ValueError("temperature, top_k and top_p need sample=True")
    if results > beams:
        raise ValueError(f"results must be at most beams, {beams}; got {results}")
    if beams == 1:
        return choose_tokens(stepper, state, rules, Chooser(), 1, return_alignments)
    return beam_search(stepper, state, rules, beams, results, return_alignments)
