"""Connectionist temporal classification: ctc_loss.

Graves, Fernández, Gomez, Schmidhuber: Connectionist temporal classification: labelling unsegmented sequence data with
recurrent neural networks, 2006.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyseqnet.functional._common import accumulation_dtype, creates_graph, explain, needs_autograd, same_device

_ctc = torch.ops.pyseqnet.ctc_loss.default
_torch_ctc_loss: Any = torch.nn.functional.ctc_loss

Lengths = Tensor | Sequence[int] | int

_REDUCTIONS = ("none", "mean", "sum")
# Stands for log 0 in the reference: finite, so that its differences and gradients are, too.
_NEVER = -1e30


class _Problem(NamedTuple):
    """What the raw operation takes beside the input; integers are int64 on the input's device."""

    targets: Tensor
    offsets: Tensor
    input_lengths: Tensor
    target_lengths: Tensor
    longest: int
    blank: int
    from_logits: bool
    zero_infinity: bool


class _Ctc(torch.autograd.Function):
    """Forward makes the gradient as well: it costs one more pass over the input, and nothing else is kept."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, *problem: Any) -> Tensor:
        loss, gradient = _ctc(input, *problem, True)
        ctx.save_for_backward(input, gradient, *problem[:4])
        ctx.options = problem[4:]
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        input, gradient, *integers = ctx.saved_tensors
        if creates_graph():
            view = input.view_as(input)
            loss = _reference(view, _Problem(*integers, *ctx.options))
            (found,) = torch.autograd.grad(loss, view, grad_loss, create_graph=True)
            return found, *(None,) * 8
        return gradient * grad_loss.to(gradient.dtype)[:, None], *(None,) * 8


def _lengths(value: Lengths, name: str, batch: int, device: torch.device) -> Tensor:
    """(batch) int64 on the device."""
    if not isinstance(value, Tensor):
        value = torch.tensor(value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"ctc_loss: {name} must be integers, got {value.dtype}")
    value = value.to(device=device, dtype=torch.int64).reshape(-1)
    if value.shape[0] != batch:
        raise ValueError(f"ctc_loss: {name} must have one value a sequence, {batch}; got {value.shape[0]}")
    return value


def _read_problem(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Lengths,
    target_lengths: Lengths,
    blank: int,
    zero_infinity: bool,
    from_logits: bool,
) -> _Problem:
    """log_probs (T, B, C)."""
    batch, device = log_probs.shape[1], log_probs.device
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"ctc_loss: targets must be integers, got {targets.dtype}")
    counts = _lengths(target_lengths, "target_lengths", batch, device)
    labels = targets.to(device=device, dtype=torch.int64)
    if labels.dim() == 2:
        if labels.shape[0] != batch:
            raise ValueError(f"ctc_loss: targets must have {batch} rows, got {labels.shape[0]}")
        longest = labels.shape[1]
        offsets = torch.arange(batch, device=device) * longest
    elif labels.dim() == 1:
        longest = labels.shape[0]
        offsets = counts.cumsum(0) - counts
    else:
        raise ValueError(f"ctc_loss: targets must have 1 or 2 dimensions, got {labels.dim()}")
    steps = _lengths(input_lengths, "input_lengths", batch, device)
    return _Problem(labels.reshape(-1), offsets, steps, counts, longest, blank, from_logits, bool(zero_infinity))


def _reduce(loss: Tensor, target_lengths: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return (loss / target_lengths.clamp(min=1).to(loss.dtype)).mean()
    return loss.sum() if reduction == "sum" else loss


def _call(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Lengths,
    target_lengths: Lengths,
    blank: int,
    reduction: str,
    zero_infinity: bool,
    from_logits: bool,
    reference: bool,
) -> Tensor:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if torch._C._is_any_autocast_enabled() and log_probs.dtype in (torch.float16, torch.bfloat16):
        log_probs = log_probs.float()  # as torch: losses are computed in float32 under autocast
    batched = log_probs.dim() == 3
    if not batched:
        if log_probs.dim() != 2:
            raise ValueError(f"ctc_loss: log_probs must have 2 or 3 dimensions, got {log_probs.dim()}")
        log_probs = log_probs.unsqueeze(1)
        targets = targets.unsqueeze(0) if targets.dim() == 1 else targets
    problem = _read_problem(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity, from_logits)
    if reference:
        loss = _reference(log_probs, problem)
    elif needs_autograd(log_probs):
        loss = _Ctc.apply(log_probs, *problem)
    else:
        loss, _ = _ctc(log_probs, *problem, False)
    loss = _reduce(loss, problem.target_lengths, reduction)
    return loss if batched or reduction != "none" else loss.squeeze(0)


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Lengths,
    target_lengths: Lengths,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
    *,
    from_logits: bool = False,
) -> Tensor:
    """Minus the log-probability of label sequences, summed over all their alignments with the input's steps.

    Equivalent to::

        torch.nn.functional.ctc_loss(log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity)

    and with ``from_logits=True`` to the same of ``log_probs.log_softmax(-1)``.

    Args:
        log_probs: ``(T, B, C)`` or ``(T, C)``: log-probabilities of C classes, one of them blank, for each of T steps;
            float32, bfloat16, float16 or float64; CPU or CUDA.
        targets: labels, without blanks: ``(B, S)`` padded, or ``(sum of target_lengths)`` one after another. Any
            integer dtype.
        input_lengths: ``(B)``, a tensor or a sequence: steps of each sequence, 0 to T.
        target_lengths: ``(B)``: labels of each sequence.
        blank: the class that separates labels.
        reduction: ``"none"``; ``"sum"``; or ``"mean"``, of the losses each divided by its target's length (at least 1).
        zero_infinity: a loss is 0 where no alignment exists, rather than infinite.
        from_logits: ``log_probs`` are logits; the softmax is part of the kernel, forward and backward.

    Returns:
        A scalar, or ``(B)`` with ``"none"`` (a scalar for unbatched input). float32 for 16-bit inputs.

    Raises:
        What torch raises for the same arguments; ValueError for a label that is blank or not below C, and for lengths
        that do not fit. On CUDA lengths and labels are not read back: a sequence that they make impossible has a NaN
        loss and no gradient.

    The gradient is ``softmax - posterior``, torch's: for log-probabilities it takes for granted that a log_softmax
    made them. It is exactly 0 beyond a sequence's length and where no alignment exists. Deterministic. Differentiable
    twice in eager mode.

    Paper: Graves et al., Connectionist temporal classification, 2006.
    """

    def run() -> Tensor:
        return _call(
            log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity, from_logits, False
        )

    if torch.compiler.is_compiling():
        return run()
    try:
        return run()
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        arguments = (targets, input_lengths, target_lengths, blank, reduction, zero_infinity)

        def torch_call() -> None:
            half = isinstance(log_probs, Tensor) and log_probs.dtype in (torch.float16, torch.bfloat16)
            _torch_ctc_loss(log_probs.float() if half else log_probs, *arguments)

        explain(error, "ctc_loss", (log_probs,), torch_call)


def _reference(x: Tensor, p: _Problem) -> Tensor:
    """Losses (B) of x (T, B, C) in plain torch: the recursion over 2m + 1 states, all sequences at a time."""
    steps, batch = x.shape[:2]
    x = x.to(accumulation_dtype(x.dtype))
    real = (torch.arange(steps, device=x.device)[:, None] < p.input_lengths)[:, :, None]
    x = x.masked_fill(~real, 0)
    y = x.log_softmax(2) if p.from_logits else x
    longest = min(p.longest, steps)
    at = p.offsets[:, None] + torch.arange(longest, device=x.device)
    exists = torch.arange(longest, device=x.device) < p.target_lengths[:, None]
    labels = torch.where(exists, p.targets[at.clamp(max=max(p.targets.shape[0] - 1, 0))], p.blank) if longest else at
    # blank, label, blank, label, ..., blank
    states = torch.full((batch, 2 * longest + 1), p.blank, device=x.device)
    states[:, 1::2] = labels
    skips = torch.zeros_like(states, dtype=torch.bool)
    skips[:, 3::2] = labels[:, 1:] != labels[:, :-1]
    emission = y.clamp(min=_NEVER).gather(2, states.expand(steps, batch, -1)) if steps else y
    first = torch.arange(2 * longest + 1, device=x.device) < 2
    never = torch.full((batch, 2), _NEVER, dtype=x.dtype, device=x.device)
    # The state before the first step: what stands at the first two states after it.
    alpha = torch.zeros_like(states, dtype=x.dtype).masked_fill(~first, _NEVER)
    for step in range(steps):
        if step == 0:
            arrived = alpha
        else:
            padded = torch.cat([never, alpha], 1)
            terms = torch.stack([alpha, padded[:, 1:-1], padded[:, :-2].masked_fill(~skips, _NEVER)])
            arrived = terms.logsumexp(0)
        alpha = torch.where(real[step], arrived + emission[step], alpha)
    ends = torch.stack([2 * p.target_lengths, (2 * p.target_lengths - 1).clamp(min=0)], 1).clamp(max=2 * longest)
    last = alpha.gather(1, ends)
    last = last.masked_fill(torch.stack([torch.zeros_like(p.target_lengths), 1 - p.target_lengths], 1) > 0, _NEVER)
    loss = -last.logsumexp(1)
    # Without steps the empty labelling alone is certain.
    nothing = p.input_lengths == 0
    loss = torch.where(nothing, torch.zeros_like(loss), loss)
    impossible = (loss > -_NEVER / 2) | (p.target_lengths > p.input_lengths)
    loss = loss.masked_fill(impossible, 0.0 if p.zero_infinity else float("inf"))
    if not p.from_logits:
        # torch's gradient takes for granted that x is a log_softmax: exp(x) is added to it, and nothing to the value.
        total = (x.exp() * (real & ~impossible[:, None])).sum((0, 2))
        loss = loss + (total - total.detach())
    return loss


def ctc_loss_reference(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Lengths,
    target_lengths: Lengths,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
    *,
    from_logits: bool = False,
) -> Tensor:
    """`ctc_loss` in plain torch: its definition, a loop over steps; differentiable any number of times."""
    return _call(log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity, from_logits, True)


@torch.library.register_fake("pyseqnet::ctc_loss")
def _ctc_fake(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    same_device("ctc_loss", input, *rest[:4])
    dtype = accumulation_dtype(input.dtype)
    with_gradient = rest[-1]
    gradient = input.new_empty(input.shape) if with_gradient else input.new_empty(0)
    return input.new_empty(input.shape[1], dtype=dtype), gradient
