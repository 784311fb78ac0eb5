"""Every attention kernel of the dispatch table on random problems, against torch and float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    Implementation,
    allowed_error,
    dtypes,
    error_of,
    implementations,
    is_beyond_this_machine,
    is_refusal,
    normal,
    poisoned_memory,
    seeds,
    view_as,
)
from torch import Tensor

import pyseqnet.functional as F
from pyseqnet import _C
from pyseqnet.functional import attention as module

EXAMPLES = 60
ops = torch.ops.pyseqnet
sdpa = torch.nn.functional.scaled_dot_product_attention
VIEWS = ("contiguous", "heads inside", "narrowed", "transposed", "step", "expanded")


def arranged(tensor: Tensor, view: str) -> Tensor:
    if view == "heads inside":  # as multi-head layers have them
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return view_as(tensor, view)


@dataclass(frozen=True)
class Problem:
    B: int
    H: int
    group: int
    L: int
    S: int
    D: int
    E: int
    causal: bool
    mask: str
    mask_shape: tuple[bool, bool, bool]  # whether batch, heads, queries are broadcast
    lengths: bool
    dropout_p: float
    scale: float | None
    dtype: torch.dtype
    view: str
    with_weights: bool
    with_lse: bool
    seed: int

    def tensors(self, device: str) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """[query, key, value], mask, key_lengths; in the problem's dtype."""
        shapes = ((self.H * self.group, self.L, self.D), (self.H, self.S, self.D), (self.H, self.S, self.E))
        inputs = [normal((self.B, *shape), self.seed + n, self.dtype) for n, shape in enumerate(shapes)]
        generator = torch.Generator().manual_seed(self.seed)
        full = (self.B, self.H * self.group, self.L)
        shape = (*(1 if one else f for one, f in zip(self.mask_shape, full, strict=True)), self.S)
        mask = None
        if self.mask == "bool":
            mask = torch.rand(shape, generator=generator) > 0.4
        elif self.mask != "none":
            mask = normal(shape, self.seed + 3, self.dtype if self.mask == "additive" else torch.float32)
            mask = mask.masked_fill(torch.rand(shape, generator=generator) > 0.8, -math.inf)
            if self.dtype == torch.float64:
                mask = mask.double()
        lengths = torch.randint(0, self.S + 1, (self.B,), generator=generator) if self.lengths else None
        inputs = [arranged(t.to(device), self.view) for t in inputs]
        return inputs, None if mask is None else mask.to(device), None if lengths is None else lengths.to(device)

    def options(self) -> tuple[int, float, float]:
        return int(self.causal), 1 / math.sqrt(self.D) if self.scale is None else self.scale, self.dropout_p


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    length = st.one_of(st.integers(1, 5), st.integers(1, 70))
    width = st.one_of(st.sampled_from((1, 8, 16, 32, 64)), st.integers(1, 70))
    d = draw(width)
    return Problem(
        B=draw(st.integers(1, 2)),
        H=draw(st.integers(1, 2)),
        group=draw(st.sampled_from((1, 1, 2, 3))),
        L=draw(st.one_of(length, st.just(130))),
        S=draw(st.one_of(length, st.just(300))),
        D=d,
        E=draw(st.one_of(st.just(d), width)),
        causal=draw(st.sampled_from((False, False, True))),
        mask=draw(st.sampled_from(("none", "none", "bool", "additive", "additive f32"))),
        mask_shape=draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        lengths=draw(st.sampled_from((False, False, True))),
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.3))),
        scale=draw(st.sampled_from((None, None, 1.0, 0.25))),
        dtype=draw(dtypes),
        view=draw(st.sampled_from(VIEWS)),
        with_weights=draw(st.booleans()),
        with_lse=draw(st.booleans()),
        seed=draw(seeds),
    )


def plain(p: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    """Results and gradients in plain torch in this dtype, on the CPU."""
    inputs, mask, lengths = p.tensors("cpu")
    inputs = [t.to(dtype).contiguous().requires_grad_() for t in inputs]
    leaves = list(inputs)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype).requires_grad_()
        leaves.append(mask)
    seed = torch.tensor([p.seed])
    out, weights, lse = _in_dtype(*inputs, mask, lengths, seed, p)
    gout, gweights, glse = gradients_of(p)
    pairs = [(out, gout.to(dtype))]
    if p.with_weights:
        pairs.append((weights, gweights.to(dtype)))
    if p.with_lse:
        pairs.append((torch.where(lse.isinf(), 0.0, lse), glse.to(lse.dtype)))
    found = torch.autograd.grad([r for r, _ in pairs], leaves, [g for _, g in pairs])
    names = ("gq", "gk", "gv", "gmask")[: len(found)]
    return {"out": out, "weights": weights, "lse": lse, **dict(zip(names, found, strict=True))}


def _in_dtype(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor | None, seed: Tensor, p: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    """What a user would write: products and softmax in the dtype of the inputs."""
    key, value = (t.repeat_interleave(p.group, dim=1) for t in (key, value))
    visible = torch.ones(p.B, p.H * p.group, p.L, p.S, dtype=torch.bool)
    if p.causal:
        visible = visible.tril()
    if lengths is not None:
        visible = visible & (torch.arange(p.S) < lengths.view(-1, 1, 1, 1))
    if mask is not None:
        visible = visible & (mask if mask.dtype == torch.bool else mask != -math.inf)
    logits = query @ key.transpose(-1, -2) * p.options()[1]
    if mask is not None and mask.dtype != torch.bool:
        logits = logits + mask.masked_fill(mask == -math.inf, 0.0)
    sees = visible.any(-1, keepdim=True)
    logits = logits.masked_fill(~visible, -math.inf).masked_fill(~sees, 0.0)
    weights = torch.softmax(logits, -1).masked_fill(~sees, 0.0)
    lse = torch.logsumexp(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    if p.dropout_p > 0:
        weights = weights * module._keep_factors(tuple(weights.shape), seed, p.dropout_p).to(weights.dtype)
    return weights @ value, weights, lse.masked_fill(~sees.squeeze(-1), -math.inf)


def gradients_of(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    heads = p.H * p.group
    return (
        normal((p.B, heads, p.L, p.E), p.seed + 5, p.dtype),
        normal((p.B, heads, p.L, p.S), p.seed + 6, p.dtype),
        normal((p.B, heads, p.L), p.seed + 7, torch.float64 if p.dtype == torch.float64 else torch.float32),
    )


def run_pass(p: Problem, operation: str, device: str) -> dict[str, Tensor]:
    """The results of the raw operations that this table entry belongs to."""
    inputs, mask, lengths = p.tensors(device)
    seed = torch.tensor([p.seed], device=device)
    extras = (mask, lengths, seed)
    out, lse = ops.attention_forward(*inputs, *extras, *p.options())
    if operation == "attention_forward":
        return {"out": out, "lse": lse}
    weights = ops.attention_weights(*inputs[:2], lse, *extras, *p.options())
    if operation == "attention_weights":
        return {"weights": weights}
    gout, gweights, glse = (t.to(device) for t in gradients_of(p))
    additive = mask is not None and mask.dtype != torch.bool
    found = ops.attention_backward(
        arranged(gout, p.view if p.view != "expanded" else "contiguous"), *inputs, out, lse, *extras,
        weights if p.with_weights else None, gweights if p.with_weights else None, glse if p.with_lse else None,
        *p.options(), True, True, additive,
    )  # fmt: skip
    names = ("gq", "gk", "gv", "gmask")
    return dict(zip(names if additive else names[:3], found, strict=False))


@pytest.mark.parametrize("entry", implementations("attention"))
def test_every_kernel_matches_torch(entry: Implementation) -> None:
    """At most twice (gradients three times) the error of plain torch in this dtype, measured against float64."""
    taken = [0]

    @settings(max_examples=EXAMPLES // 2 if entry.kernel == "reference" else EXAMPLES)
    @given(problems())
    def check(p: Problem) -> None:
        try:
            with entry.pinned(), poisoned_memory():
                found = run_pass(p, entry.operation, entry.device)
        except RuntimeError as error:
            if is_refusal(error):
                return
            raise
        taken[0] += 1
        exact, theirs = plain(p, torch.float64), plain(p, p.dtype)
        for name, result in found.items():
            factor = 3.0 if name.startswith("g") else 2.0
            if name == "lse":
                assert torch.equal(result.cpu().isinf(), exact["lse"].isinf())
                result, expected = (torch.where(t.isinf(), 0, t.double()) for t in (result.cpu(), exact["lse"]))
                yardstick = torch.where(theirs["lse"].isinf(), 0, theirs["lse"])
            else:
                expected, yardstick = exact[name], theirs[name]
            # Sums of terms as large as these: a gradient may cancel to nothing.
            magnitude = expected.abs() + terms(p)[name]
            allowed = allowed_error(yardstick, expected, magnitude, factor)
            assert error_of(result, expected) <= allowed, (name, error_of(result, expected), allowed)

    try:
        check()
    except RuntimeError as error:
        if is_beyond_this_machine(error):
            pytest.skip(str(error).splitlines()[0])
        raise
    assert taken[0] > 0, f"{entry} refused every problem"


def terms(p: Problem) -> dict[str, float]:
    """About how large the terms of each result's sums are, inputs being standard normal.

    A logit is off by some ulp of its own size; the weights, exponentials, are then off by so much of theirs.
    """
    (q, k, _), mask, _ = p.tensors("cpu")
    k = k.repeat_interleave(p.group, dim=1)
    logit = 1 + (q.double() @ k.double().transpose(-1, -2)).abs().max().item() * abs(p.options()[1])
    if mask is not None and mask.dtype != torch.bool:
        logit += 4
    gradient = (3 * math.sqrt(p.E) / (1 - p.dropout_p) + 3) * logit
    rows = math.sqrt(p.L * p.group)
    return {
        "out": 3 * logit, "weights": logit, "lse": logit + math.log(p.S), "gq": gradient, "gk": gradient * rows,
        "gv": 3 * logit * rows, "gmask": gradient * math.sqrt(p.B * p.H) * rows,
    }  # fmt: skip


def test_tables() -> None:
    for operation in ("forward", "weights", "delta", "backward", "mask_gradient"):
        names = _C.dispatch_tables()[f"attention_{operation}"]["cpu"]
        assert names[-1] == "reference"
        assert len(set(names)) == len(names)


def test_float64_is_exact_to_its_precision() -> None:
    inputs = [normal((1, 2, 9, 8), n).requires_grad_() for n in range(3)]
    ours = F.scaled_dot_product_attention(*inputs, return_lse=True)
    theirs = F.scaled_dot_product_attention_reference(*inputs, return_lse=True)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
