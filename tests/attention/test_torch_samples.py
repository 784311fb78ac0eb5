"""torch's own operator samples, and what breaks other implementations of attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import DEVICES, normal, threads
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

import pyseqnet.functional as F
import pyseqnet.masks as M

# Importing torch's test material forbids to set torch's switches outside a context manager, for the whole process.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True

sdpa = torch.nn.functional.scaled_dot_product_attention
F_sdpa = F.scaled_dot_product_attention
OP = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_operator_samples(device: str, dtype: torch.dtype) -> None:
    """Against float64: at most twice torch's error (gradients three times), and a few ulp."""
    count = 0
    for sample in OP.sample_inputs(device, dtype, requires_grad=True):
        if sample.kwargs.get("dropout_p", 0.0) > 0:
            continue  # other random bits
        count += 1

        def results(function: Any, wide: bool, sample: Any = sample) -> list[Tensor]:
            tensors = [sample.input, *sample.args]
            if wide:
                tensors = [
                    t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in tensors
                ]
            options = {
                k: v.double() if wide and isinstance(v, Tensor) and v.is_floating_point() else v
                for k, v in sample.kwargs.items()
            }
            leaves = [t for t in tensors if t.requires_grad]
            out = function(*tensors, **options)
            return [t.double() for t in (out, *torch.autograd.grad(out.square().sum(), leaves))]

        ours, theirs, exact = results(F_sdpa, False), results(sdpa, False), results(sdpa, True)
        # Of peaked weights the gradients of query and key cancel: their terms are as large as the value's gradient.
        largest = max(t.abs().max().item() for t in exact)
        for n, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
            # Logits reach 200, so one ulp of theirs is so much of a weight; torch keeps 16-bit ones in 16 bits.
            ulps = 8 if dtype == torch.bfloat16 else 256
            floor = ulps * torch.finfo(dtype).eps * (c.abs().max().item() if n == 0 else largest)
            allowed = (2 if n == 0 else 3) * (b - c).abs().max().item() + floor
            assert (a - c).abs().max().item() <= allowed
    assert count > 10


def test_operator_errors(device: str) -> None:
    for wrong in OP.error_inputs(device) if OP.error_inputs_func else ():
        sample = wrong.sample_input
        with pytest.raises(wrong.error_type, match=wrong.error_regex):
            F.scaled_dot_product_attention(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 704])
@pytest.mark.parametrize("masked", ["lengths", "mask", "pattern"])
def test_far_below_the_range_of_exp(device: str, keys: int, masked: str) -> None:
    """Logits about -120: a padded key scored 0 would overflow exp(0 - lse) (a fault elsewhere at S % 128 == 64)."""
    q = torch.full((1, 2, 5, 8), 1.0, device=device) + 0.1 * normal((1, 2, 5, 8), 0, torch.float32).to(device)
    k = torch.full((1, 2, keys, 8), -15.0, device=device) + normal((1, 2, keys, 8), 1, torch.float32).to(device)
    v = normal((1, 2, keys, 8), 2, torch.float32).to(device)
    seen = max(keys * 3 // 4, 1)
    visible = (torch.arange(keys, device=device) < seen).expand(5, keys)
    options = {
        "lengths": {"key_lengths": torch.tensor([seen], device=device)},
        "mask": {"attn_mask": visible},
        "pattern": {"pattern": M.Dense(visible.cpu())},
    }[masked]
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out, lse = F.scaled_dot_product_attention(*inputs, **options, scale=1.0, return_lse=True)
    assert (lse < -88).all()
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = sdpa(*wide, visible, scale=1.0)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)
    ours = torch.autograd.grad(out.square().sum(), inputs)
    for a, b in zip(ours, torch.autograd.grad(exact.square().sum(), wide), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("length", [64, 70, 192, 256])
def test_huge_logits(device: str, size: float, length: int) -> None:
    q, k, v = (normal((1, 2, length, 16), n, torch.float32).to(device) for n in range(3))
    q[..., 0], k[..., 0] = abs(size) ** 0.5, math.copysign(abs(size) ** 0.5, size)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*inputs, pattern=M.Local(9) | M.Global(1), scale=1.0)
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    for t in (out, *gradients):
        assert t.isfinite().all()
    wide = [t.detach().double() for t in inputs]
    exact = sdpa(*wide, (M.Local(9) | M.Global(1)).to_dense(length, length, device), scale=1.0)
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-2)


def test_the_same_bits_for_any_number_of_threads() -> None:
    inputs = [normal((2, 2, 300, 16), n, torch.float32).requires_grad_() for n in range(3)]
    bias = normal((1, 2, 1, 300), 4, torch.float32).requires_grad_()
    ends = torch.tensor([0, 100, 300], dtype=torch.int32)

    def results() -> list[Tensor]:
        options = {"pattern": M.Local(20) | M.Strided(9) | M.Global(3), "bias": bias, "softcap": 3.0}
        out = F.scaled_dot_product_attention(*inputs, **options)
        flat = [t[0].transpose(0, 1) for t in inputs]
        packed = F.scaled_dot_product_attention(*flat, cu_seqlens_q=ends, cu_seqlens_k=ends, is_causal=True)
        loss = out.square().sum() + packed.square().sum()
        return [out, packed, *torch.autograd.grad(loss, (*inputs, bias))]

    first = None
    for count in (1, 2, 3):
        with threads(count):
            found = results()
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


def test_golden_attention_matrix(device: str) -> None:
    """G6, under patterns that hide nothing or something."""
    tokens = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], device=device)
    golden = torch.tensor(
        [[0.422319, 0.155362, 0.422319], [0.015876, 0.866813, 0.117310], [0.155362, 0.422319, 0.422319]], device=device
    )
    for pattern in (M.Local(2), M.Strided(1), M.Global(3), M.Local(1) | M.Global([0])):
        _, weights = F.scaled_dot_product_attention(
            tokens, tokens, tokens, pattern=pattern, scale=1.0, return_weights=True
        )
        torch.testing.assert_close(weights, golden, rtol=1e-4, atol=1e-5)
    _, weights = F.scaled_dot_product_attention(
        tokens, tokens, tokens, pattern=M.Local(1), scale=1.0, return_weights=True
    )
    hidden = golden * M.Local(1).to_dense(3, 3, device)
    torch.testing.assert_close(weights, hidden / hidden.sum(-1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_alibi_is_its_matrix(device: str) -> None:
    """-slope |i + S - L - j|, as flash-attention has it; |i - j| under the causal mask that begins top-left."""
    q, k, v = (normal((2, 4, n, 8), s, torch.float32).to(device) for s, n in enumerate((20, 50, 50)))
    slopes = torch.rand(2, 4, device=device)
    i, j = torch.arange(20, device=device).unsqueeze(1), torch.arange(50, device=device)
    for per_batch in (slopes, slopes[0]):
        full = per_batch.view(-1, 4, 1, 1)
        ours = F.scaled_dot_product_attention(q, k, v, alibi_slopes=per_batch)
        torch.testing.assert_close(ours, sdpa(q, k, v, -full * (i + 30 - j).abs()), rtol=1e-4, atol=1e-5)
        top = -full * (i - j).abs() + torch.where(j <= i, 0.0, -math.inf)
        ours = F.scaled_dot_product_attention(q, k, v, alibi_slopes=per_batch, is_causal=True)
        torch.testing.assert_close(ours, sdpa(q, k, v, top.expand(2, 4, 20, 50)), rtol=1e-4, atol=1e-5)


def test_bias_beside_a_mask(device: str) -> None:
    """The gradient keeps the size that the bias was given at; two biases add up."""
    q, k, v = (normal((3, 2, n, 8), s, torch.float32).to(device) for s, n in enumerate((20, 30, 30)))
    bias = normal((2, 20, 30), 4, torch.float32).to(device).requires_grad_()
    padding = torch.rand(3, 1, 1, 30, device=device) > 0.3
    ours = F.scaled_dot_product_attention(q, k, v, padding, bias=bias)
    theirs = sdpa(q, k, v, torch.where(padding, bias, -math.inf))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    (a,), (b,) = (torch.autograd.grad(out.square().sum(), bias) for out in (ours, theirs))
    assert a.shape == bias.shape
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        F.scaled_dot_product_attention(q, k, v, bias * 0.5, bias=bias * 0.5),
        F.scaled_dot_product_attention(q, k, v, bias),
    )


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"softcap": 0.0}, ValueError, "softcap.*0.0"),
        ({"softcap": "x"}, TypeError, "softcap.*str"),
        ({"softcap": math.inf}, ValueError, "softcap.*inf"),
        ({"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes.*\(2,\).*\(3,\)"),
        ({"alibi_slopes": [1.0, 2.0]}, TypeError, "alibi_slopes.*list"),
        ({"alibi_slopes": torch.ones(2).int()}, TypeError, "alibi_slopes.*int32"),
        ({"alibi_slopes": torch.ones(2, requires_grad=True)}, ValueError, "alibi_slopes.*gradient"),
        ({"bias": torch.ones(5, 5).bool()}, TypeError, "bias.*bool"),
        ({"bias": torch.ones(4, 5)}, ValueError, r"bias.*\(4, 5\)"),
        ({"bias": 3.0}, TypeError, "bias.*float"),
    ],
)
def test_errors_name_the_argument(options: dict, kind: type[Exception], words: str) -> None:
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(kind, match=words):
        F.scaled_dot_product_attention(q, q, q, **options)
