"""Efficient attention (Shen et al., 2021) as a map of the kernels: every one of the tables, and its definition."""

from __future__ import annotations

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
    threads,
)
from torch import Tensor

import pyseqnet.functional as F

EXAMPLES = 30
WIDTHS = st.sampled_from((1, 3, 16, 17, 40, 64))
LENGTHS = st.one_of(st.integers(0, 70), st.integers(130, 140), st.integers(1000, 1100))


def defined(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None) -> Tensor:
    """Its formula, in the dtype of the inputs; a batch without keys is zero."""
    if lengths is not None:
        beyond = (torch.arange(key.shape[2]) >= lengths[:, None])[:, None, :, None]
        key, value = key.masked_fill(beyond, torch.finfo(key.dtype).min), value.masked_fill(beyond, 0)
    return (query * 0.5).softmax(3) @ (key.softmax(2).transpose(2, 3) @ value)


@pytest.mark.parametrize("entry", implementations("linear_attention"))
def test_every_kernel(entry: Implementation) -> None:
    accepted = 0

    @settings(max_examples=EXAMPLES)
    @given(st.integers(1, 2), st.integers(1, 9), LENGTHS, LENGTHS, WIDTHS, WIDTHS, st.booleans(), dtypes, seeds)
    def on_random_problems(
        batch: int, heads: int, queries: int, keys: int, d: int, e: int, padded: bool, dtype: torch.dtype, seed: int
    ) -> None:
        nonlocal accepted
        shapes = (batch, heads, queries, d), (batch, heads, keys, d), (batch, heads, keys, e)
        inputs = [normal(shape, seed + i).mul(3).to(dtype) for i, shape in enumerate(shapes)]
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, keys + 1, (batch,), generator=generator) if padded else None
        arrived = normal((batch, heads, queries, e), seed + 9).bfloat16()
        options = {"feature_map": "softmax", "scale": 0.5}

        def gradients(function, kind: torch.dtype, device: str = "cpu") -> list[Tensor]:
            leaves = [t.detach().to(device, kind).requires_grad_() for t in inputs]
            out = function(*leaves, None if lengths is None else lengths.to(device))
            return [out.detach(), *torch.autograd.grad(out, leaves, arrived.to(device, kind))]

        with entry.pinned(), poisoned_memory(), threads(2):
            try:
                ours = gradients(
                    lambda *t: F.linear_attention(*t[:3], key_lengths=t[3], **options), dtype, entry.device
                )
            except RuntimeError as error:
                if is_beyond_this_machine(error):
                    pytest.skip(str(error))
                if is_refusal(error):
                    return
                raise
        accepted += 1
        exact = gradients(lambda *t: F.linear_attention_reference(*t[:3], key_lengths=t[3], **options), torch.float64)
        theirs = gradients(defined, dtype)
        magnitude = torch.stack([t.abs().max() for t in exact if t.numel()] + [torch.ones((), dtype=torch.float64)])
        for i, (a, b, c) in enumerate(zip(ours, exact, theirs, strict=True)):
            bound = allowed_error(c, b, magnitude, 2 if i == 0 else 3)
            if dtype in (torch.bfloat16, torch.float16):
                bound += 2 * torch.finfo(dtype).eps * magnitude.max().item()
            assert error_of(a, b) <= bound
            assert a.dtype == dtype

    on_random_problems()
    assert accepted >= EXAMPLES // 4


def test_is_its_definition(device: str) -> None:
    q, k, v = (normal((2, 3, 150, 20), i).to(device) for i in range(3))
    out = F.linear_attention(q, k, v, feature_map="softmax", scale=0.5)
    torch.testing.assert_close(out, defined(q, k, v, None), atol=1e-13, rtol=1e-13)


def test_huge_logits_and_what_stands_in_padding(device: str) -> None:
    q, k, v = (normal((2, 2, 90, 5), i, torch.float32).to(device) for i in range(3))
    lengths = torch.tensor([90, 33], device=device)
    leaves = [(t * scale).requires_grad_() for t, scale in ((q, 1e4), (k, 1e4), (v, 1))]
    out = F.linear_attention(*leaves, feature_map="softmax", key_lengths=lengths)
    found = torch.autograd.grad(out.sum(), leaves)
    exact = defined(*(t.double().cpu() * s for t, s in ((leaves[0], 2), (leaves[1], 1), (v, 1))), lengths.cpu())
    torch.testing.assert_close(out.double().cpu(), exact, atol=1e-5, rtol=1e-5)
    dirty = [t.detach().clone() for t in leaves]
    dirty[1][1, :, 33:], dirty[2][1, :, 33:] = torch.nan, torch.inf
    dirty = [t.requires_grad_() for t in dirty]
    again = F.linear_attention(*dirty, feature_map="softmax", key_lengths=lengths)
    assert torch.equal(again, out)
    for a, b in zip(torch.autograd.grad(again.sum(), dirty), found, strict=True):
        assert torch.equal(a, b)


def test_results_do_not_depend_on_threads() -> None:
    leaves = [normal((1, 2, 3000, 16), i, torch.float32).requires_grad_() for i in range(3)]
    results = []
    for count in (1, 2, 3):
        with threads(count):
            out = F.linear_attention(*leaves, feature_map="softmax")
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_operation_refuses_what_the_map_is_not() -> None:
    forward = torch.ops.pyseqnet.linear_attention_forward.default
    x = torch.zeros(1, 1, 3, 2)
    state = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2)
    for arguments in (
        (None, None, 4, True, True, 1.0, 0.0, False),  # causal
        (None, None, 4, False, False, 1.0, 0.0, False),  # not normalised
        (None, None, 4, False, True, 1.0, 1e-6, False),  # eps
        (*state, 4, False, True, 1.0, 0.0, False),
        (None, None, 4, False, True, 1.0, 0.0, True),  # a state out
    ):
        with pytest.raises(ValueError, match="softmax"):
            forward(x, x, x, None, *arguments, False)
    with pytest.raises(ValueError, match="softmax"):
        torch.ops.pyseqnet.linear_attention_step(x[:, :, 0], x[:, :, 0], x[:, :, 0], None, None, 4, True, 1.0, 0.0)
