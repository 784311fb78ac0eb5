"""MultiheadAttention beside torch's: all options, masks, gradients, errors; and where it is meant to differ."""

from __future__ import annotations

import copy
import doctest
import itertools
import math
import pickle
import re
import warnings

import pytest
import torch
from support import DTYPES, run_python
from torch import Tensor

import pyseqnet.functional as F
import pyseqnet.nn.attention
from pyseqnet import nn

B, L, S, E, H = 3, 5, 7, 12, 3
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def twins(**options) -> tuple[nn.MultiheadAttention, torch.nn.MultiheadAttention]:
    torch.manual_seed(0)
    ours = nn.MultiheadAttention(E, H, **options)
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(E, H, **options)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
        with torch.no_grad():
            if a.dim() == 1:  # biases start as zero, which would hide a mistake
                b.normal_()
                a.copy_(b)
    return ours, theirs


def inputs(
    kind: str = "cross", batch_first: bool = False, batched: bool = True, kdim: int = E, vdim: int = E,
    dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> list[Tensor]:  # fmt: skip
    def one(length: int, features: int) -> Tensor:
        shape = (length, features) if not batched else (B, length, features) if batch_first else (length, B, features)
        return torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_()

    query = one(L, E)
    if kind == "self":
        return [query] * 3
    key = one(S, kdim)
    return [query, key, key if kind == "memory" else one(S, vdim)]


def results(layer: torch.nn.Module, tensors: list[Tensor], leaves: list[Tensor] = (), **options) -> list[Tensor]:
    """Output, weights if any, and all gradients; those that torch gives for nothing (None) as zeros."""
    output, weights = layer(*tensors, **options)
    torch.manual_seed(1)
    total = (output * torch.randn(output.shape, dtype=torch.float64).to(output)).sum()
    found = [output.detach()]
    if weights is not None:
        total = total + (weights * torch.randn(weights.shape, dtype=torch.float64).to(weights)).sum()
        found.append(weights.detach())
    distinct = list({id(t): t for t in [*tensors, *leaves, *layer.parameters()]}.values())
    gradients = torch.autograd.grad(total, distinct, allow_unused=True)
    return found + [torch.zeros_like(t) if g is None else g for t, g in zip(distinct, gradients, strict=True)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        tolerance = TOLERANCE[a.dtype]
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


def padding_of(lengths: tuple[int, ...], size: int) -> Tensor:
    return torch.arange(size) >= torch.tensor(lengths)[:, None]


def test_examples() -> None:
    found = doctest.testmod(pyseqnet.nn.attention)
    assert found.attempted
    assert not found.failed


def test_parameter_count_is_the_papers() -> None:
    assert sum(p.numel() for p in nn.MultiheadAttention(512, 8).parameters()) == 1_050_624


@pytest.mark.parametrize(
    ("bias", "add_bias_kv", "add_zero_attn"), list(itertools.product((True, False), repeat=3)), ids=str
)
@pytest.mark.parametrize("kind", ["self", "memory", "cross"])
def test_every_option(device: str, kind: str, bias: bool, add_bias_kv: bool, add_zero_attn: bool) -> None:
    keys = L if kind == "self" else S
    padding = padding_of((keys, keys - 2, 1), keys).to(device)
    mask = (torch.arange(keys) > torch.arange(L)[:, None] + 1).to(device)
    for batch_first, need_weights, average in ((True, True, True), (False, True, False), (True, False, True)):
        ours, theirs = twins(bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, batch_first=batch_first)
        ours, theirs = ours.to(device), theirs.to(device)
        tensors = inputs(kind, batch_first, device=device)
        for key_padding_mask, attn_mask in itertools.product((None, padding), (None, mask)):
            options = {
                "key_padding_mask": key_padding_mask, "attn_mask": attn_mask, "need_weights": need_weights,
                "average_attn_weights": average,
            }  # fmt: skip
            assert_same(results(ours, tensors, **options), results(theirs, tensors, **options))


@pytest.mark.parametrize(("kdim", "vdim"), [(8, E), (E, 4), (8, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_other_key_and_value_sizes(kdim: int, vdim: int, bias: bool) -> None:
    ours, theirs = twins(kdim=kdim, vdim=vdim, bias=bias, batch_first=True)
    tensors = inputs("cross", True, kdim=kdim, vdim=vdim)
    options = {"key_padding_mask": padding_of((4, 7, 2), S)}
    assert_same(results(ours, tensors, **options), results(theirs, tensors, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("need_weights", [True, False])
def test_every_dtype(device: str, dtype: torch.dtype, need_weights: bool) -> None:
    ours, theirs = (layer.to(device, dtype) for layer in twins(batch_first=True))
    tensors = inputs("cross", True, dtype=dtype, device=device)
    options = {"need_weights": need_weights, "key_padding_mask": padding_of((7, 3, 5), S).to(device)}
    assert_same(results(ours, tensors, **options), results(theirs, tensors, **options))


MOST_ERROR = {"output": 1.3, "gradients": 1.6}  # of torch's in the same dtype, mean square over all inputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_short_dtypes_are_as_exact_as_torch(kind: str, dtype: torch.dtype) -> None:
    """Against float64, over inputs whose softmax is flat and sharp."""
    layers = [layer.to(dtype) for layer in twins(batch_first=True)]
    layers.append(copy.deepcopy(layers[1]).double())
    squares = [[0.0, 0.0], [0.0, 0.0]]
    for seed in range(20):
        torch.manual_seed(seed)
        tensors = inputs(kind, True, dtype=dtype)
        keys = tensors[1].shape[1]
        tensors = [t.detach() * (1 + seed % 5) for t in dict.fromkeys(tensors)]
        found = []
        for layer in layers:
            leaves = [t.to(layer.out_proj.weight.dtype).requires_grad_() for t in tensors]
            arguments = leaves * 3 if kind == "self" else leaves
            padding = padding_of((keys, 2, 4), keys)
            found.append(results(layer, arguments, need_weights=bool(seed % 2), key_padding_mask=padding))
        for number, (mine, torchs, exact) in enumerate(zip(*found, strict=True)):
            for error, result in zip(squares, (mine, torchs), strict=True):
                scaled = (result.double() - exact) / exact.square().mean().sqrt()
                error[min(number, 1)] += scaled.square().mean().item()
    for (mine, torchs), bound in zip(zip(*squares, strict=True), MOST_ERROR.values(), strict=True):
        assert mine**0.5 <= bound * torchs**0.5


@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched(batch_first: bool) -> None:
    ours, theirs = twins(batch_first=batch_first)
    tensors = inputs("cross", batched=False)
    masks = (None, torch.rand(L, S) > 0.6, torch.rand(H, L, S) > 0.6, torch.randn(L, S))
    for mask, padding, need_weights in itertools.product(masks, (None, torch.arange(S) > 4), (True, False)):
        if mask is not None and mask.dtype == torch.bool:
            mask[..., 0] = False
        if padding is not None and mask is not None and mask.is_floating_point():
            padding = torch.zeros(S).masked_fill(padding, -math.inf)
        options = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": need_weights}
        assert_same(results(ours, tensors, **options), results(theirs, tensors, **options))


def test_odd_masks() -> None:
    """Padding on the left, in the middle, additive, a mask for each head, views, and gradients of additive masks."""
    ours, theirs = twins(batch_first=True)
    tensors = inputs("cross", True)
    middle = torch.rand(B, S) > 0.7
    middle[:, 3] = False
    left = padding_of((4, 7, 1), S).flip(1)
    heads = torch.rand(B * H, L, S) > 0.5
    heads[..., 3] = False
    heads[..., -1] = False
    spread = torch.zeros(B, 2 * S, dtype=torch.bool)
    spread[:, ::2] = middle
    for padding, mask in (
        (middle, None), (left, None), (middle, heads), (spread[:, ::2], heads), (None, heads),
        (torch.zeros(B, S, dtype=torch.bool), None), (middle[:1].expand(B, S), None),
        (middle, heads[:1].expand(B * H, L, S)),
    ):  # fmt: skip
        for need_weights in (True, False):
            options = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": need_weights}
            if padding is left and mask is None:
                options["attn_mask"] = torch.zeros(L, S, dtype=torch.bool)
            assert_same(results(ours, tensors, **options), results(theirs, tensors, **options))
    additive = torch.randn(B, S, requires_grad=True)
    bias = torch.randn(B * H, L, S, requires_grad=True)
    plane = torch.randn(L, S, requires_grad=True)
    for padding, mask in ((additive, None), (additive, bias), (None, bias), (additive, plane), (None, plane)):
        leaves = [t for t in (padding, mask) if t is not None]
        for need_weights in (True, False):
            options = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": need_weights}
            assert_same(results(ours, tensors, leaves, **options), results(theirs, tensors, leaves, **options))


def test_mismatched_masks_warn_as_torch_does() -> None:
    ours, theirs = twins(batch_first=True)
    tensors = inputs("cross", True)
    options = {"key_padding_mask": padding_of((7, 3, 5), S), "attn_mask": torch.randn(L, S)}
    texts, found = [], []
    for layer in (ours, theirs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(results(layer, tensors, **options))
        texts.append([str(w.message) for w in caught])
    assert texts[0] == texts[1][:1]
    assert "mismatched key_padding_mask and attn_mask" in texts[0][0]
    assert_same(*found)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("lengths", [None, (7, 3, 5)])
def test_causal_hint(lengths: tuple[int, ...] | None, need_weights: bool) -> None:
    for extra in ({}, {"add_bias_kv": True, "add_zero_attn": True}):
        ours, theirs = twins(**extra)
        tensors = inputs()
        mask = torch.ones(L, S, dtype=torch.bool).triu(1)
        padding = None if lengths is None else padding_of(lengths, S)
        left = None if padding is None else torch.arange(S) == torch.tensor([[1], [2], [3]])  # not the ends
        for key_padding_mask in (padding, left):
            options = {
                "attn_mask": mask, "is_causal": True, "need_weights": need_weights,
                "key_padding_mask": key_padding_mask,
            }  # fmt: skip
            assert_same(results(ours, tensors, **options), results(theirs, tensors, **options))


def test_what_the_function_is_asked_for(monkeypatch) -> None:
    """Masks arrive broadcast, lengths where they can, a causal hint as a hint: that is where the speed is."""
    calls = []
    honest = F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        calls.append((attn_mask, is_causal, options["key_lengths"]))
        return honest(query, key, value, attn_mask, dropout_p, is_causal, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    layer = nn.MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(B, L, E)
    right, left = padding_of((5, 0, 2), L), padding_of((5, 1, 2), L).flip(1)
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    layer(x, x, x, key_padding_mask=right, need_weights=False)
    layer(x, x, x, key_padding_mask=left)
    layer(x, x, x, key_padding_mask=left, attn_mask=causal)
    layer(x, x, x, attn_mask=causal)
    layer(x, x, x, key_padding_mask=right, attn_mask=causal, is_causal=True, need_weights=False)
    layer(x, x, x, key_padding_mask=left, attn_mask=causal, is_causal=True, need_weights=False)
    assert calls[0][:2] == (None, False)
    assert calls[0][2].tolist() == [5, 0, 2]
    shapes = [None if mask is None else tuple(mask.shape) for mask, _, _ in calls]
    assert shapes == [None, (B, 1, 1, L), (B, 1, L, L), (1, 1, L, L), None, (B, 1, 1, L)]
    assert all(mask is None or mask.dtype == torch.bool for mask, _, _ in calls)
    assert torch.equal(calls[1][0][:, 0, 0], ~left)  # True = take part, there
    assert [hint for _, hint, _ in calls] == [False, False, False, False, True, True]
    assert calls[4][2].tolist() == [5, 0, 2]


def test_row_without_a_key_gives_zero() -> None:
    """Torch's weights are NaN there."""
    ours, theirs = twins(batch_first=True)
    query, key, _ = tensors = inputs("memory", True)
    padding = padding_of((7, 0, 5), S)
    found = results(ours, tensors, key_padding_mask=padding)
    assert all(t.isfinite().all() for t in found)
    output, weights = ours(query, key, key, key_padding_mask=padding)
    assert torch.equal(output[1], ours.out_proj.bias.expand(L, E))
    assert not weights[1].any()
    others = [0, 2]
    expected = theirs(query, key, key, key_padding_mask=padding)
    torch.testing.assert_close(output[others], expected[0][others])
    torch.testing.assert_close(weights[others], expected[1][others])
    mask = torch.zeros(L, S, dtype=torch.bool)
    mask[2] = True
    output, weights = ours(query, key, key, attn_mask=mask)
    assert torch.equal(output[:, 2], ours.out_proj.bias.expand(B, E))
    assert output.isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["self", "memory", "cross"])
@pytest.mark.parametrize("side", ["right", "left", "additive"])
def test_padding_reaches_nothing(device: str, side: str, kind: str, poison: float) -> None:
    layer = twins(batch_first=kind == "self")[0].to(device)
    tensors = inputs(kind, layer.batch_first, device=device)
    keys = tensors[1].shape[1 if layer.batch_first else 0]
    padding = padding_of((keys, keys - 2, 1), keys).to(device)
    padding = padding.flip(1) if side == "left" else padding
    rows = padding if layer.batch_first else padding.T
    given = torch.zeros(padding.shape, device=device).masked_fill(padding, -math.inf) if side == "additive" else padding

    def run(fill: float) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in dict.fromkeys(tensors)]
        held = dict(zip(dict.fromkeys(tensors), leaves, strict=True))
        query, key, value = (held[t] for t in tensors)
        filled = {t: t.masked_fill(rows.unsqueeze(-1), fill) for t in (key, value)}
        query, key, value = filled.get(query, query), filled[key], filled[value]
        output, _ = layer(query, key, value, key_padding_mask=given, need_weights=False)
        if kind == "self":  # padded queries are nobody's
            output = output[~rows]
        return [output.detach(), *torch.autograd.grad(output.square().sum(), [*leaves, *layer.parameters()])]

    for a, b in zip(run(poison), run(0.0), strict=True):
        assert torch.equal(a, b)


def test_dropout_is_in_the_weights_and_only_in_training() -> None:
    layer = nn.MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    x = torch.randn(B, 40, E)
    _, weights = layer(x, x, x, average_attn_weights=False)
    assert 0.4 < (weights == 0).double().mean() < 0.6
    layer.eval()
    _, weights = layer(x, x, x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, 40))


def test_decoding_token_by_token_is_the_causal_row() -> None:
    layer = nn.MultiheadAttention(E, H, batch_first=True).eval()
    x = torch.randn(B, L, E)
    mask = torch.ones(L, L, dtype=torch.bool).triu(1)
    whole, _ = layer(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    for t in range(L):
        one, _ = layer(x[:, t : t + 1], x[:, : t + 1], x[:, : t + 1], need_weights=False)
        torch.testing.assert_close(one[:, 0], whole[:, t])
    changed = x.clone()
    changed[:, 3:] += 1
    again, _ = layer(changed, changed, changed, attn_mask=mask, is_causal=True, need_weights=False)
    torch.testing.assert_close(again[:, :3], whole[:, :3], rtol=0, atol=0)


def test_golden_numbers_and_the_order_in_the_packed_weight() -> None:
    """in_proj_weight holds the query's, the key's and the value's rows in this order."""
    layer = nn.MultiheadAttention(2, 1, bias=False, batch_first=True)
    with torch.no_grad():
        layer.in_proj_weight.copy_(torch.cat([torch.eye(2) * math.sqrt(2), torch.eye(2), torch.eye(2)]))
        layer.out_proj.weight.copy_(torch.eye(2))
    tokens = torch.tensor([[[1.0, 0], [0, 2], [1, 1]]])
    _, weights = layer(tokens, tokens, tokens)
    golden = [[0.422319, 0.155362, 0.422319], [0.015876, 0.866813, 0.117310], [0.155362, 0.422319, 0.422319]]
    torch.testing.assert_close(weights[0], torch.tensor(golden), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"kdim": 8, "vdim": 4}, {"add_bias_kv": True, "bias": False}])
def test_state_dict_both_ways_copies_and_pickles(options: dict) -> None:
    ours, theirs = twins(**options)
    tensors = inputs(kdim=options.get("kdim", E), vdim=options.get("vdim", E))
    assert isinstance(ours, torch.nn.MultiheadAttention)
    assert repr(ours) == repr(theirs)
    for source, target in ((ours, theirs), (theirs, ours)):
        for parameter in source.parameters():
            torch.nn.init.normal_(parameter)
        target.load_state_dict(source.state_dict(), strict=True)
        assert_same(results(ours, tensors), results(theirs, tensors))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is nn.MultiheadAttention
        assert_same(results(other, tensors), results(ours, tensors))


@pytest.mark.parametrize(
    "arguments", [(0, 1), (4, 0), (5, 2), (4,), (-4, 2)], ids=str
)  # fmt: skip
def test_constructor_refuses_as_torch_does(arguments: tuple) -> None:
    found = []
    for namespace in (nn, torch.nn):
        with pytest.raises((ValueError, AssertionError, TypeError)) as caught:
            namespace.MultiheadAttention(*arguments)
        found.append((caught.type, str(caught.value)))
    assert found[0] == found[1]


ZEROS = torch.zeros
BAD_CALLS = {
    "features": ((ZEROS(L, B, E + 1), ZEROS(S, B, E), ZEROS(S, B, E)), {}),
    "key features": ((ZEROS(L, B, E), ZEROS(S, B, 4), ZEROS(S, B, 4)), {}),
    "lengths": ((ZEROS(L, B, E), ZEROS(S, B, E), ZEROS(S - 1, B, E)), {}),
    "batch": ((ZEROS(L, B, E), ZEROS(S, B + 1, E), ZEROS(S, B + 1, E)), {}),
    "dims": ((ZEROS(L, B, E), ZEROS(S, E), ZEROS(S, E)), {}),
    "four": ((ZEROS(1, L, B, E),) * 3, {}),
    "dtype": ((ZEROS(L, B, E), ZEROS(S, B, E).double(), ZEROS(S, B, E).double()), {}),
    "padding shape": ((ZEROS(L, B, E),) * 3, {"key_padding_mask": ZEROS(B, L + 1) > 0}),
    "padding batch": ((ZEROS(L, B, E),) * 3, {"key_padding_mask": ZEROS(B + 1, L) > 0}),
    "padding dims": ((ZEROS(L, B, E),) * 3, {"key_padding_mask": ZEROS(L) > 0}),
    "padding dtype": ((ZEROS(L, B, E),) * 3, {"key_padding_mask": ZEROS(B, L).int()}),
    "mask shape": ((ZEROS(L, B, E),) * 3, {"attn_mask": ZEROS(L, L + 1) > 0}),
    "mask heads": ((ZEROS(L, B, E),) * 3, {"attn_mask": ZEROS(B, L, L) > 0}),
    "mask dims": ((ZEROS(L, B, E),) * 3, {"attn_mask": ZEROS(B, H, L, L) > 0}),
    "mask dtype": ((ZEROS(L, B, E),) * 3, {"attn_mask": ZEROS(L, L).long()}),
    "hint alone": ((ZEROS(L, B, E),) * 3, {"is_causal": True}),
    "unbatched mask": ((ZEROS(L, E),) * 3, {"attn_mask": ZEROS(H + 1, L, L) > 0}),
    "unbatched padding": ((ZEROS(L, E),) * 3, {"key_padding_mask": ZEROS(B, L) > 0}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_calls_refuse_as_torch_does(name: str) -> None:
    tensors, options = BAD_CALLS[name]
    found = []
    for layer in twins():
        with pytest.raises((RuntimeError, ValueError, AssertionError)) as caught:
            layer(*tensors, **options)
        found.append((caught.type, str(caught.value)))
    assert found[0] == found[1]


def test_what_torch_lets_pass_is_refused_in_words() -> None:
    """Without gradients torch's inference path does not look at the mask's shape."""
    layer = nn.MultiheadAttention(E, 2, batch_first=True).eval()
    x = torch.zeros(1, L, E)
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError, AssertionError)):
        layer(x, x, x, attn_mask=torch.zeros(1, L, L, L, dtype=torch.bool))
    nested = torch.nested.nested_tensor([torch.zeros(3, E), torch.zeros(2, E)])
    with pytest.raises(AssertionError, match="does not support NestedTensor: pass padded tensors"):
        layer(nested, nested, nested)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_whole(dynamic: bool) -> None:
    torch._dynamo.reset()
    layer = nn.MultiheadAttention(E, H, batch_first=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (5, 8) if dynamic else (5,):
        x = torch.randn(B, length, E, requires_grad=True)
        padding = padding_of((length, 3, 1), length)
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        for options in (
            {}, {"need_weights": False}, {"key_padding_mask": padding},
            {"attn_mask": causal, "is_causal": True, "need_weights": False},
            {"attn_mask": causal, "key_padding_mask": padding, "need_weights": False},
        ):  # fmt: skip
            assert_same(results(compiled, [x] * 3, **options), results(layer, [x] * 3, **options))
    torch._dynamo.reset()


def test_double_backward() -> None:
    ours, theirs = (layer.double() for layer in twins(batch_first=True))
    tensors = inputs("memory", True, dtype=torch.float64)
    found = []
    for layer in (ours, theirs):
        output, _ = layer(*tensors, key_padding_mask=padding_of((7, 3, 5), S))
        first = torch.autograd.grad(output.square().sum(), tensors[:2], create_graph=True)
        total = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(total, [*tensors[:2], *layer.parameters()]))
    assert_same(*found)


def test_autocast_as_torch() -> None:
    ours, theirs = twins(batch_first=True)
    tensors = inputs("memory", True)
    padding = padding_of((7, 3, 5), S)
    for need_weights in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            a, b = (layer(*tensors, key_padding_mask=padding, need_weights=need_weights) for layer in (ours, theirs))
        assert a[0].dtype == b[0].dtype
        torch.testing.assert_close(a[0], b[0], rtol=3e-2, atol=3e-2)


def test_replacing_torchs_class_does_not_recurse() -> None:
    result = run_python(
        "import torch, pyseqnet.nn\n"
        "for name in ('MultiheadAttention', 'LayerNorm', 'TransformerEncoderLayer', 'Transformer'):\n"
        "    setattr(torch.nn, name, getattr(pyseqnet.nn, name))\n"
        "import pyseqnet.functional as F\n"
        "torch.nn.functional.scaled_dot_product_attention = F.scaled_dot_product_attention\n"
        "model = torch.nn.Transformer(8, 2, 1, 1, 8)\n"
        "x = torch.randn(3, 2, 8, requires_grad=True)\n"
        "model(x, x).sum().backward()\n"
        "print(type(model.encoder.layers[0].self_attn).__module__)\n"
    )
    assert result.returncode == 0, result.stderr
    assert re.search("pyseqnet.nn.attention", result.stdout)
