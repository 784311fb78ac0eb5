"""Training on the measure itself, by policy gradients: of BLEU, of F1, of anything a finished sequence can be given.

Williams: Simple statistical gradient-following algorithms for connectionist reinforcement learning, 1992.
Ranzato, Chopra, Auli, Zaremba: Sequence level training with recurrent neural networks, 2016.
Rennie, Marcheret, Mroueh, Ross, Goel: Self-critical sequence training for image captioning, 2017.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyseqnet.decoding import Generated


def sequence_log_probs(logits: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """log p of each sequence, (B,), with gradients: logits (B, T, V), tokens (B, T), of which `lengths` (B,) count."""
    if logits.shape[:2] != tokens.shape or lengths.shape != tokens.shape[:1]:
        raise ValueError(
            "logits, tokens and lengths must be (B, T, V), (B, T) and (B,); "
            f"got {tuple(logits.shape)}, {tuple(tokens.shape)} and {tuple(lengths.shape)}"
        )
    log_probs = logits.log_softmax(2).gather(2, tokens.unsqueeze(2)).squeeze(2)
    padding = torch.arange(tokens.shape[1], device=tokens.device) >= lengths.unsqueeze(1)
    return log_probs.masked_fill(padding, 0.0).sum(1)


def reinforce_loss(log_probs: Tensor, rewards: Tensor, baseline: Tensor | float = 0.0) -> Tensor:
    """A loss whose gradient is that of the negative expected reward: ``-mean((R - b) * log p)``.

    Args:
        log_probs: (B,), of sequences that were drawn from the model (temperature 1, nothing cut off).
        rewards: (B,); no gradient is taken through them.
        baseline: what is expected, (B,) or a number that does not depend on what was drawn: it leaves the mean of the
            gradient as it is and lessens its variance.

    The value of this loss means nothing: watch the reward.
    """
    if log_probs.shape != rewards.shape:
        raise ValueError(f"rewards must be {tuple(log_probs.shape)} as log_probs; got {tuple(rewards.shape)}")
    advantage = (rewards - baseline).detach().to(log_probs)
    return -(advantage * log_probs).mean()


def self_critical_loss(
    log_probs: Callable[[Tensor, Tensor], Tensor],
    sampled: Generated,
    greedy: Generated,
    reward: Callable[[Generated], Tensor],
) -> tuple[Tensor, Tensor]:
    """`reinforce_loss` with the reward of the model's own greedy output as baseline.

    Args:
        log_probs: ``(tokens (B, T), lengths (B,)) -> (B,)``, with gradients: the model by teacher forcing, and
            `sequence_log_probs`.
        sampled: one sample a sequence (``generate(..., sample=True)``); greedy: what greedy decoding gives.
        reward: of the first result of each sequence, (B,).

    Returns:
        The loss, and the samples' mean reward.
    """
    if sampled.tokens.shape[1] != 1 or greedy.tokens.shape[1] != 1:
        raise ValueError("sampled and greedy must have one result a sequence")
    rewards, baseline = reward(sampled), reward(greedy)
    found = log_probs(sampled.tokens[:, 0], sampled.lengths[:, 0])
    return reinforce_loss(found, rewards.to(found.device), baseline.to(found.device)), rewards.mean()
