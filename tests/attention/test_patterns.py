"""Attention patterns as data: what they say, how they are compiled, and that a kernel given one does what the dense
mask does."""

from __future__ import annotations

import itertools
import pickle
import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DEVICES, normal
from torch import Tensor

import pyseqnet.functional as F
import pyseqnet.masks as M
from pyseqnet._pattern import And, Or, compiled_of_equals
from pyseqnet.functional._attention_reference import dense_pattern

sdpa = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- what patterns say --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        (M.Local(1), 22), (M.Local(2), 34), (M.Strided(2), 32), (M.Strided(3), 22), (M.Strided(3, 3), 18),
        (M.Global(2), 28), (M.Local(1) | M.Global(2), 44), (M.Causal(), 36), (M.Causal() & M.Local(1), 15),
        (M.Global([0, 1]), 28), (M.Strided(1), 64), (M.Strided(1, 1), 22),
    ],
)  # fmt: skip
def test_golden_counts(pattern: M.Pattern, count: int) -> None:
    """G12: pairs among 8 queries and 8 keys."""
    assert pattern.to_dense(8, 8).sum().item() == count
    assert dense_pattern(pattern.compile(8, 8), 8, 8).sum().item() == count


def by_hand(pattern: M.Pattern, i: int, j: int, length: int, keys: int) -> bool:
    if isinstance(pattern, And):
        return by_hand(pattern.left, i, j, length, keys) and by_hand(pattern.right, i, j, length, keys)
    if isinstance(pattern, Or):
        return by_hand(pattern.left, i, j, length, keys) or by_hand(pattern.right, i, j, length, keys)
    at = i + (keys - length if getattr(pattern, "align", "") == "bottom_right" else 0)
    if isinstance(pattern, M.Causal):
        return j <= at
    if isinstance(pattern, M.Local):
        return -pattern.left <= j - at <= pattern.right
    if isinstance(pattern, M.Strided):
        return (at - j) % pattern.stride == 0 and (pattern.window is None or abs(at - j) <= pattern.window)
    if isinstance(pattern, M.Global):
        tokens = range(pattern.tokens) if isinstance(pattern.tokens, int) else pattern.tokens
        return i in tokens or j in tokens
    assert isinstance(pattern, M.Blocks)
    return bool(pattern.layout[i // pattern.block, j // pattern.block])


alignments = st.sampled_from(("top_left", "bottom_right"))
leaves = st.one_of(
    st.builds(M.Causal, alignments),
    st.builds(M.Local, st.integers(0, 80), st.one_of(st.none(), st.integers(0, 80)), alignments),
    st.builds(M.Strided, st.integers(1, 70), st.one_of(st.none(), st.integers(0, 150)), alignments),
    st.builds(M.Global, st.one_of(st.integers(0, 70), st.lists(st.integers(0, 150), max_size=3))),
    st.builds(
        lambda seed, block: M.Blocks(torch.rand(13, 13, generator=torch.Generator().manual_seed(seed)) > 0.6, block),
        st.integers(0, 99), st.integers(11, 70),
    ),
)  # fmt: skip
patterns = st.recursive(
    leaves, lambda inner: st.tuples(inner, inner, st.booleans()).map(lambda t: t[0] & t[1] if t[2] else t[0] | t[1]),
    max_leaves=4,
)  # fmt: skip
extents = st.one_of(st.integers(1, 140), st.sampled_from((63, 64, 65, 127, 128, 129)))


@settings(max_examples=60)
@given(patterns, extents, extents)
def test_dense_and_compiled_say_the_same(pattern: M.Pattern, length: int, keys: int) -> None:
    dense = pattern.to_dense(length, keys)
    assert torch.equal(dense_pattern(pattern.compile(length, keys), length, keys)[0], dense)
    generator = torch.Generator().manual_seed(length)
    for _ in range(30):
        i, j = (int(torch.randint(0, n, (1,), generator=generator)) for n in (length, keys))
        assert dense[i, j].item() == by_hand(pattern, i, j, length, keys), (i, j)


def check_lists(pattern: M.Pattern, length: int, keys: int, heads: int = 1) -> None:
    """The promises of attention_blocks.h."""
    row_begin, row_entries, column_begin, column_entries, row_order, column_order, bits = pattern.compile(
        length, keys, heads=heads
    )
    rows, columns = -(-length // 64), -(-keys // 64)
    per = 1 if pattern.heads is None else heads
    assert row_begin.shape == (per * rows + 1,)
    assert column_begin.shape == (per * columns + 1,)

    def listed(begin: Tensor, entries: Tensor) -> dict[tuple[int, int], int]:
        found = {}
        for owner, (a, b) in enumerate(itertools.pairwise(begin.tolist())):
            tiles = entries[a:b, 0].tolist()
            assert tiles == sorted(set(tiles))
            found.update({(owner, t): k for t, k in entries[a:b].tolist()})
        return found

    by_row, by_column = listed(row_begin, row_entries), listed(column_begin, column_entries)
    assert by_column == {
        (r // rows * columns + c, r % rows): kind for (r, c), kind in by_row.items()
    }  # the same tiles, transposed
    for order, begin in ((row_order, row_begin), (column_order, column_begin)):
        counts = begin.diff()[order.long()]
        assert sorted(order.tolist()) == list(range(order.numel()))
        assert (counts[:-1] >= counts[1:]).all()
    assert not (bits == 0).all(1).any()
    assert torch.unique(bits, dim=0).shape == bits.shape
    kinds = set(by_row.values()) - {-1}
    assert kinds == set(range(bits.shape[0]))


def test_lists_keep_their_promises() -> None:
    mixed = M.per_head([M.Local(3), M.Causal(), M.Local(3), M.Global(1)])
    for pattern, heads in ((M.Local(64), 1), (M.Strided(5, 70) | M.Global(2), 1), (mixed, 4), (M.Local(5) & mixed, 4)):
        check_lists(pattern, 200, 300, heads)
        check_lists(pattern, 64, 128, heads)
    # A window of whole tiles: three a row, of which the middle one is full, and the two others are all alike.
    row_begin, row_entries, *_, bits = M.Local(64).compile(64 * 20, 64 * 20)
    assert row_begin.diff().tolist() == [2, *[3] * 18, 2]
    assert (row_entries[:, 1] == -1).sum().item() == 20
    assert bits.shape[0] == 2
    assert M.Strided(1).compile(200, 200)[-1].shape[0] == 0  # full at ragged edges too


def test_structured_patterns_never_exist_at_full_size() -> None:
    """65536 x 65536 pairs would be 4 GB."""
    tracemalloc.start()
    entries = (M.Local(64) | M.Global(1)).compile(1 << 16, 1 << 16)[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # three tiles a row, two at the ends; the first row and column, where the window was not yet
    assert entries.shape[0] == (3 * 1024 - 2) + 2 * (1024 - 2)
    assert peak < 100e6


def test_what_was_compiled_is_kept() -> None:
    pattern = M.Local(7)
    first = pattern.compile(100, 100)
    assert pattern.compile(100, 100)[0] is first[0]
    assert M.Local(7).compile(100, 100)[0] is first[0]  # an equal one
    assert M.Local(8).compile(100, 100)[0] is not first[0]
    for n in range(1, 30):
        pattern.compile(n, n)
    assert len(pattern._compiled) <= 8
    mask = M.Dense(torch.ones(5, 5, dtype=torch.bool))
    mask.compile(5, 5)
    assert all(token != mask._token for token, _ in compiled_of_equals)  # large ones live as long as their pattern


EVERY_KIND = [
    M.Causal(), M.Causal("bottom_right"), M.Local(3), M.Local(3, 0), M.Strided(2), M.Strided(2, 8), M.Global(2),
    M.Global([5, 1]), M.Blocks(torch.eye(3, dtype=torch.bool), 4), M.Dense(torch.eye(9, dtype=torch.bool)),
    M.Edges(torch.tensor([[0, 1], [1, 2]]), 9), M.Local(1) | M.Global(1), M.Local(1) & M.Causal(),
    M.per_head([M.Local(1), M.Causal()]),
]  # fmt: skip


def test_patterns_are_values() -> None:
    assert len(set(EVERY_KIND)) == len(EVERY_KIND)
    for n, pattern in enumerate(EVERY_KIND):
        pattern.compile(9, 9, heads=2)
        again = pickle.loads(pickle.dumps(pattern))
        assert again == pattern
        assert hash(again) == hash(pattern)
        assert torch.equal(again.to_dense(9, 9), pattern.to_dense(9, 9))
        assert all(other != pattern for m, other in enumerate(EVERY_KIND) if m != n)
        assert type(pattern).__name__.strip("_").lower() in repr(pattern).lower().replace("per_head", "perhead") or (
            "&" in repr(pattern) or "|" in repr(pattern)
        )
    mask = torch.ones(4, 4, dtype=torch.bool)
    pattern = M.Dense(mask)
    mask[:] = False
    assert pattern.to_dense(4, 4).all()


def test_edges() -> None:
    """D29: row 0 is the key (source), row 1 the query (target)."""
    edges = torch.tensor([[0, 0, 130, 7, 7], [1, 2, 5, 140, 140]])
    dense = torch.zeros(150, 150, dtype=torch.bool)
    dense[edges[1], edges[0]] = True
    pattern = M.Edges(edges, 150)
    assert torch.equal(pattern.to_dense(150, 150), dense)
    assert torch.equal(dense_pattern(pattern.compile(150, 150), 150, 150)[0], dense)
    assert M.Edges(edges[:, :0], 150).to_dense(150, 150).sum() == 0
    assert M.Edges(torch.tensor([[3], [1]]), (4, 2)).to_dense(2, 4)[1, 3]


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "negative window": (lambda: M.Local(-1), ValueError, "left.*-1"),
    "window type": (lambda: M.Local(1.5), TypeError, "left.*float"),
    "window bool": (lambda: M.Local(3, True), TypeError, "right.*bool"),
    "align": (lambda: M.Causal("left"), ValueError, "align.*left"),
    "stride": (lambda: M.Strided(0), ValueError, "stride.*0"),
    "tokens": (lambda: M.Global([-1]), ValueError, "tokens.*-1"),
    "layout type": (lambda: M.Blocks(torch.ones(2, 2), 4), TypeError, "layout.*bool"),
    "layout shape": (lambda: M.Blocks(torch.ones(2, dtype=torch.bool), 4), ValueError, "layout"),
    "layout reach": (lambda: M.Blocks(torch.ones(2, 2, dtype=torch.bool), 4).compile(9, 8), ValueError, "layout.*9"),
    "mask type": (lambda: M.Dense([[True]]), TypeError, "mask.*list"),
    "mask extents": (lambda: M.Dense(torch.ones(2, 3, dtype=torch.bool)).to_dense(3, 3), ValueError, "mask.*2.*3"),
    "edges dtype": (lambda: M.Edges(torch.ones(2, 3), 4), TypeError, "edge_index.*float32"),
    "edges shape": (lambda: M.Edges(torch.ones(3, 2).long(), 4), ValueError, "edge_index"),
    "edges range": (lambda: M.Edges(torch.tensor([[4], [0]]), 4), ValueError, "edge_index.*3"),
    "edges extents": (lambda: M.Edges(torch.tensor([[0], [0]]), 4).compile(5, 4), ValueError, "edge_index.*5"),
    "no heads": (lambda: M.per_head([]), ValueError, "patterns"),
    "heads type": (lambda: M.per_head([3]), TypeError, r"patterns\[0\].*int"),
    "nested heads": (lambda: M.per_head([M.per_head([M.Causal()])]), ValueError, r"patterns\[0\]"),
    "heads": (lambda: M.per_head([M.Causal()]) & M.per_head([M.Causal()] * 2), ValueError, "1 and 2 heads"),
    "combined with": (lambda: M.Causal() & 3, TypeError, "unsupported operand"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_name_the_argument(name: str) -> None:
    call, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        call()


# --- attention under a pattern ------------------------------------------------------------------------------------


def inputs_of(device: str, heads: int = 2, length: int = 150, keys: int = 150, width: int = 16) -> list[Tensor]:
    shapes = ((2, heads, length, width), (2, heads, keys, width), (2, heads, keys, width))
    return [normal(s, n, torch.float32).to(device).requires_grad_() for n, s in enumerate(shapes)]


ATTENDED = {
    "local": M.Local(9),
    "wide local": M.Local(70, 3, align="bottom_right"),
    "strided": M.Strided(4, 40) | M.Local(2),
    "global": M.Global(2),
    "per head": M.per_head([M.Local(5), M.Strided(3)]),
    "blocks": M.Blocks(torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 0]], dtype=torch.bool), 50),
    "some rows see nothing": M.Dense(torch.rand(150, 150, generator=torch.Generator().manual_seed(3)) > 0.99),
    "causal within": M.Causal() & M.Local(20),
}


@pytest.mark.parametrize("name", ATTENDED)
def test_a_pattern_is_its_dense_mask(device: str, name: str) -> None:
    pattern = ATTENDED[name]
    inputs = inputs_of(device)
    dense = pattern.to_dense(150, 150, device)
    ours = F.scaled_dot_product_attention(*inputs, pattern=pattern, return_weights=True, return_lse=True)
    theirs = F.scaled_dot_product_attention_reference(*inputs, dense, return_weights=True, return_lse=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    sees = dense.any(-1).expand(2, 2, 150)
    assert torch.equal(ours[2].isinf(), ~sees)
    weight = normal(ours[0].shape, 9, torch.float32).to(device)
    for a, b in zip(
        torch.autograd.grad((ours[0] * weight).sum(), inputs), torch.autograd.grad((theirs[0] * weight).sum(), inputs),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_pattern_beside_everything_else(device: str) -> None:
    inputs = inputs_of(device)
    bias = normal((1, 2, 150, 150), 5, torch.float32).to(device).requires_grad_()
    options: dict[str, Any] = {
        "pattern": M.Local(30) | M.Global(1),
        "attn_mask": torch.rand(2, 1, 1, 150, device=device) > 0.2,
        "bias": bias,
        "key_lengths": torch.tensor([150, 90], device=device),
        "alibi_slopes": torch.tensor([0.5, 0.1], device=device),
        "softcap": 5.0,
        "is_causal": True,
        "return_lse": True,
    }
    ours = F.scaled_dot_product_attention(*inputs, **options)
    theirs = F.scaled_dot_product_attention_reference(*inputs, **options)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    leaves = (*inputs, bias)
    for a, b in zip(
        torch.autograd.grad(ours[0].square().sum(), leaves), torch.autograd.grad(theirs[0].square().sum(), leaves),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_hidden_keys_may_hold_anything(device: str) -> None:
    dense = torch.rand(150, 150, generator=torch.Generator().manual_seed(1)) > 0.5
    dense[:, 70:90] = dense[:, 3] = False
    pattern = M.Dense(dense)
    clean = inputs_of(device)
    poisoned = [t.detach().clone() for t in clean]
    for t in poisoned[1:]:
        t[:, :, 70:90] = torch.nan
        t[:, :, 3] = torch.inf
    poisoned = [t.requires_grad_() for t in poisoned]
    results = []
    for tensors in (clean, poisoned):
        out = F.scaled_dot_product_attention(*tensors, pattern=pattern)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


def test_causal_is_is_causal(device: str) -> None:
    inputs = inputs_of(device, length=40)
    ours = F.scaled_dot_product_attention(*inputs, pattern=M.Causal())
    assert torch.equal(ours, F.scaled_dot_product_attention(*inputs, is_causal=True))
    bottom = F.scaled_dot_product_attention(*inputs, pattern=M.Causal("bottom_right"))
    torch.testing.assert_close(bottom, sdpa(*inputs, torch.ones(40, 150, device=device).bool().tril(110)))
    both = F.scaled_dot_product_attention(*inputs, pattern=M.Causal("bottom_right"), is_causal=True)
    torch.testing.assert_close(both, ours)


def test_convolution_is_attention(device: str) -> None:
    """D26: heads that look at one fixed offset each, and are added up, are a convolution (Cordonnier et al., 2020)."""
    length, width, taps = 40, 5, 3
    x = normal((1, 1, length, width), 0, torch.float32).to(device)
    kernel = normal((width, width, taps), 1, torch.float32).to(device)
    offsets = [M.Dense(torch.ones(length, length).tril(s).triu(s).bool()) for s in (-1, 0, 1)]
    heads = x.expand(1, taps, length, width)
    out = F.scaled_dot_product_attention(heads, heads, heads, pattern=M.per_head(offsets))
    ours = torch.einsum("bhnc,och->bno", out, kernel)
    theirs = torch.nn.functional.conv1d(x[:, 0].transpose(1, 2), kernel, padding=1).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 3])
def test_pattern_errors(heads: int) -> None:
    q = torch.randn(1, 2, 10, 4)
    with pytest.raises(ValueError, match=f"{heads} heads.*2"):
        F.scaled_dot_product_attention(q, q, q, pattern=M.per_head([M.Causal()] * heads))
    with pytest.raises(TypeError, match=r"pattern.*str"):
        F.scaled_dot_product_attention(q, q, q, pattern="causal")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torch_compile(device: str, dynamic: bool) -> None:
    """One graph, two layers of it, and never the lists of another pattern or shape."""
    torch._dynamo.reset()
    patterns = [M.Local(9) | M.Global(1), M.Dense(torch.ones(150, 150).tril(3).bool())]

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        once = F.scaled_dot_product_attention(q * 2, k, v, pattern=patterns[0])
        return F.scaled_dot_product_attention(once, k, v, pattern=patterns[1]).square().sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)

    def check(inputs: list[Tensor]) -> None:
        found, expected = compiled(*inputs), model(*inputs)
        torch.testing.assert_close(found, expected)
        for a, b in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    check(inputs_of(device))
    patterns[1] = M.Dense(torch.ones(150, 150).tril(-3).bool())
    check(inputs_of(device))
    patterns[:] = M.Local(4), M.Strided(5)
    check(inputs_of(device, length=70, keys=90))
    patterns[1] = M.Strided(6)
    check(inputs_of(device, length=70, keys=90))


def test_double_backward(device: str) -> None:
    inputs = [t.detach().double().requires_grad_() for t in inputs_of(device, length=7, keys=9, width=3)]
    options = {"pattern": M.Local(2), "softcap": 2.0, "alibi_slopes": torch.tensor([0.3, 0.6], device=device)}

    def function(*tensors: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*tensors, **options)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
