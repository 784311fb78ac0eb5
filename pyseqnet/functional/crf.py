"""The linear-chain conditional random field: log-likelihood, partition function, marginals, best sequences.

Lafferty, McCallum, Pereira: Conditional random fields: probabilistic models for segmenting and labeling sequence data,
2001.
Rabiner: A tutorial on hidden Markov models and selected applications in speech recognition, 1989.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyseqnet.functional._common import accumulation_dtype, aliases, creates_graph, explain, same_device

_log_likelihood = torch.ops.pyseqnet.crf_log_likelihood.default
_gradient = torch.ops.pyseqnet.crf_gradient.default
_viterbi = torch.ops.pyseqnet.crf_viterbi.default


class _Crf(torch.autograd.Function):
    """Keeps the inputs alone: backward runs the forward recursion again."""

    @staticmethod
    def forward(
        ctx: Any,
        emissions: Tensor,
        start: Tensor,
        end: Tensor,
        transitions: Tensor,
        tags: Tensor | None,
        lengths: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(emissions, start, end, transitions, tags, lengths)
        return _log_likelihood(emissions, tags, lengths, start, end, transitions)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        emissions, start, end, transitions, tags, lengths = ctx.saved_tensors
        if creates_graph():
            inputs = aliases(emissions, start, end, transitions)
            result = _reference(inputs[0], inputs[1], inputs[2], inputs[3], tags, lengths)
            wanted = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
            found = list(torch.autograd.grad(result, wanted, grad, create_graph=True))
            return (*(found.pop(0) if need else None for need in ctx.needs_input_grad[:4]), None, None)
        found_all = _gradient(grad, emissions, tags, lengths, start, end, transitions)
        return (
            *(g if need else None for g, need in zip(found_all, ctx.needs_input_grad, strict=False)),
            None,
            None,
        )


def _reference(
    emissions: Tensor, start: Tensor, end: Tensor, transitions: Tensor, tags: Tensor | None, lengths: Tensor
) -> Tensor:
    """(B) in plain torch: a loop over steps."""
    dtype = accumulation_dtype(emissions.dtype)
    steps = emissions.shape[1]
    real = torch.arange(steps, device=emissions.device) < lengths[:, None]
    e = emissions.to(dtype).masked_fill(~real[:, :, None], 0)
    alpha = start + e[:, 0]
    for step in range(1, steps):
        arrived = (alpha[:, :, None] + transitions).logsumexp(1) + e[:, step]
        alpha = torch.where(real[:, step, None], arrived, alpha)
    result = -(alpha + end).logsumexp(1)
    return result if tags is None else result + score_of_tags(e, tags, lengths, start, end, transitions)


def score_of_tags(
    emissions: Tensor, tags: Tensor, lengths: Tensor, start: Tensor, end: Tensor, transitions: Tensor
) -> Tensor:
    """(B) scores of tag sequences, not normalised; tags of steps that are off are not looked at."""
    real = torch.arange(emissions.shape[1], device=emissions.device) < lengths[:, None]
    y = tags.masked_fill(~real, 0)
    score = emissions.gather(2, y[:, :, None]).squeeze(2).masked_fill(~real, 0).sum(1)
    score = score + transitions[y[:, :-1], y[:, 1:]].masked_fill(~real[:, 1:], 0).sum(1)
    last = y.gather(1, (lengths[:, None] - 1).clamp(min=0)).squeeze(1)
    return score + start[y[:, 0]] + end[last]


# ---------------------------------------------------------------- reading arguments


def check_shapes(
    emissions: Tensor, tags: Tensor | None, mask: Tensor | None, start: Tensor, end: Tensor, transitions: Tensor
) -> None:
    if emissions.dim() != 3:
        raise ValueError(f"emissions must have dimension of 3, got {emissions.dim()}")
    batch, steps, num_tags = emissions.shape
    wanted = {"start": (num_tags,), "end": (num_tags,), "transitions": (num_tags, num_tags)}
    for name, tensor in (("start", start), ("end", end), ("transitions", transitions)):
        if tuple(tensor.shape) != wanted[name]:
            raise ValueError(f"{name} must be {wanted[name]} for {num_tags} tags, got {tuple(tensor.shape)}")
    for name, other in (("tags", tags), ("mask", mask)):
        if other is not None and tuple(other.shape) != (batch, steps):
            raise ValueError(
                f"the first two dimensions of emissions and {name} must match, "
                f"got {(batch, steps)} and {tuple(other.shape)}"
            )
    if steps == 0:
        raise ValueError("emissions must have at least one step")


def read_tags(tags: Tensor) -> Tensor:
    if tags.is_floating_point() or tags.is_complex() or tags.dtype == torch.bool:
        raise TypeError(f"tags must be integers, got {tags.dtype}")
    return tags.to(torch.int64)


def lengths_of_mask(mask: Tensor | None, emissions: Tensor) -> Tensor:
    """(B) int64: steps that are on. mask (B, T) must be on from the first step and have no holes.

    On CUDA and meta it is not read back: a row that breaks the rule gets length 0, which has a NaN log-likelihood.
    """
    batch, steps, _ = emissions.shape
    if mask is None:
        return torch.full((batch,), steps, device=emissions.device, dtype=torch.int64)
    if mask.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"mask must be bool or uint8, got {mask.dtype}")
    if mask.device != emissions.device:
        raise ValueError(f"mask must be on the emissions' device, {emissions.device}, got {mask.device}")
    on = mask if mask.dtype == torch.bool else mask != 0
    lengths = on.sum(1)
    if emissions.is_cuda or emissions.is_meta or torch.compiler.is_compiling():
        return torch.where(on.cumprod(1).sum(1) == lengths, lengths, 0)
    if not bool(on[:, 0].all()):
        raise ValueError("mask of the first timestep must all be on")
    if bool((on[:, 1:] > on[:, :-1]).any()):
        raise ValueError("mask must be on without holes: steps may be off only at the end of a sequence")
    return lengths


def _potentials(
    emissions: Tensor, start: Tensor, end: Tensor, transitions: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The parameters in float32, or float64 beside float64 emissions."""
    dtype = accumulation_dtype(emissions.dtype)
    return emissions, start.to(dtype), end.to(dtype), transitions.to(dtype)


def _sum_over_sequences(
    emissions: Tensor,
    tags: Tensor | None,
    mask: Tensor | None,
    start: Tensor,
    end: Tensor,
    transitions: Tensor,
    reference: bool = False,
) -> Tensor:
    check_shapes(emissions, tags, mask, start, end, transitions)
    if tags is not None:
        tags = read_tags(tags)
    lengths = lengths_of_mask(mask, emissions)
    potentials = _potentials(emissions, start, end, transitions)
    if reference:
        return _reference(*potentials, tags, lengths)
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in potentials)
    if recorded or forward_ad._current_level >= 0:
        return _Crf.apply(*potentials, tags, lengths)
    emissions, start, end, transitions = potentials
    return _log_likelihood(emissions, tags, lengths, start, end, transitions)


def best_paths(
    emissions: Tensor, lengths: Tensor, start: Tensor, end: Tensor, transitions: Tensor, nbest: int = 1
) -> tuple[Tensor, Tensor]:
    """(B, nbest, T) int64, -1 where there is nothing, and (B, nbest) scores; not recorded."""
    with torch.no_grad():
        e, s, z, a = _potentials(emissions, start, end, transitions)
        paths, scores = _viterbi(e, lengths, s, z, a, nbest)
        return paths, scores


def expected_counts(
    emissions: Tensor, mask: Tensor | None, start: Tensor, end: Tensor, transitions: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Marginals (B, T, C), and how often tags come first (C), last (C), and after each other (C, C), in all sequences
    together, as the distribution expects; not recorded."""
    check_shapes(emissions, None, mask, start, end, transitions)
    with torch.no_grad():
        e, s, z, a = _potentials(emissions, start, end, transitions)
        found = _gradient(s.new_full((e.shape[0],), -1.0), e, None, lengths_of_mask(mask, emissions), s, z, a)
        return found[0], found[1], found[2], found[3]


def _explained(name: str, tensors: tuple[Any, ...], run: Any) -> Any:
    if torch.compiler.is_compiling():
        return run()
    try:
        return run()
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}") from None
        explain(error, name, tensors, lambda: None)


# ---------------------------------------------------------------- public functions


def crf_log_likelihood(
    emissions: Tensor, tags: Tensor, mask: Tensor | None, start: Tensor, end: Tensor, transitions: Tensor
) -> Tensor:
    """Log-probability of tag sequences under a linear-chain CRF.

    Equivalent to::

        # for each sequence b, of n steps
        score(y) = start[y[0]] + emissions[b, range(n), y].sum() + transitions[y[:-1], y[1:]].sum() + end[y[-1]]
        score(tags[b, :n]) - torch.stack([score(y) for y in all_tag_sequences]).logsumexp(0)

    Args:
        emissions: ``(B, T, C)`` scores of C tags at each step; float32, bfloat16, float16 or float64; CPU or CUDA.
        tags: ``(B, T)`` integers, 0 to C - 1; those of steps that are off may be anything.
        mask: ``(B, T)`` bool or uint8, on for steps that exist: from the first on, without holes. None: all.
        start, end: ``(C,)`` scores of the first and the last tag. -inf forbids.
        transitions: ``(C, C)`` score of tag i followed by tag j at ``[i, j]``. -inf forbids.

    Returns:
        ``(B)``, float32 (float64 for float64 emissions).

    Raises:
        ValueError for shapes that do not match, a mask that is off at the first step or has holes, tags out of range;
        TypeError for dtypes. On CUDA values are not read back: a sequence with such a mask or tag has a NaN
        log-likelihood and no gradient.

    Backward computes exact marginals. Deterministic. Differentiable twice in eager mode.

    Paper: Lafferty, McCallum, Pereira, Conditional random fields, 2001.
    """
    tensors = (emissions, start, end, transitions)
    return _explained(
        "crf_log_likelihood",
        tensors,
        lambda: _sum_over_sequences(emissions, tags, mask, *tensors[1:]),
    )


def crf_log_partition(
    emissions: Tensor, mask: Tensor | None, start: Tensor, end: Tensor, transitions: Tensor
) -> Tensor:
    """Log of the sum, over all tag sequences, of exp(score): the normaliser of `crf_log_likelihood`.

    Equivalent to::

        torch.stack([score(y) for y in all_tag_sequences]).logsumexp(0)

    Args and errors as `crf_log_likelihood`. Returns ``(B)``.
    """
    return _explained(
        "crf_log_partition",
        (emissions, start, end, transitions),
        lambda: -_sum_over_sequences(emissions, None, mask, start, end, transitions),
    )


def crf_marginals(emissions: Tensor, mask: Tensor | None, start: Tensor, end: Tensor, transitions: Tensor) -> Tensor:
    """Probability of each tag at each step, given the whole sequence.

    Equivalent to::

        torch.autograd.grad(crf_log_partition(emissions, mask, start, end, transitions).sum(), emissions)[0]

    Args and errors as `crf_log_likelihood`. Returns ``(B, T, C)`` in the dtype of the emissions; 0 where the mask is
    off. Differentiable in eager mode.

    Paper: Rabiner, A tutorial on hidden Markov models, 1989 (the variable gamma).
    """

    def run() -> Tensor:
        inputs = (emissions, start, end, transitions)
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            views = aliases(*inputs)
            view = views[0] if views[0].requires_grad else views[0].detach().requires_grad_()
            total = -_sum_over_sequences(view, None, mask, views[1], views[2], views[3], reference=True)
            return torch.autograd.grad(total.sum(), view, create_graph=True)[0]
        return expected_counts(emissions, mask, start, end, transitions)[0]

    return _explained("crf_marginals", (emissions, start, end, transitions), run)


def crf_decode(
    emissions: Tensor,
    mask: Tensor | None,
    start: Tensor,
    end: Tensor,
    transitions: Tensor,
    nbest: int = 1,
    *,
    return_scores: bool = False,
) -> Any:
    """The tag sequences of the highest scores (Viterbi).

    Equivalent to::

        [max(all_tag_sequences, key=score) for each sequence]

    Args:
        nbest: how many sequences to find. The others, and errors, as `crf_log_likelihood`.
        return_scores: also return the scores, as `crf_log_likelihood` defines them.

    Returns:
        A list with a list of tags for each sequence, as long as the sequence; with ``nbest > 1`` a list of up to
        ``nbest`` such lists, best first. Fewer, where fewer sequences are allowed. With ``return_scores`` a pair of it
        and ``(B)`` or ``(B, nbest)`` scores, -inf where there is no sequence.

    Of equal scores the sequence comes first whose last differing tag is lower.

    Paper: Viterbi, Error bounds for convolutional codes and an asymptotically optimum decoding algorithm, 1967.
    """

    def run() -> Any:
        if isinstance(nbest, bool) or not isinstance(nbest, int) or nbest < 1:
            raise ValueError(f"nbest must be a positive integer, got {nbest!r}")
        check_shapes(emissions, None, mask, start, end, transitions)
        lengths = lengths_of_mask(mask, emissions)
        paths, scores = best_paths(emissions, lengths, start, end, transitions, nbest)
        # One copy to the host, then plain lists, cut to the sequence's length; -1 stands where there is no path.
        rows = zip(paths.tolist(), lengths.tolist(), strict=True)
        found = [[path[:n] for path in row if path[0] >= 0] for row, n in rows]
        best = [row[0] if row else [] for row in found] if nbest == 1 else found
        if not return_scores:
            return best
        return best, scores.squeeze(1) if nbest == 1 else scores

    return _explained("crf_decode", (emissions, start, end, transitions), run)


def crf_log_likelihood_reference(
    emissions: Tensor, tags: Tensor, mask: Tensor | None, start: Tensor, end: Tensor, transitions: Tensor
) -> Tensor:
    """`crf_log_likelihood` in plain torch: a loop over steps, differentiable any number of times."""
    return _sum_over_sequences(emissions, tags, mask, start, end, transitions, reference=True)


def crf_log_partition_reference(
    emissions: Tensor, mask: Tensor | None, start: Tensor, end: Tensor, transitions: Tensor
) -> Tensor:
    """`crf_log_partition` in plain torch."""
    return -_sum_over_sequences(emissions, None, mask, start, end, transitions, reference=True)


def crf_marginals_reference(
    emissions: Tensor, mask: Tensor | None, start: Tensor, end: Tensor, transitions: Tensor
) -> Tensor:
    """`crf_marginals` in plain torch: the gradient of the log-partition."""
    with torch.enable_grad():
        view = emissions.detach().requires_grad_()
        total = crf_log_partition_reference(view, mask, start.detach(), end.detach(), transitions.detach())
        return torch.autograd.grad(total.sum(), view)[0]


def _best_of_one(
    emissions: Tensor, start: Tensor, end: Tensor, transitions: Tensor, nbest: int
) -> tuple[list[list[int]], Tensor]:
    """Of one sequence (T, C): up to `nbest` paths, best first, and their scores (nbest), -inf where there is none."""

    def best(candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Over the first dimension; of equal ones the first first."""
        values, order = candidates.sort(dim=0, descending=True, stable=True)
        return values[:nbest], order[:nbest]

    num_tags = emissions.shape[1]
    scores, history = (start + emissions[0])[None], []  # (up to nbest, C): of the best sequences that end in a tag
    for e in emissions[1:]:
        arrived = scores.t()[:, :, None] + transitions[:, None]  # (C, ranks, C)
        ranks = arrived.shape[1]
        values, origin = best(arrived.reshape(num_tags * ranks, num_tags))
        history.append((origin, ranks))
        scores = values + e
    ranks = scores.shape[0]
    values, order = best((scores + end).t().reshape(-1))
    paths = []
    for place in order[values > -math.inf].tolist():
        tag, rank = divmod(place, ranks)
        path = [tag]
        for origin, before in reversed(history):
            tag, rank = divmod(int(origin[rank, tag]), before)
            path.append(tag)
        paths.append(path[::-1])
    return paths, torch.nn.functional.pad(values, (0, nbest - values.shape[0]), value=-math.inf)


def crf_decode_reference(
    emissions: Tensor,
    mask: Tensor | None,
    start: Tensor,
    end: Tensor,
    transitions: Tensor,
    nbest: int = 1,
    *,
    return_scores: bool = False,
) -> Any:
    """`crf_decode` in plain torch: sequence by sequence, every candidate of a step sorted."""
    check_shapes(emissions, None, mask, start, end, transitions)
    with torch.no_grad():
        emissions, first, last, moves = _potentials(emissions, start, end, transitions)
        lengths = lengths_of_mask(mask, emissions).tolist()
        e = emissions.to(first.dtype)
        found = [_best_of_one(one[:n], first, last, moves, nbest) for one, n in zip(e, lengths, strict=True)]
        paths: Any = [paths for paths, _ in found]
        scores = torch.stack([s for _, s in found]) if found else first.new_zeros(0, nbest)
    if nbest == 1:
        paths, scores = [best[0] if best else [] for best in paths], scores.squeeze(1)
    return (paths, scores) if return_scores else paths


# ---------------------------------------------------------------- shapes for compilers


@torch.library.register_fake("pyseqnet::crf_log_likelihood")
def _crf_log_likelihood_fake(emissions: Tensor, tags: Tensor | None, *rest: Tensor) -> Tensor:
    same_device("crf_log_likelihood", emissions, tags, *rest)
    return emissions.new_empty(emissions.shape[0], dtype=accumulation_dtype(emissions.dtype))


@torch.library.register_fake("pyseqnet::crf_gradient")
def _crf_gradient_fake(grad: Tensor, emissions: Tensor, tags: Tensor | None, *rest: Tensor) -> tuple[Tensor, ...]:
    same_device("crf_gradient", grad, emissions, tags, *rest)
    _, start, end, transitions = rest
    return (
        emissions.new_empty(emissions.shape),
        start.new_empty(start.shape),
        end.new_empty(end.shape),
        transitions.new_empty(transitions.shape),
    )


@torch.library.register_fake("pyseqnet::crf_viterbi")
def _crf_viterbi_fake(emissions: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    same_device("crf_viterbi", emissions, *rest[:4])
    batch, steps, _ = emissions.shape
    nbest = rest[4]
    paths = emissions.new_empty((batch, nbest, steps), dtype=torch.int64)
    return paths, emissions.new_empty((batch, nbest), dtype=accumulation_dtype(emissions.dtype))
