"""Linear attention: every kernel of the dispatch tables on random problems, then the definitions one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    DTYPES,
    Implementation,
    allowed_error,
    dtypes,
    error_of,
    forced,
    implementations,
    is_beyond_this_machine,
    is_refusal,
    largest,
    normal,
    poisoned_memory,
    seeds,
    threads,
    view_as,
)
from torch import Tensor

import pyseqnet.functional as F

EXAMPLES = 60
MAPS = ("identity", "elu", "relu", "exp")
VIEWS = ("contiguous", "rows first", "narrowed", "transposed", "offset", "step", "expanded")
ops = torch.ops.pyseqnet


def as_view(tensor: Tensor, kind: str) -> Tensor:
    """The same values, and for "rows first" the order (B, L, H, D) viewed as (B, H, L, D)."""
    if kind == "rows first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return view_as(tensor, kind)


@dataclass(frozen=True)
class Problem:
    B: int = 2
    H: int = 2
    L: int = 70
    S: int = 70
    D: int = 16
    E: int = 16
    feature_map: str = "elu"
    causal: bool = True
    normalize: bool = True
    lengths: bool = False
    state: bool = False
    decayed: bool = False
    dtype: torch.dtype = torch.float32
    view: str = "contiguous"
    gradient_view: str = "contiguous"
    seed: int = 0

    def inputs(self) -> list[Tensor]:
        """query, key, value [, S, z] in float64, exact in the dtype; positive where sums could cancel."""
        q, k, v = (
            normal(shape, self.seed + i, torch.float64)
            for i, shape in enumerate(
                ((self.B, self.H, self.L, self.D), (self.B, self.H, self.S, self.D), (self.B, self.H, self.S, self.E))
            )
        )
        if self.feature_map == "identity" and self.normalize:
            q, k = q.abs(), k.abs()
        found = [t.to(self.dtype) for t in (q, k, v)]
        if self.view == "expanded" and self.B:
            found = [t[:1].expand(t.shape) for t in found]
        found = [t.double() for t in found]
        if self.state:
            state = normal((self.B, self.H, self.D, self.E), self.seed + 3)
            found += [state.float().double(), normal((self.B, self.H, self.D), self.seed + 4).abs().float().double()]
        return found

    def key_lengths(self) -> Tensor | None:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, self.S + 1, (self.B,), generator=generator) if self.lengths else None

    def decay(self) -> Tensor | None:
        """One for each head, of every strength; that of the last head forgets nothing."""
        if not self.decayed:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        strengths = torch.tensor([0.0, 0.5, 0.9, 0.99, 0.999], dtype=torch.float64)
        return torch.cat([strengths[torch.randint(0, 5, (self.H,), generator=generator)], strengths.new_ones(1)])[1:]

    def options(self) -> dict:
        return {
            "feature_map": self.feature_map, "causal": self.causal, "normalize": self.normalize, "scale": 0.5,
            "eps": 1e-2, "decay": self.decay(),
        }  # fmt: skip


def weights(p: Problem, lengths: Tensor | None, decay: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """decay ** (i - j) for the keys that query i sees, (B, H, L, L), and decay ** (keys seen), (B, H, L, 1)."""
    at = torch.arange(p.L, dtype=torch.float64, device=device)
    seen = (at + 1).expand(p.B, -1) if lengths is None else torch.minimum(at + 1, lengths[:, None])
    seen = seen[:, None, :, None]
    decay = torch.ones(p.H, dtype=torch.float64, device=device) if decay is None else decay
    decay = decay[:, None, None]
    between = seen - 1 - at
    return torch.where(between >= 0, decay ** between.clamp(min=0), 0.0), decay**seen


def in_dtype(
    p: Problem, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, decay: Tensor | None, *state: Tensor
) -> tuple[Tensor, ...]:
    """What a user writes in torch, in the dtype of its inputs: the yardstick for rounding."""
    a, f = (
        {
            "identity": lambda x: x,
            "elu": lambda x: torch.nn.functional.elu(x) + 1,
            "relu": torch.relu,
            "exp": torch.exp,
        }[p.feature_map](x)
        for x in (q * 0.5, k)
    )
    if lengths is not None:
        f = f * (torch.arange(p.S, device=f.device) < lengths[:, None])[:, None, :, None]
    weight, first = weights(p, lengths, decay, q.device)
    counted = f * weight[:, :, -1].unsqueeze(3).to(q.dtype) if p.L and p.causal else f
    total, z = counted.transpose(2, 3) @ v, counted.sum(2)
    start, start_z = (x.to(q.dtype) for x in state) if state else (torch.zeros_like(total), torch.zeros_like(z))
    faded = first[:, :, -1:].to(q.dtype) if p.L and p.causal else 1
    total, z = total + start * faded, z + (start_z.unsqueeze(3) * faded).squeeze(3)
    if p.causal:
        scores, b = (a @ f.transpose(2, 3)) * weight.to(q.dtype), a * first.to(q.dtype)
        out, sums = scores @ v + b @ start, scores.sum(3, keepdim=True) + b @ start_z.unsqueeze(3)
    else:
        out, sums = a @ total, a @ z.unsqueeze(3)
    return (out / (sums + 1e-2) if p.normalize else out), total, z


def results(p: Problem, dtype: torch.dtype, device: str, function: str) -> list[Tensor]:
    """out, S, z and the gradients of everything, the decay's last, by "ours", "torch" or "reference"."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kinds = [dtype] * 3 + [wide] * 2
    inputs = [t.to(device, kind) for t, kind in zip(p.inputs(), kinds, strict=False)]
    viewed = [as_view(t, p.view) if i < 3 and t.numel() else t for i, t in enumerate(inputs)]
    leaves = [t.detach().requires_grad_() for t in viewed]
    states, options = leaves[3:], p.options()
    if p.decayed:
        leaves.append(options["decay"].to(device).requires_grad_())
        options["decay"] = leaves[-1]
    lengths = p.key_lengths()
    lengths = None if lengths is None else lengths.to(device)
    if function == "torch":
        out, state, z = in_dtype(p, *leaves[:3], lengths, options["decay"], *states)
    else:
        call = F.linear_attention if function == "ours" else F.linear_attention_reference
        start = tuple(states) if p.state else None
        out, (state, z) = call(*leaves[:3], key_lengths=lengths, initial_state=start, return_state=True, **options)
    shapes = [(p.B, p.H, p.L, p.E), (p.B, p.H, p.D, p.E), (p.B, p.H, p.D)]
    gradients = [normal(shape, p.seed + 10 + i).bfloat16() for i, shape in enumerate(shapes)]
    gradients[0] = as_view(gradients[0], p.gradient_view) if gradients[0].numel() else gradients[0]
    gradients = [g.to(device, t.dtype) for g, t in zip(gradients, (out, state, z), strict=True)]
    found = torch.autograd.grad([out, state, z], leaves, gradients, allow_unused=True)
    zeros = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
    return [out.detach(), state.detach(), z.detach(), *zeros]


NAMES = ("out", "S", "z", "query's gradient", "key's", "value's")


def check(entry: Implementation, p: Problem) -> bool:
    """Whether the kernel took the problem; fails if it took it and is wrong."""
    with entry.pinned(), poisoned_memory(), threads(2):
        try:
            ours = results(p, p.dtype, entry.device, "ours")
        except RuntimeError as error:
            if is_refusal(error) and not is_beyond_this_machine(error):
                return False
            if is_beyond_this_machine(error):
                pytest.skip(str(error))
            raise
    exact = results(p, torch.float64, "cpu", "reference")
    theirs = results(p, p.dtype, "cpu", "torch")
    # One key and one query: gradients of the query are what cancellation leaves of terms as large as these.
    magnitude = torch.stack([t.abs().max() for t in exact if t.numel()] + [torch.ones((), dtype=torch.float64)])
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    names = (*NAMES, *(("S0's", "z0's") if p.state else ()), *(("decay's",) if p.decayed else ()))
    for i, (name, a, b, c) in enumerate(zip(names, ours, exact, theirs, strict=True)):
        cancelling = magnitude * (8 if p.normalize and i >= 3 else 1)
        if name == "decay's":  # a sum over all rows, in the precision of the states
            assert a.dtype == torch.float64
            cancelling, c = cancelling * p.B * math.sqrt(p.L), c.to(wide)
            a = a.to(wide)
        bound = allowed_error(c.to(a.dtype), b, cancelling, 2 if i == 0 else 3)
        if p.dtype in (torch.bfloat16, torch.float16) and i >= 3:
            bound += 2 * torch.finfo(p.dtype).eps * largest(magnitude)
        assert error_of(a, b) <= bound, f"{name} of {p}: {error_of(a, b)} > {bound}"
        assert a.dtype == (p.dtype if i in (0, 3, 4, 5) else wide)
    return True


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    causal = draw(st.booleans())
    size = st.sampled_from((1, 2, 5, 16, 17, 24, 32, 33, 40, 64, 70))
    length = st.one_of(st.integers(1, 20), st.integers(60, 70), st.integers(120, 140))
    if draw(st.integers(0, 5)) == 0:
        length = st.integers(1000, 1200)  # long enough that few heads are cut into segments
        size = st.integers(1, 8)
    L = draw(length)
    return Problem(
        B=draw(st.integers(1, 2)),
        H=draw(st.integers(1, 3)),
        L=L,
        S=L if causal else draw(length),
        D=draw(size),
        E=draw(size),
        feature_map=draw(st.sampled_from(MAPS)),
        causal=causal,
        normalize=draw(st.booleans()),
        lengths=draw(st.booleans()),
        state=draw(st.booleans()),
        decayed=causal and draw(st.booleans()),
        dtype=draw(dtypes),
        view=draw(st.sampled_from(VIEWS)),
        gradient_view=draw(st.sampled_from(VIEWS)),
        seed=draw(seeds),
    )


@pytest.mark.parametrize("entry", implementations("linear_attention"))
def test_every_kernel_on_random_problems(entry: Implementation) -> None:
    accepted = 0

    @settings(max_examples=EXAMPLES)
    @given(problems())
    def on_random_problems(p: Problem) -> None:
        nonlocal accepted
        accepted += check(entry, p)

    on_random_problems()
    assert accepted >= EXAMPLES // 4, f"{entry.kernel} accepted only {accepted} of {EXAMPLES} problems"


CORNERS = {
    "one element": Problem(B=1, H=1, L=1, S=1, D=1, E=1),
    "one element, not causal": Problem(B=1, H=1, L=1, S=1, D=1, E=1, causal=False),
    "no batch": Problem(B=0),
    "no heads": Problem(H=0),
    "no rows": Problem(L=0, S=0, state=True),
    "no queries": Problem(L=0, causal=False),
    "no keys": Problem(S=0, causal=False, state=True),
    "a whole chunk": Problem(L=64, S=64, D=64, E=64),
    "a chunk and a row": Problem(L=65, S=65, D=64, E=64),
    "a wide head": Problem(B=1, H=1, L=80, S=80, D=256, E=256),
    "wider than any": Problem(B=1, H=1, L=40, S=40, D=300, E=5),
    "one head, long": Problem(B=1, H=1, L=1500, S=1500, D=8, E=8, lengths=True, state=True),
    "one head, long, not causal": Problem(B=1, H=1, L=1500, S=1600, D=8, E=8, causal=False, lengths=True, state=True),
    "one head, long, decayed": Problem(
        B=1, H=1, L=1500, S=1500, D=8, E=8, lengths=True, state=True, decayed=True, seed=2
    ),
    "decayed, no rows": Problem(L=0, S=0, state=True, decayed=True),
    "decayed, one row": Problem(L=1, S=1, state=True, decayed=True),
    "decayed, a chunk and a row": Problem(H=5, L=65, S=65, D=17, E=5, state=True, decayed=True),
    "many heads": Problem(B=5, H=13, L=9, S=9, D=4, E=4),
    "rows first": Problem(B=2, H=4, L=100, S=100, view="rows first", gradient_view="rows first"),
}


@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.parametrize("entry", implementations("linear_attention"))
def test_every_kernel_in_corner_cases(entry: Implementation, name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(entry, replace(CORNERS[name], dtype=dtype))


# --- golden numbers and identities ------------------------------------------------------------------------------

TOKENS = [[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_numbers_of_three_tokens(device: str, dtype: torch.dtype) -> None:
    """G6: elu + 1, and efficient attention."""
    x = torch.tensor(TOKENS, device=device, dtype=dtype).view(1, 1, 3, 2)
    tolerance = max(2e-6, 2 * torch.finfo(dtype).eps)
    for feature_map, wanted in (
        ("elu", [[0.687500, 1.000000], [0.565217, 1.217391], [0.636364, 1.090909]]),
        ("softmax", [[0.707510, 0.959537], [0.395538, 1.474821], [0.589698, 1.154127]]),
    ):
        out = F.linear_attention(x, x, x, feature_map=feature_map)
        torch.testing.assert_close(
            out[0, 0].double().cpu(), torch.tensor(wanted, dtype=torch.float64), atol=2 * tolerance, rtol=tolerance
        )


@pytest.mark.parametrize(
    ("n", "d", "e", "quadratic", "linear"),
    [
        (1024, 64, 64, 134_217_728, 8_388_608),
        (64, 64, 64, 524_288, 524_288),
        (32, 64, 64, 131_072, 262_144),
        (4096, 64, 128, 3_221_225_472, 67_108_864),
    ],
)
def test_multiplications(n: int, d: int, e: int, quadratic: int, linear: int) -> None:
    """G5: (d + d') N^2 against 2 d d' N; equal at N = 2 d d' / (d + d')."""
    assert (d + e) * n * n == quadratic
    assert 2 * d * e * n == linear
    assert ((d + e) * n * n >= 2 * d * e * n) == (n >= 2 * d * e / (d + e))


def test_identities_in_float64(device: str) -> None:
    """G10: the order of products does not matter, the scan is the masked matrix."""
    q, k, v = (normal((1, 1, 6, 4), i).to(device) for i in range(3))
    a, f = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    scores = a @ f.transpose(2, 3)
    whole = F.linear_attention(q, k, v, eps=0)
    torch.testing.assert_close(whole, scores / scores.sum(3, keepdim=True) @ v, atol=1e-14, rtol=1e-14)
    masked = scores.tril()
    causal = F.linear_attention(q, k, v, causal=True, eps=0)
    torch.testing.assert_close(causal, masked @ v / masked.sum(3, keepdim=True), atol=1e-14, rtol=1e-14)
    plain = F.linear_attention(q, k, v, feature_map="identity", normalize=False)
    torch.testing.assert_close(plain, (q @ k.transpose(2, 3)) @ v, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
def test_equals_masked_attention_without_softmax(device: str, causal: bool) -> None:
    q, k, v = (normal((2, 3, 150, 20), i).to(device) for i in range(3))
    lengths = torch.tensor([150, 97], device=device)
    out = F.linear_attention(q, k, v, causal=causal, key_lengths=lengths)
    scores = (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).transpose(2, 3)
    visible = (torch.arange(150, device=device) < lengths[:, None])[:, None, None]
    scores = scores * visible
    scores = scores.tril() if causal else scores
    wanted = scores @ v / (scores.sum(3, keepdim=True) + 1e-6)
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=1e-12)


def test_memory_is_linear_in_the_length() -> None:
    """What training keeps: twice the length, twice the bytes."""

    def kept(length: int) -> int:
        total = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal total
            total += t.numel() * t.element_size()
            return t

        x = torch.randn(1, 1, length, 16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            F.linear_attention(x, x, x, causal=True)
        return total

    assert kept(4096) == 2 * kept(2048)


# --- states -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("feature_map", MAPS)
def test_pieces_give_what_the_whole_gives(device: str, feature_map: str, dtype: torch.dtype) -> None:
    q, k, v = (normal((2, 2, 200, 12), i, dtype).abs().to(device) for i in range(3))
    options = {"causal": True, "feature_map": feature_map}
    whole, (last, last_z) = F.linear_attention(q, k, v, return_state=True, **options)
    state, outs = None, []
    for begin, end in ((0, 1), (1, 64), (64, 130), (130, 131), (131, 131), (131, 200)):
        piece = [t[:, :, begin:end] for t in (q, k, v)]
        out, state = F.linear_attention(*piece, initial_state=state, return_state=True, **options)
        outs.append(out)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(torch.cat(outs, 2), whole, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(state[0], last, atol=min(tolerance, 1e-4), rtol=min(tolerance, 1e-5))
    torch.testing.assert_close(state[1], last_z, atol=min(tolerance, 1e-4), rtol=min(tolerance, 1e-5))


def test_gradients_through_pieces_are_those_of_the_whole(device: str) -> None:
    q, k, v = (normal((1, 2, 90, 6), i).to(device).requires_grad_() for i in range(3))
    g = normal((1, 2, 90, 6), 9).to(device)
    whole = torch.autograd.grad(F.linear_attention(q, k, v, causal=True), (q, k, v), g)
    first, state = F.linear_attention(q[:, :, :40], k[:, :, :40], v[:, :, :40], causal=True, return_state=True)
    second = F.linear_attention(q[:, :, 40:], k[:, :, 40:], v[:, :, 40:], causal=True, initial_state=state)
    pieces = torch.autograd.grad(torch.cat([first, second], 2), (q, k, v), g)
    for a, b in zip(pieces, whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
def test_steps_give_what_the_whole_gives(device: str, dtype: torch.dtype, normalize: bool) -> None:
    q, k, v = (normal((2, 3, 20, 17), i, dtype).to(device) for i in range(3))
    whole, (last, last_z) = F.linear_attention(q, k, v, causal=True, normalize=normalize, return_state=True)
    state = None
    tolerance = max(1e-5, 2 * torch.finfo(dtype).eps) if dtype != torch.float64 else 1e-12
    for i in range(20):
        before = state and tuple(t.clone() for t in state)
        out, new = F.linear_attention_step(q[:, :, i], k[:, :, i], v[:, :, i], state, normalize=normalize)
        torch.testing.assert_close(out, whole[:, :, i], atol=4 * tolerance, rtol=tolerance)
        if before:
            assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True)), "the old state was changed"
        state = new
    torch.testing.assert_close(state[0], last, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(state[1], last_z, atol=1e-4, rtol=1e-5)


def test_a_state_without_rows_passes_through(device: str) -> None:
    empty = torch.zeros(1, 2, 0, 3, device=device)
    start = normal((1, 2, 3, 3), 0, torch.float32).to(device), normal((1, 2, 3), 1, torch.float32).to(device)
    for causal in (False, True):
        out, (state, z) = F.linear_attention(empty, empty, empty, causal=causal, initial_state=start, return_state=True)
        assert out.shape == (1, 2, 0, 3)
        assert torch.equal(state, start[0])
        assert torch.equal(z, start[1])


# --- padding and empty sums -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("feature_map", [*MAPS, "softmax"])
def test_padding_never_reaches_results_or_gradients(
    device: str, feature_map: str, poison: float, dtype: torch.dtype
) -> None:
    lengths = torch.tensor([0, 3, 70], device=device)
    beyond = (torch.arange(70, device=device) >= lengths[:, None])[:, None, :, None]
    base = [normal((3, 2, 70, 5), i, dtype).abs().to(device) for i in range(3)]
    g = normal((3, 2, 70, 5), 7, dtype).to(device).masked_fill(beyond, 0)

    def run(value: float, causal: bool) -> list[Tensor]:
        q, k, v = (t.masked_fill(beyond, value).requires_grad_() for t in base)
        out = F.linear_attention(q, k, v, feature_map=feature_map, causal=causal, key_lengths=lengths)
        gradients = torch.autograd.grad(out, (q, k, v), g)
        # a padded query's own output and gradient may be anything where it holds anything
        results = [out.detach().masked_fill(beyond, 0), *gradients]
        if feature_map == "softmax":
            results[1] = results[1].masked_fill(beyond, 0)
        return results

    for causal in (False,) if feature_map == "softmax" else (False, True):
        clean, dirty = run(0.0, causal), run(poison, causal)
        for name, a, b in zip(("out", "dq", "dk", "dv"), clean, dirty, strict=True):
            assert torch.equal(a, b), f"{name}, causal={causal}"
        assert clean[2].masked_fill(~beyond, 0).count_nonzero() == 0
        assert clean[3].masked_fill(~beyond, 0).count_nonzero() == 0


def test_padding_does_not_reach_the_parameters_of_a_feature_map(device: str) -> None:
    layer = torch.nn.Linear(4, 6, dtype=torch.float64, device=device)
    k = normal((1, 1, 5, 4), 1).to(device)
    k[:, :, 3:] = math.nan
    q, v = normal((1, 1, 5, 4), 0).to(device), normal((1, 1, 5, 4), 2).to(device)
    lengths = torch.tensor([3], device=device)
    out = F.linear_attention(q, k, v, feature_map=lambda x: layer(x).exp(), key_lengths=lengths)
    out.sum().backward()
    assert out.isfinite().all()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_rows_whose_sum_is_zero(device: str, eps: float, dtype: torch.dtype) -> None:
    """relu features that are all zero, or no keys: zeros out, finite gradients."""
    q, k, v = (normal((2, 1, 6, 4), i, dtype).to(device) for i in range(3))
    q[:, :, 2] = -1  # relu: nothing
    lengths = torch.tensor([6, 0], device=device)
    for causal in (False, True):
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        out = F.linear_attention(*leaves, feature_map="relu", causal=causal, key_lengths=lengths, eps=eps)
        assert out[0, :, 2].count_nonzero() == 0
        assert out[1].count_nonzero() == 0
        gradients = torch.autograd.grad(out.sum(), leaves)
        for gradient in gradients:
            assert gradient[1].count_nonzero() == 0
        assert gradients[0][0, :, 2].count_nonzero() == 0
        if eps == 0:
            assert all(g.isfinite().all() for g in gradients)
            assert all((g == 0).all() or g.isfinite().all() for g in gradients)


def test_nan_in_a_real_row_is_not_hidden(device: str) -> None:
    q, k, v = (normal((1, 1, 5, 20), i, torch.float32).to(device) for i in range(3))
    k[0, 0, 2, 1] = math.nan
    for feature_map in MAPS:
        out = F.linear_attention(q, k, v, causal=True, feature_map=feature_map)
        assert out[:, :, :2].isfinite().all()
        assert out[:, :, 2:].isnan().all()


# --- feature maps -----------------------------------------------------------------------------------------------


def test_a_callable_is_applied_to_queries_and_keys(device: str) -> None:
    q, k, v = (normal((1, 2, 7, 4), i).to(device).requires_grad_() for i in range(3))

    def elu(x: Tensor) -> Tensor:
        return torch.nn.functional.elu(x) + 1

    for options in ({}, {"causal": True}, {"scale": 0.3}, {"normalize": False}):
        torch.testing.assert_close(
            F.linear_attention(q, k, v, feature_map=elu, **options), F.linear_attention(q, k, v, **options)
        )

    def wider(x: Tensor) -> Tensor:
        return torch.cat([x.relu(), (-x).relu()], -1)

    out, (state, z) = F.linear_attention(q, k, v, feature_map=wider, return_state=True)
    assert state.shape == (1, 2, 8, 4)
    assert z.shape == (1, 2, 8)
    assert torch.autograd.grad(out.sum(), (q, k, v))[0].isfinite().all()


def test_efficient_attention_is_its_formula(device: str) -> None:
    """Shen et al.: softmax of queries over features, of keys over positions; no denominator."""
    q, k, v = (normal((2, 2, 9, 5), i).to(device).requires_grad_() for i in range(3))
    lengths = torch.tensor([9, 4], device=device)
    beyond = (torch.arange(9, device=device) >= lengths[:, None])[:, None, :, None]
    keys = k.masked_fill(beyond, -math.inf).softmax(2)
    wanted = (q * 0.7).softmax(3) @ (keys.transpose(2, 3) @ v)
    out = F.linear_attention(q, k, v, feature_map="softmax", key_lengths=lengths, scale=0.7)
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=1e-12)
    g = normal(tuple(out.shape), 5).to(device)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), g), torch.autograd.grad(wanted, (q, k, v), g), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    # The rows of the implied matrix sum to one, which is why nothing is divided.
    ones = torch.ones_like(v)
    torch.testing.assert_close(F.linear_attention(q, k, ones, feature_map="softmax"), ones, atol=1e-12, rtol=1e-12)


def test_extreme_arguments_of_the_exponential(device: str) -> None:
    q = torch.tensor([[[[-1e4, -100.0, 0.0, 100.0, 1e4]]]], device=device)
    out, (_, z) = F.linear_attention(q, q, torch.ones_like(q), return_state=True)
    assert out.isfinite().all()
    wanted = torch.tensor([[[0.0, 0.0, 1.0, 101.0, 10001.0]]], device=device)
    torch.testing.assert_close(z, wanted, atol=1e-30, rtol=1e-6)


# --- refusals ---------------------------------------------------------------------------------------------------

X = torch.zeros(2, 3, 4, 5)
STATE = (torch.zeros(2, 3, 5, 5), torch.zeros(2, 3, 5))
STARTS = torch.tensor([0, 1, 4])
REFUSED = {
    "decay of all keys": (ValueError, "causal", (X, X, X), {"decay": 0.9}),
    "decay above one": (ValueError, "between 0 and 1, got 1.5", (X, X, X), {"decay": 1.5, "causal": True}),
    "decay below zero": (ValueError, "between 0 and 1", (X, X, X), {"decay": torch.full((3,), -1.0), "causal": True}),
    "decay of nan": (ValueError, "between 0 and 1", (X, X, X), {"decay": [0.5, math.nan, 0.5], "causal": True}),
    "decay's heads": (ValueError, r"shape \(3,\), got \(2,\)", (X, X, X), {"decay": [0.5, 0.5], "causal": True}),
    "decay's dtype": (TypeError, "floating", (X, X, X), {"decay": torch.ones(3, dtype=torch.int64), "causal": True}),
    "decay's type": (TypeError, "str", (X, X, X), {"decay": "0.5", "causal": True}),
    "starts and lengths": (ValueError, "give one", (X, X, X), {"cu_seqlens": STARTS, "key_lengths": STARTS}),
    "starts of a batch": (ValueError, "packed", (X, X, X), {"cu_seqlens": STARTS}),
    "starts of float": (TypeError, "float32", (X[:1], X[:1], X[:1]), {"cu_seqlens": STARTS.float()}),
    "starts as a list": (TypeError, "list", (X[:1], X[:1], X[:1]), {"cu_seqlens": [0, 4]}),
    "starts of no dimension": (ValueError, "sequences", (X[:1], X[:1], X[:1]), {"cu_seqlens": STARTS[0]}),
    "starts beyond": (ValueError, "rise", (X[:1], X[:1], X[:1]), {"cu_seqlens": STARTS + 1}),
    "starts too few": (ValueError, "rise", (X[:1], X[:1], X[:1]), {"cu_seqlens": STARTS[:-1]}),
    "starts that fall": (ValueError, "rise", (X[:1], X[:1], X[:1]), {"cu_seqlens": torch.tensor([0, 3, 1, 4])}),
    "no starts": (ValueError, "rise", (X[:1], X[:1], X[:1]), {"cu_seqlens": STARTS[:1]}),
    "packed lengths that differ": (ValueError, "packed", (X[:1], X[:1, :, :3], X[:1, :, :3]), {"cu_seqlens": STARTS}),
    "unknown map": (ValueError, "feature_map", (X, X, X), {"feature_map": "cos"}),
    "no map": (ValueError, "feature_map", (X, X, X), {"feature_map": None}),
    "softmax causal": (ValueError, "causal", (X, X, X), {"feature_map": "softmax", "causal": True}),
    "softmax normalised": (ValueError, "normalize", (X, X, X), {"feature_map": "softmax", "normalize": True}),
    "softmax with a state": (ValueError, "state", (X, X, X), {"feature_map": "softmax", "initial_state": STATE}),
    "softmax's state": (ValueError, "state", (X, X, X), {"feature_map": "softmax", "return_state": True}),
    "three dimensions": (ValueError, r"\(3, 4, 5\)", (X[0], X[0], X[0]), {}),
    "other batch": (ValueError, r"\(1, 3, 4, 5\)", (X, X[:1], X), {}),
    "other features": (ValueError, "features", (X, X[..., :4], X), {}),
    "other length": (ValueError, r"\(2, 3, 3, 5\)", (X, X, X[:, :, :3]), {}),
    "causal across": (ValueError, "L=4, S=3", (X, X[:, :, :3], X[:, :, :3]), {"causal": True}),
    "no features": (ValueError, "positive", (X[..., :0], X[..., :0], X), {}),
    "integers": (TypeError, "int32", (X.int(), X.int(), X.int()), {}),
    "mixed dtypes": (TypeError, "float64", (X, X, X.double()), {}),
    "not a tensor": (TypeError, "list", (X, X, [1.0]), {}),
    "lengths too many": (ValueError, r"\(2,\)", (X, X, X), {"key_lengths": torch.tensor([1, 2, 3])}),
    "lengths of float": (TypeError, "key_lengths", (X, X, X), {"key_lengths": torch.tensor([1.0, 2.0])}),
    "lengths as a list": (TypeError, "key_lengths", (X, X, X), {"key_lengths": [1, 2]}),
    "length beyond": (ValueError, "between 0 and S", (X, X, X), {"key_lengths": torch.tensor([1, 5])}),
    "length negative": (ValueError, "between 0 and S", (X, X, X), {"key_lengths": torch.tensor([-1, 4])}),
    "half a state": (TypeError, "initial_state", (X, X, X), {"initial_state": STATE[:1]}),
    "a state of None": (TypeError, "initial_state", (X, X, X), {"initial_state": (STATE[0], None)}),
    "state's shape": (ValueError, r"\(2, 3, 5, 4\)", (X, X, X), {"initial_state": (STATE[0][..., :4], STATE[1])}),
    "state's dtype": (ValueError, "float64", (X, X, X), {"initial_state": (STATE[0].double(), STATE[1])}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_argument(case: str) -> None:
    kind, words, tensors, options = REFUSED[case]
    with pytest.raises(kind, match=words) as caught:
        F.linear_attention(*tensors, **options)
    assert ".cpp" not in str(caught.value)


def test_step_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"value must be \(B, H, E\)"):
        F.linear_attention_step(X[:, :, 0], X[:, :, 0], X)


def test_step_refusals_name_what_came() -> None:
    x, state = X[:, :, 0], (STATE[0], STATE[1])
    for tensors, kind, words in (
        ((x, x[:1], x, state), ValueError, r"\(1, 3, 1, 5\)"),
        ((x, x, x.double(), state), TypeError, "float64"),
        ((x, x, x, (STATE[0][..., :4], STATE[1])), ValueError, r"\(2, 3, 5, 4\)"),
        ((x, x, x, (STATE[0].double(), STATE[1])), ValueError, "float64"),
        ((x, x, x, STATE[:1]), TypeError, "initial_state"),
        ((x, x, [1.0], state), TypeError, "list"),
    ):
        with pytest.raises(kind, match=words):
            F.linear_attention_step(*tensors)
    raw = ops.linear_attention_step
    for arguments in ((x, x, X), (X, X, X), (x, x[..., :2], x), (x, x, x.half()), (x[..., :0], x[..., :0], x)):
        with pytest.raises((ValueError, RuntimeError)):
            raw(*arguments, None, None, 1, True, 1.0, 1e-6)
    with pytest.raises((ValueError, RuntimeError)):
        raw(x, x, x, STATE[0], None, 1, True, 1.0, 1e-6)
    with pytest.raises((ValueError, RuntimeError)):
        raw(x, x, x, None, None, 9, True, 1.0, 1e-6)


def test_hostile_arguments_to_the_raw_operations_raise() -> None:
    forward, backward = ops.linear_attention_forward, ops.linear_attention_backward
    good = (X, X, X, None, None, None, 1, True, True, 1.0, 1e-6, False, True)
    out, inverse, saved, _, _ = forward(*good)

    def broken(at: int, value: object) -> tuple:
        return (*good[:at], value, *good[at + 1 :])

    for at, value in (
        (0, X[0]), (0, X.int()), (0, X.double()), (1, X[:, :2]), (2, X[:, :, :3]), (2, X.bfloat16()), (6, 4), (6, -1),
        (3, torch.tensor([1, 2, 3])), (3, torch.tensor([1, 2], dtype=torch.int32)), (3, torch.tensor([1, 2**60])),
        (4, STATE[0]), (5, STATE[1]), (0, X.expand(2, 3, 4, 5)[:, :, :, :0]),
    ):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError, TypeError)):
            forward(*broken(at, value))
    half, starts = torch.full((3,), 0.5, dtype=torch.float64), torch.tensor([0, 4], dtype=torch.int32)
    for decay in (half.float(), half[:2], half[None], half + 1, half * torch.nan):
        with pytest.raises((ValueError, RuntimeError, TypeError)):
            forward(*good, decay)
    packed = tuple(t[:1] if isinstance(t, Tensor) else t for t in good)
    kept = forward(*packed, half, starts)
    for arguments, wrong in ((good, starts), *((packed, t) for t in (starts.long(), starts[:0], starts + 1, -starts))):
        with pytest.raises((ValueError, RuntimeError, TypeError)):
            forward(*arguments, None, wrong)
    with pytest.raises((ValueError, RuntimeError, TypeError)):  # kept for other sequences
        backward(kept[0], None, None, *packed[:3], None, *kept[:3], 1, True, True, 1.0, False, half,
                 torch.tensor([0, 2, 2, 4], dtype=torch.int32))  # fmt: skip
    arguments = (out, None, None, X, X, X, None, out, inverse, saved, 1, True, True, 1.0, True)
    backward(*arguments)
    for at, value in (
        (0, out[:1]), (0, out.double()), (7, out[..., :2]), (8, inverse[:1]), (8, inverse.double()),
        (9, saved[:, :, :3]), (9, saved.double()), (9, saved.transpose(0, 1)), (1, STATE[0][:1]),
        (2, STATE[1].double()), (10, 7),
    ):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError, TypeError)):
            backward(*arguments[:at], value, *arguments[at + 1 :])


def test_a_pinned_kernel_that_refuses_says_why() -> None:
    x = X.double()
    with forced("linear_attention_forward", "portable"), pytest.raises(RuntimeError, match="float64 is served by"):
        F.linear_attention(x, x, x)
