"""Losses of structured prediction on linear chains that need the best sequence alone: perceptron and support vectors.

Collins: Discriminative training methods for hidden Markov models: theory and experiments with perceptron algorithms,
2002.
Taskar, Guestrin, Koller: Max-margin Markov networks, 2003.
Tsochantaridis, Hofmann, Joachims, Altun: Support vector machine learning for interdependent and structured output
spaces, 2004.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet.functional._common import accumulation_dtype
from pyseqnet.functional.crf import best_paths, check_shapes, lengths_of_mask, read_tags, score_of_tags


def structured_perceptron_loss(
    emissions: Tensor, tags: Tensor, mask: Tensor | None, start: Tensor, end: Tensor, transitions: Tensor
) -> Tensor:
    """By how much the best sequence's score exceeds that of the tags: 0 where the tags are best.

    Equivalent to::

        torch.stack([score(y) for y in all_tag_sequences]).amax(0) - score(tags)

    A step of gradient descent is the perceptron's: towards the features of the tags, away from those of the best.
    Args and errors as `pyseqnet.functional.crf_log_likelihood`. Returns ``(B)``.

    Paper: Collins, Discriminative training methods for hidden Markov models, 2002.
    """
    return structured_hinge_loss(emissions, tags, mask, start, end, transitions, cost=0.0)


def structured_hinge_loss(
    emissions: Tensor,
    tags: Tensor,
    mask: Tensor | None,
    start: Tensor,
    end: Tensor,
    transitions: Tensor,
    *,
    cost: float = 1.0,
) -> Tensor:
    """The structured support vector machine's loss, with a margin of `cost` for each wrong tag.

    Equivalent to::

        wrong = lambda y: (y != tags).sum()
        torch.stack([score(y) + cost * wrong(y) for y in all_tag_sequences]).amax(0) - score(tags)

    The maximum is found by a Viterbi search with the cost added to emissions (loss-augmented decoding). The loss is
    never less than `cost` times the number of tags that `crf_decode` gets wrong.
    Args and errors as `pyseqnet.functional.crf_log_likelihood`. Returns ``(B)``; infinite where the tags are forbidden.

    Papers: Taskar et al., Max-margin Markov networks, 2003; Tsochantaridis et al., 2004.
    """
    if cost < 0:
        raise ValueError(f"cost must not be negative, got {cost}")
    check_shapes(emissions, tags, mask, start, end, transitions)
    tags = read_tags(tags)
    lengths = lengths_of_mask(mask, emissions)
    steps, num_tags = emissions.shape[1:]
    dtype = accumulation_dtype(emissions.dtype)
    e, start, end, transitions = (x.to(dtype) for x in (emissions, start, end, transitions))
    real = torch.arange(steps, device=e.device) < lengths[:, None]
    valid = (tags >= 0) & (tags < num_tags)
    if not e.is_cuda and not e.is_meta and not bool((valid | ~real).all()):
        raise ValueError("tags must lie between 0 and C - 1")
    gold = torch.where(real & valid, tags, 0)
    with torch.no_grad():
        margin = cost * (torch.arange(num_tags, device=e.device) != gold[:, :, None])
        found, _ = best_paths(e + margin, lengths, start, end, transitions)
    exists = found[:, 0, :1] >= 0
    best = found[:, 0].clamp(min=0)
    wrong = (best != gold) & real
    scores = [score_of_tags(e, y, lengths, start, end, transitions) for y in (best, gold)]
    usable = exists.squeeze(1) & (valid | ~real).all(1)
    return (scores[0] - scores[1] + cost * wrong.sum(1)).masked_fill(~usable, torch.nan)
