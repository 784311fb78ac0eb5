"""CTC and the linear-chain CRF."""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as torch_F
from torch import Tensor

import pyseqnet.functional as F
from bench.case import Case, Cost, Inputs, Tolerance


def ctc(
    name: str, steps: int, batch: int, classes: int, longest: int, *, from_logits: bool = True, peaked: float = 1.0
) -> Case:
    """Training on logits: log-softmax and loss. Targets of one length, as torch's fastest path wants them."""
    targets = torch.randint(1, classes, (batch, longest), generator=torch.Generator().manual_seed(1))
    input_lengths = torch.full((batch,), steps)
    target_lengths = torch.full((batch,), longest)

    def make(generator: torch.Generator) -> Inputs:
        return {"logits": peaked * torch.randn((steps, batch, classes), generator=generator)}

    @functools.cache
    def on(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        return targets.to(device), input_lengths.to(device), target_lengths.to(device)

    def ours(logits: Tensor) -> Tensor:
        if from_logits:
            return F.ctc_loss(logits, *on(logits.device), from_logits=True)
        return F.ctc_loss(logits.log_softmax(2), *on(logits.device))

    def theirs(logits: Tensor) -> Tensor:
        return torch_F.ctc_loss(logits.log_softmax(2), *on(logits.device))

    elements, states = steps * batch * classes, steps * batch * (2 * longest + 1)
    # An addition to a log-sum is about 20 operations, an exponential of the softmax 10.
    one_way = 10.0 * elements + 45.0 * states
    return Case(
        family="chain",
        name=name,
        shapes=f"T{steps} B{batch} C{classes} S{longest}" + ("" if from_logits else ", log-softmax by torch"),
        make=make,
        ours=ours,
        torch=theirs,
        forward=Cost(one_way, elements),
        backward=Cost(one_way, 2 * elements),
        gradients=("logits",),
        # torch's own alpha loses digits as T grows; ours is measured against float64 by the usual bound.
        tolerance=lambda dtype: Tolerance(),
    )


def _loop_over_steps(
    emissions: Tensor, start: Tensor, end: Tensor, transitions: Tensor, tags: Tensor, mask: Tensor
) -> Tensor:
    """What CRF layers in plain torch do, pytorch-crf among them: loops over steps, autograd through them."""
    emissions, tags, mask = emissions.transpose(0, 1), tags.transpose(0, 1), mask.transpose(0, 1)
    rows = torch.arange(emissions.shape[1], device=emissions.device)
    real = mask.to(emissions.dtype)
    score = start[tags[0]] + emissions[0, rows, tags[0]]
    alpha = start + emissions[0]
    for step in range(1, emissions.shape[0]):
        score = score + transitions[tags[step - 1], tags[step]] * real[step]
        score = score + emissions[step, rows, tags[step]] * real[step]
        arrived = torch.logsumexp(alpha.unsqueeze(2) + transitions + emissions[step].unsqueeze(1), dim=1)
        alpha = torch.where(mask[step].unsqueeze(1), arrived, alpha)
    score = score + end[tags[mask.long().sum(0) - 1, rows]]
    return (score - torch.logsumexp(alpha + end, dim=1)).sum()


def crf(name: str, batch: int, steps: int, tags: int, *, ragged: bool = False) -> Case:
    generator = torch.Generator().manual_seed(1)
    gold = torch.randint(0, tags, (batch, steps), generator=generator)
    lengths = torch.randint(steps // 4, steps + 1, (batch,), generator=generator) if ragged else None
    mask = torch.arange(steps) < (lengths[:, None] if lengths is not None else steps)
    mask = mask.expand(batch, steps).contiguous()

    def make(generator: torch.Generator) -> Inputs:
        return {
            "emissions": torch.randn((batch, steps, tags), generator=generator),
            "start": torch.randn(tags, generator=generator),
            "end": torch.randn(tags, generator=generator),
            "transitions": torch.randn((tags, tags), generator=generator),
        }

    @functools.cache
    def on(device: torch.device) -> tuple[Tensor, Tensor]:
        return gold.to(device), mask.to(device)

    def ours(emissions: Tensor, start: Tensor, end: Tensor, transitions: Tensor) -> Tensor:
        y, m = on(emissions.device)
        return F.crf_log_likelihood(emissions, y, m, start, end, transitions).sum()

    def theirs(emissions: Tensor, start: Tensor, end: Tensor, transitions: Tensor) -> Tensor:
        return _loop_over_steps(emissions, start, end, transitions, *on(emissions.device))

    products, elements = 2.0 * int(mask.sum()) * tags * tags, batch * steps * tags
    return Case(
        family="chain",
        name=name,
        shapes=f"B{batch} T{steps} C{tags}" + (", lengths T/4 to T" if ragged else ""),
        make=make,
        ours=ours,
        torch=theirs,
        forward=Cost(products, elements),
        backward=Cost(3 * products, 2 * elements),
        gradients=("emissions", "start", "end", "transitions"),
        tolerance=lambda dtype: Tolerance(),
    )


def _viterbi_over_steps(emissions: Tensor, start: Tensor, end: Tensor, transitions: Tensor, mask: Tensor) -> Tensor:
    """What pytorch-crf does: a loop over steps, then over tags in Python. Returns scores."""
    e, on = emissions.transpose(0, 1), mask.transpose(0, 1)
    score, history = start + e[0], []
    for step in range(1, e.shape[0]):
        best, origin = (score.unsqueeze(2) + transitions + e[step].unsqueeze(1)).max(dim=1)
        score = torch.where(on[step].unsqueeze(1), best, score)
        history.append(origin)
    score = score + end
    ends = on.long().sum(0) - 1
    paths = []
    for b in range(e.shape[1]):
        path = [score[b].argmax().item()]
        for origin in reversed(history[: ends[b]]):
            path.append(origin[b][path[-1]].item())
        paths.append(path[::-1])
    assert len(paths) == e.shape[1]
    return score.amax(1)


def decode(name: str, batch: int, steps: int, tags: int) -> Case:
    """The best sequences, as lists; what is compared is their scores."""
    mask = torch.ones(batch, steps, dtype=torch.bool)
    base = crf(name, batch, steps, tags)

    def ours(emissions: Tensor, start: Tensor, end: Tensor, transitions: Tensor) -> Tensor:
        on = mask.to(emissions.device)
        return F.crf_decode(emissions, on, start, end, transitions, return_scores=True)[1]

    def theirs(emissions: Tensor, start: Tensor, end: Tensor, transitions: Tensor) -> Tensor:
        return _viterbi_over_steps(emissions, start, end, transitions, mask.to(emissions.device))

    return dataclasses.replace(
        base, ours=ours, torch=theirs, forward=Cost(2.0 * batch * steps * tags * tags, batch * steps * tags),
        backward=Cost(), gradients=(),
    )  # fmt: skip


CASES = [
    ctc("ctc_200", 200, 16, 30, 40),
    ctc("ctc_200_log_probs", 200, 16, 30, 40, from_logits=False),
    ctc("ctc_200_peaked", 200, 16, 30, 40, peaked=8.0),
    ctc("ctc_1000_words", 1000, 4, 1000, 100),
    ctc("ctc_short", 50, 64, 30, 8),
    crf("crf_20", 32, 50, 20),
    crf("crf_20_ragged", 32, 50, 20, ragged=True),
    crf("crf_120", 16, 100, 120),
    crf("crf_9", 16, 100, 9),
    decode("crf_decode_20", 32, 50, 20),
    decode("crf_decode_120", 16, 100, 120),
]
