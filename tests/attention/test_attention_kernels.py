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
from pyseqnet import _C, masks
from pyseqnet.functional._attention_reference import Extras, Options, keep_factors

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
    mask: bool
    bias: str
    mask_shape: tuple[bool, bool, bool]  # whether batch, heads, queries are broadcast
    lengths: bool
    alibi: int  # dimensions of the slopes, 0: none
    softcap: float
    pattern: masks.Pattern | None
    dropout_p: float
    scale: float | None
    dtype: torch.dtype
    view: str
    with_weights: bool
    with_lse: bool
    seed: int

    @property
    def heads(self) -> int:
        return self.H * self.group

    def tensors(self, device: str) -> tuple[list[Tensor], Extras]:
        """[query, key, value] and what comes beside them; in the problem's dtype."""
        shapes = ((self.heads, self.L, self.D), (self.H, self.S, self.D), (self.H, self.S, self.E))
        inputs = [normal((self.B, *shape), self.seed + n, self.dtype) for n, shape in enumerate(shapes)]
        generator = torch.Generator().manual_seed(self.seed)
        full = (self.B, self.heads, self.L)
        shape = (*(1 if one else f for one, f in zip(self.mask_shape, full, strict=True)), self.S)
        mask = (torch.rand(shape, generator=generator) > 0.4).to(device) if self.mask else None
        bias = None
        if self.bias:
            bias = normal(shape, self.seed + 3, torch.float32 if self.bias == "f32" else self.dtype)
            bias = bias.masked_fill(torch.rand(shape, generator=generator) > 0.8, -math.inf)
            bias = (bias.double() if self.dtype == torch.float64 else bias).to(device)
        lengths = torch.randint(0, self.S + 1, (self.B,), generator=generator).to(device) if self.lengths else None
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        slopes = None
        if self.alibi:
            slopes = torch.rand(self.B * self.heads if self.alibi == 2 else self.heads, generator=generator)
            slopes = slopes.to(device, wide)
        pattern: tuple[Tensor, ...] = ()
        if self.pattern is not None:
            pattern = self.pattern.compile(self.L, self.S, heads=self.heads, device=device)
        seed = torch.tensor([self.seed], device=device)
        inputs = [arranged(t.to(device), self.view) for t in inputs]
        return inputs, Extras(mask, bias, slopes, lengths, None, None, pattern, seed)

    def options(self) -> Options:
        scale = 1 / math.sqrt(self.D) if self.scale is None else self.scale
        return Options(int(self.causal), scale, self.softcap, self.dropout_p, 0, 0)


PATTERNS = (
    masks.Causal("bottom_right"),
    masks.Local(3),
    masks.Local(70, 5, align="bottom_right"),
    masks.Strided(7),
    masks.Global(2) | masks.Strided(3, 40),
    masks.Causal() & (masks.Local(8) | masks.Global([0, 90])),
    masks.Blocks(torch.tensor([[1, 0, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]], dtype=torch.bool), 150),
    masks.Blocks(torch.zeros(1, 1, dtype=torch.bool), 300),
    "dense",
    "per head",
    "edges",
)


def pattern_of(kind: masks.Pattern | str, heads: int, queries: int, keys: int, seed: int) -> masks.Pattern:
    if isinstance(kind, masks.Pattern):
        return kind
    generator = torch.Generator().manual_seed(seed)
    if kind == "dense":
        return masks.Dense(torch.rand(queries, keys, generator=generator) > 0.7)
    if kind == "edges":
        edges = [torch.randint(0, n, (2 * queries,), generator=generator) for n in (keys, queries)]
        return masks.Edges(torch.stack(edges), (keys, queries))
    return masks.per_head([PATTERNS[(seed + h) % 6] for h in range(heads)])


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    length = st.one_of(st.integers(1, 5), st.integers(1, 70))
    width = st.one_of(st.sampled_from((1, 8, 16, 32, 64)), st.integers(1, 70))
    d = draw(width)
    shape = {
        "B": draw(st.integers(1, 2)),
        "H": draw(st.integers(1, 2)),
        "group": draw(st.sampled_from((1, 1, 2, 3))),
        "L": draw(st.one_of(length, st.just(130))),
        "S": draw(st.one_of(length, st.just(300))),
        "seed": draw(seeds),
    }
    kind = draw(st.one_of(st.none(), st.sampled_from(PATTERNS)))
    pattern = None
    if kind is not None:
        pattern = pattern_of(kind, shape["H"] * shape["group"], shape["L"], shape["S"], shape["seed"])
    return Problem(
        **shape,
        D=d,
        E=draw(st.one_of(st.just(d), width)),
        causal=draw(st.sampled_from((False, False, True))),
        mask=draw(st.sampled_from((False, False, True))),
        bias=draw(st.sampled_from(("", "", "same", "f32"))),
        mask_shape=draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        lengths=draw(st.sampled_from((False, False, True))),
        alibi=draw(st.sampled_from((0, 0, 1, 2))),
        softcap=draw(st.sampled_from((0.0, 0.0, 0.0, 3.0))),
        pattern=pattern,
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.3))),
        scale=draw(st.sampled_from((None, None, 1.0, 0.25))),
        dtype=draw(dtypes),
        view=draw(st.sampled_from(VIEWS)),
        with_weights=draw(st.booleans()),
        with_lse=draw(st.booleans()),
    )


def plain(p: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    """Results and gradients in plain torch in this dtype, on the CPU."""
    inputs, extras = p.tensors("cpu")
    inputs = [t.to(dtype).contiguous().requires_grad_() for t in inputs]
    leaves = list(inputs)
    if extras.bias is not None:
        extras = extras._replace(bias=extras.bias.to(dtype).requires_grad_())
        leaves.append(extras.bias)
    out, weights, lse = _in_dtype(*inputs, extras, p)
    gout, gweights, glse = gradients_of(p)
    pairs = [(out, gout.to(dtype))]
    if p.with_weights:
        pairs.append((weights, gweights.to(dtype)))
    if p.with_lse:
        pairs.append((torch.where(lse.isinf(), 0.0, lse), glse.to(lse.dtype)))
    found = torch.autograd.grad([r for r, _ in pairs], leaves, [g for _, g in pairs])
    names = ("gq", "gk", "gv", "gbias")[: len(found)]
    return {"out": out, "weights": weights, "lse": lse, **dict(zip(names, found, strict=True))}


def _in_dtype(query: Tensor, key: Tensor, value: Tensor, extras: Extras, p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """What a user would write: products and softmax in the dtype of the inputs."""
    key, value = (t.repeat_interleave(p.group, dim=1) for t in (key, value))
    visible = torch.ones(p.B, p.heads, p.L, p.S, dtype=torch.bool)
    if p.causal:
        visible = visible.tril()
    if extras.key_lengths is not None:
        visible = visible & (torch.arange(p.S) < extras.key_lengths.view(-1, 1, 1, 1))
    if p.pattern is not None:
        visible = visible & p.pattern.to_dense(p.L, p.S)
    if extras.mask is not None:
        visible = visible & extras.mask
    if extras.bias is not None:
        visible = visible & (extras.bias != -math.inf)
    logits = query @ key.transpose(-1, -2) * p.options().scale
    if p.softcap:
        logits = p.softcap * torch.tanh(logits / p.softcap)
    if extras.slopes is not None:
        offset = 0 if p.causal else p.S - p.L
        distance = (torch.arange(p.L).unsqueeze(1) + offset - torch.arange(p.S)).abs()
        logits = logits - (extras.slopes.view(-1, p.heads, 1, 1) * distance).to(logits.dtype)
    if extras.bias is not None:
        logits = logits + extras.bias.masked_fill(extras.bias == -math.inf, 0.0)
    sees = visible.any(-1, keepdim=True)
    logits = logits.masked_fill(~visible, -math.inf).masked_fill(~sees, 0.0)
    weights = torch.softmax(logits, -1).masked_fill(~sees, 0.0)
    lse = torch.logsumexp(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    if p.dropout_p > 0:
        keep = keep_factors(tuple(weights.shape), torch.arange(p.S), extras.seed, p.dropout_p)
        weights = weights * keep.to(weights.dtype)
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
    inputs, extras = p.tensors(device)
    out, lse = ops.attention_forward(*inputs, *extras, *p.options())
    if operation == "attention_forward":
        return {"out": out, "lse": lse}
    weights = ops.attention_weights(*inputs[:2], lse, *extras, *p.options())
    if operation == "attention_weights":
        return {"weights": weights}
    gout, gweights, glse = (t.to(device) for t in gradients_of(p))
    found = ops.attention_backward(
        arranged(gout, p.view if p.view != "expanded" else "contiguous"), *inputs, out, lse, *extras,
        weights if p.with_weights else None, gweights if p.with_weights else None, glse if p.with_lse else None,
        *p.options(), True, True, bool(p.bias),
    )  # fmt: skip
    names = ("gq", "gk", "gv", "gbias")
    return dict(zip(names if p.bias else names[:3], found, strict=False))


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
    (q, k, _), _ = p.tensors("cpu")
    k = k.repeat_interleave(p.group, dim=1)
    logit = 1 + (q.double() @ k.double().transpose(-1, -2)).abs().max().item() * abs(p.options().scale)
    logit += 4 * bool(p.bias)
    logit += max(p.L, p.S) * bool(p.alibi)
    gradient = (3 * math.sqrt(p.E) / (1 - p.dropout_p) + 3) * logit
    rows = math.sqrt(p.L * p.group)
    return {
        "out": 3 * logit, "weights": logit, "lse": logit + math.log(p.S), "gq": gradient, "gk": gradient * rows,
        "gv": 3 * logit * rows, "gbias": gradient * math.sqrt(p.B * p.H) * rows,
    }  # fmt: skip


def test_tables() -> None:
    for operation in ("forward", "weights", "delta", "backward", "bias_gradient"):
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
