"""Linear attention of packed sequences and with decay: every kernel of the tables, the definitions, the streams."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    Implementation,
    implementations,
    is_beyond_this_machine,
    is_refusal,
    normal,
    poisoned_memory,
    threads,
)
from torch import Tensor

import pyseqnet.functional as F
import pyseqnet.nn as nn

EXAMPLES = 30
WIDTHS = st.sampled_from((1, 3, 16, 17, 40))


def starts_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def gradients(results: list[Tensor], leaves: list[Tensor], seed: int) -> list[Tensor]:
    arrived = [normal(tuple(t.shape), seed + i).to(t.device, t.dtype) for i, t in enumerate(results)]
    return [t.detach() for t in results] + list(torch.autograd.grad(results, leaves, arrived))


@pytest.mark.parametrize("entry", implementations("linear_attention"))
def test_packed_sequences_are_what_each_is_alone(entry: Implementation) -> None:
    accepted = 0

    @settings(max_examples=EXAMPLES)
    @given(
        st.lists(st.one_of(st.integers(0, 5), st.integers(60, 70), st.integers(500, 600)), min_size=0, max_size=5),
        st.integers(1, 3),
        WIDTHS,
        WIDTHS,
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.sampled_from((torch.float32, torch.bfloat16, torch.float64)),
        st.integers(0, 100),
    )
    def on_random_problems(
        lengths: list[int], heads: int, d: int, e: int, causal: bool, decayed: bool, with_state: bool,
        three_dimensions: bool, dtype: torch.dtype, seed: int,
    ) -> None:  # fmt: skip
        nonlocal accepted
        total, sequences = sum(lengths), len(lengths)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        shapes = [(total, heads, d), (total, heads, d), (total, heads, e)]
        inputs = [normal(shape, seed + i, dtype) for i, shape in enumerate(shapes)]
        states = [normal((sequences, heads, d, e), 3, wide), normal((sequences, heads, d), 4, wide).abs()]
        decay = torch.linspace(0.3, 1, heads, dtype=torch.float64) if causal and decayed else None
        options = {"causal": causal, "decay": decay, "eps": 1e-2, "return_state": True}

        def packed() -> list[Tensor]:
            leaves = [t.to(entry.device).requires_grad_() for t in (*inputs, *states)]
            given = [t if three_dimensions else t.transpose(0, 1).unsqueeze(0) for t in leaves[:3]]
            start = tuple(leaves[3:]) if with_state else None
            cu = starts_of(lengths).to(entry.device)
            out, state = F.linear_attention(*given, cu_seqlens=cu, initial_state=start, **options)
            out = out if three_dimensions else out[0].transpose(0, 1)
            return gradients([out, *state], leaves if with_state else leaves[:3], seed)

        def alone() -> list[Tensor]:
            leaves = [t.double().requires_grad_() for t in (*inputs, *states)]
            found = []
            for n, part in enumerate(zip(*(t.split(lengths) for t in leaves[:3]), strict=True)):
                q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in part)
                start = tuple(t[n : n + 1] for t in leaves[3:]) if with_state else None
                out, state = F.linear_attention_reference(q, k, v, initial_state=start, **options)
                found.append((out[0].transpose(0, 1), *state))
            results = [torch.cat(t) for t in zip(*found, strict=True)]
            return gradients(results, leaves if with_state else leaves[:3], seed)

        with entry.pinned(), poisoned_memory(), threads(2):
            try:
                ours = packed()
            except RuntimeError as error:
                if is_beyond_this_machine(error):
                    pytest.skip(str(error))
                if is_refusal(error):
                    return
                raise
        accepted += 1
        if not lengths:
            assert ours[0].shape == (0, heads, e)
            assert ours[1].shape == (0, heads, d, e)
            return
        for a, b in zip(ours, alone(), strict=True):
            size = max(b.abs().max().item(), 1.0) if b.numel() else 1.0
            # What backward keeps of the output is rounded, so that the states' gradients are as well.
            bound = 64 * size * max(torch.finfo(dtype).eps / 8, torch.finfo(wide).eps * 8)
            assert a.numel() == 0 or (a.double().cpu() - b).abs().max() <= bound

    on_random_problems()
    assert accepted >= EXAMPLES // 4


@pytest.mark.parametrize(
    "feature_map", ["elu", "exp", "softmax", torch.square], ids=["elu", "exp", "softmax", "function"]
)
def test_packed_sequences_take_every_map(device: str, feature_map: object) -> None:
    q, k, v = (normal((9, 2, 4), i).to(device) for i in range(3))
    cu = torch.tensor([0, 4, 9], device=device)
    out = F.linear_attention(q, k, v, feature_map=feature_map, cu_seqlens=cu)
    for begin, end in ((0, 4), (4, 9)):
        part = [t[begin:end].transpose(0, 1)[None] for t in (q, k, v)]
        wanted = F.linear_attention_reference(*part, feature_map=feature_map)[0].transpose(0, 1)
        torch.testing.assert_close(out[begin:end], wanted, atol=1e-12, rtol=1e-12)


def test_nan_stays_in_its_sequence(device: str) -> None:
    q, k, v = (normal((130, 2, 4), i, torch.float32).to(device) for i in range(3))
    cu = torch.tensor([0, 30, 100, 130], dtype=torch.int32, device=device)
    clean = F.linear_attention(q, k, v, causal=True, cu_seqlens=cu)
    k[50] = torch.nan
    dirty = F.linear_attention(q, k, v, causal=True, cu_seqlens=cu)
    assert torch.equal(clean[:50], dirty[:50])
    assert torch.equal(clean[100:], dirty[100:])
    assert dirty[50:100].isnan().all()


# --- decay --------------------------------------------------------------------------------------------------------


def test_decay_is_the_masked_matrix_of_its_powers(device: str) -> None:
    """Retention, parallel form: (Q K^T * D) V with D[i, j] = g^(i - j) for i >= j; float64."""
    q, k, v = (normal((2, 3, 150, 20), i).to(device) for i in range(3))
    g = 1 - 2.0 ** -torch.arange(5.0, 8.0, dtype=torch.float64, device=device)
    at = torch.arange(150.0, dtype=torch.float64, device=device)
    matrix = (g[:, None, None] ** (at[:, None] - at).clamp(min=0)).tril()
    out = F.linear_attention(q, k, v, causal=True, decay=g, feature_map="identity", normalize=False)
    torch.testing.assert_close(out, (q @ k.transpose(2, 3) * matrix) @ v, atol=1e-12, rtol=1e-12)
    scores = (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).transpose(2, 3) * matrix
    out = F.linear_attention(q, k, v, causal=True, decay=g)
    torch.testing.assert_close(out, scores @ v / (scores.sum(3, keepdim=True) + 1e-6), atol=1e-12, rtol=1e-12)


def test_decay_as_a_number_a_list_or_a_tensor(device: str) -> None:
    q, k, v = (normal((1, 3, 7, 4), i).to(device) for i in range(3))
    wanted = F.linear_attention(q, k, v, causal=True, decay=torch.full((3,), 0.75, device=device))
    for decay in (0.75, [0.75] * 3, torch.tensor(0.75, device=device), torch.full((3,), 0.75, dtype=torch.float64)):
        assert torch.equal(F.linear_attention(q, k, v, causal=True, decay=decay), wanted)
    whole = F.linear_attention(q, k, v, causal=True)
    torch.testing.assert_close(F.linear_attention(q, k, v, causal=True, decay=1), whole, atol=1e-14, rtol=1e-14)
    # Nothing but the key itself: its value.
    alone = F.linear_attention(q, k, v, causal=True, decay=0.0, eps=0)
    torch.testing.assert_close(alone, v, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decay_in_pieces_and_steps(device: str, dtype: torch.dtype) -> None:
    q, k, v = (normal((2, 3, 140, 9), i, dtype).to(device) for i in range(3))
    decay = torch.tensor([0.5, 0.95, 0.999], dtype=torch.float64, device=device)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    options = {"causal": True, "decay": decay, "return_state": True}
    whole, last = F.linear_attention(q, k, v, **options)
    first, state = F.linear_attention(*(t[:, :, :77] for t in (q, k, v)), **options)
    second, end = F.linear_attention(*(t[:, :, 77:] for t in (q, k, v)), initial_state=state, **options)
    torch.testing.assert_close(torch.cat([first, second], 2), whole, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(end, last, atol=tolerance, rtol=tolerance)
    state, step = None, F.linear_attention_step
    for i in range(140):
        step = F.linear_attention_step if i % 2 else F.linear_attention_step_reference
        out, state = step(q[:, :, i], k[:, :, i], v[:, :, i], state, decay=decay)
        torch.testing.assert_close(out, whole[:, :, i], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(state, last, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("decay", [None, 0.75])
@pytest.mark.parametrize("entry", implementations("linear_attention"))
def test_a_state_updated_in_place(entry: Implementation, decay: float | None) -> None:
    q, k, v = (normal((2, 3, 17), i, torch.float32).to(entry.device) for i in range(3))
    start = normal((2, 3, 17, 17), 3, torch.float32).to(entry.device), normal((2, 3, 17), 4, torch.float32).abs()
    start = start[0], start[1].to(entry.device)
    with entry.pinned():
        try:
            wanted, (state, z) = F.linear_attention_step(q, k, v, start, decay=decay)
        except RuntimeError as error:
            pytest.skip(str(error))
        mine = tuple(t.clone() for t in start)
        out, new = F.linear_attention_step(q, k, v, mine, decay=decay, in_place=True)
    assert torch.equal(out, wanted)
    assert new[0] is mine[0]
    assert new[1] is mine[1]
    assert torch.equal(new[0], state)
    assert torch.equal(new[1], z)
    first, made = F.linear_attention_step(q, k, v, in_place=True)  # nothing to update yet
    torch.testing.assert_close(first, F.linear_attention_step(q, k, v)[0])
    assert made[0].shape == state.shape
    with pytest.raises(ValueError, match="in_place"):
        F.linear_attention_step(q.requires_grad_(), k, v, start, in_place=True)
    with pytest.raises(ValueError, match="in_place"):
        F.linear_attention_step(q.detach(), k, v, (state.transpose(2, 3), z), in_place=True)


def test_opcheck_of_the_step_in_place(device: str) -> None:
    q, k, v = (normal((2, 3, 5), i, torch.float32).to(device) for i in range(3))
    state = normal((2, 3, 5, 5), 3, torch.float32).to(device), normal((2, 3, 5), 4, torch.float32).to(device)
    torch.library.opcheck(
        torch.ops.pyseqnet.linear_attention_step_,
        (q, k, v, *state, 1, True, 1.0, 1e-6),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_padding_does_not_fade_the_state(device: str) -> None:
    """A padded sequence leaves the state that the sequence alone leaves, for the next token to read."""
    q, k, v = (normal((2, 2, 90, 5), i).to(device) for i in range(3))
    lengths = torch.tensor([90, 40], device=device)
    _, (state, z) = F.linear_attention(q, k, v, causal=True, decay=0.8, key_lengths=lengths, return_state=True)
    alone = [t[1:, :, :40] for t in (q, k, v)]
    _, (wanted, wanted_z) = F.linear_attention(*alone, causal=True, decay=0.8, return_state=True)
    torch.testing.assert_close(state[1:], wanted, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(z[1:], wanted_z, atol=1e-13, rtol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [None, 0.99])
def test_a_stream_of_a_million_tokens_is_the_parallel_form(decay: float | None) -> None:
    """Token by token in float32: finite to the end, equal to the form that sees all at once, in constant memory."""
    length, kept = 1_000_000, 1000
    q, k, v = (normal((1, 1, length, 4), i, torch.float32) for i in range(3))
    decay = None if decay is None else torch.tensor([decay], dtype=torch.float64)
    with torch.no_grad():
        whole, last = F.linear_attention(q, k, v, causal=True, decay=decay, return_state=True)
        state, outs = None, []
        for i in range(length):
            out, state = F.linear_attention_step(q[:, :, i], k[:, :, i], v[:, :, i], state, decay=decay)
            if i % kept == kept - 1:
                outs.append(out)
    steps = torch.stack(outs, 2)
    assert steps.isfinite().all()
    exact = F.linear_attention(q.double(), k.double(), v.double(), causal=True, decay=decay)[:, :, kept - 1 :: kept]
    for found in (steps, whole[:, :, kept - 1 :: kept]):
        torch.testing.assert_close(found.double(), exact, atol=1e-3, rtol=1e-3)
    for a, b in zip(state, last, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3 * b.abs().max().item(), rtol=1e-3)


def test_layer_with_decay(device: str) -> None:
    decay = [0.5, 0.999999]
    layer = nn.LinearAttention(8, 2, causal=True, decay=decay, batch_first=True, dtype=torch.float64, device=device)
    assert "decay=[0.5, 0.999999]" in repr(layer)
    assert "decay" not in layer.state_dict()
    x = normal((2, 11, 8), 0).to(device)
    whole, state = layer(x), None
    plain = nn.LinearAttention(8, 2, causal=True, batch_first=True, dtype=torch.float64, device=device)
    plain.load_state_dict(layer.state_dict())
    assert not torch.allclose(plain(x), whole)
    for i in range(11):
        out, state = layer(x[:, i : i + 1], initial_state=state, return_state=True)
        torch.testing.assert_close(out, whole[:, i : i + 1])
    assert layer.bfloat16().decay.tolist() == decay
    with pytest.raises(ValueError, match="Parameter"):
        nn.LinearAttention(8, 2, decay=torch.ones(2).requires_grad_() * 0.5)


def test_a_decay_is_trained(device: str) -> None:
    """A layer finds the decays that made its targets; the step and a compiled call give the gradient too."""
    torch.manual_seed(0)
    options = {"causal": True, "batch_first": True, "normalize": False, "device": device}
    teacher = nn.LinearAttention(8, 2, decay=[0.3, 0.8], **options)
    wanted = torch.tensor([0.3, 0.8])
    pupil = nn.LinearAttention(8, 2, decay=torch.nn.Parameter(torch.tensor([0.5, 0.5], device=device)), **options)
    assert "decay" in dict(pupil.named_parameters())
    pupil.load_state_dict({**teacher.state_dict(), "decay": pupil.decay.detach()})
    optimizer = torch.optim.Adam([pupil.decay], 0.02)
    for _ in range(150):
        x = torch.randn(4, 70, 8, device=device)
        loss = torch.nn.functional.mse_loss(pupil(x), teacher(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(pupil.decay.detach().cpu(), wanted, atol=0.02, rtol=0)

    q, k, v = (normal((2, 3, 4), i).to(device) for i in range(3))
    g = torch.full((3,), 0.5, dtype=torch.float64, device=device, requires_grad=True)
    start = normal((2, 3, 4, 4), 3).to(device), normal((2, 3, 4), 4).abs().to(device)
    out, _ = F.linear_attention_step(q, k, v, start, decay=g)
    wanted_out = F.linear_attention_reference(
        *(t.unsqueeze(2) for t in (q, k, v)), causal=True, initial_state=start, decay=g
    )
    (found,), (expected,) = (torch.autograd.grad(t.sum(), g) for t in (out, wanted_out))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    q, k, v = (normal((2, 3, 70, 4), i, torch.float32).to(device) for i in range(3))

    def total(g: Tensor) -> Tensor:
        return F.linear_attention(q, k, v, causal=True, decay=g).square().sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    (found,), (expected,) = (torch.autograd.grad(f(g), g) for f in (compiled, total))
    assert torch.equal(found, expected)


def test_the_decay_of_a_long_sequence_has_an_exact_gradient(device: str) -> None:
    """Nothing is divided by the decay and no large sums cancel: at 0, at 1, and after 20 000 positions in float32."""
    q, k, v = (normal((1, 3, 20_000, 4), i, torch.float32).to(device) for i in range(3))
    gradients = []
    for dtype in (torch.float32, torch.float64):
        g = torch.tensor([0.0, 0.99, 1.0], dtype=torch.float64, device=device, requires_grad=True)
        out = F.linear_attention(*(t.to(dtype) for t in (q, k, v)), causal=True, decay=g)
        weight = normal(tuple(out.shape), 5).to(device, dtype)
        gradients.append(torch.autograd.grad(out, g, weight)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
