"""Transformer layers beside torch's: results, gradients, state_dict, masks; and the differences that are meant."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import itertools
import math
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from support import DTYPES
from torch import Tensor

import pyseqnet.functional as F
from pyseqnet import nn

B, S, T, E, H = 3, 6, 5, 8, 2
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 6e-2, torch.float16: 8e-3}
KINDS = ("encoder_layer", "decoder_layer", "encoder", "decoder", "transformer")

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")


def build(namespace, kind: str, layers: int = 2, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"dim_feedforward": 16, "dropout": 0.0, **options}
    if kind == "transformer":
        return namespace.Transformer(E, H, layers, layers, **options)
    encodes = kind.startswith("encoder")
    layer = (namespace.TransformerEncoderLayer if encodes else namespace.TransformerDecoderLayer)(E, H, **options)
    if kind.endswith("layer"):
        return layer
    return (namespace.TransformerEncoder if encodes else namespace.TransformerDecoder)(
        layer, layers, namespace.LayerNorm(E)
    )


def twins(kind: str, **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    ours, theirs = build(nn, kind, **options), build(torch.nn, kind, **options)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)  # the same initialisation from the same seed
        if a.dim() == 1:
            with torch.no_grad():
                b.add_(torch.randn_like(b) / 4)
                a.copy_(b)
    return ours, theirs


def inputs(
    kind: str, batch_first: bool = False, batched: bool = True, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    def one(length: int) -> Tensor:
        shape = (length, E) if not batched else (B, length, E) if batch_first else (length, B, E)
        return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()

    if kind.startswith("encoder"):
        return [one(S)]
    return [one(S), one(T)] if kind == "transformer" else [one(T), one(S)]


def masks(kind: str, causal: bool, lengths: bool, batched: bool = True) -> dict[str, Tensor]:
    found = {}
    source = torch.arange(S) >= (torch.tensor([[S], [2], [4]]) if batched else torch.tensor(4))
    target = torch.arange(T) >= (torch.tensor([[1], [T], [3]]) if batched else torch.tensor(3))
    if kind.startswith("encoder"):
        if causal:
            found["src_mask" if kind.endswith("layer") else "mask"] = torch.ones(S, S, dtype=torch.bool).triu(1)
        if lengths:
            found["src_key_padding_mask"] = source
        return found
    if causal:
        found["tgt_mask"] = torch.ones(T, T, dtype=torch.bool).triu(1)
    if lengths:
        found |= {"tgt_key_padding_mask": target, "memory_key_padding_mask": source}
        if kind == "transformer":
            found["src_key_padding_mask"] = source
    return found


def results(model: torch.nn.Module, tensors: list[Tensor], **options) -> list[Tensor]:
    output = model(*tensors, **options)
    torch.manual_seed(1)
    weight = torch.randn(output.shape, dtype=torch.float64).to(output)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), [*tensors, *model.parameters()])]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        tolerance = TOLERANCE[a.dtype]
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item()))


def test_examples() -> None:
    for module, examples in (("transformer", 2), ("transformer_layers", 4)):
        found = doctest.testmod(importlib.import_module(f"pyseqnet.nn.{module}"))
        assert found.attempted >= examples
        assert not found.failed


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_ours_throughout(kind: str) -> None:
    ours, theirs = twins(kind)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    names = {"MultiheadAttention", "LayerNorm"}
    for part in ours.modules():
        name = type(part).__name__
        assert type(part).__module__.startswith("pyseqnet") == (name in names or name.startswith("Transformer")), name

    def without_extras(function: Callable[..., object]) -> list[tuple]:  # ours are by keyword
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters if p.kind != p.KEYWORD_ONLY]

    def arguments(cls: type) -> list[tuple]:
        return without_extras(cls.__init__)

    def call(cls: type) -> list[tuple]:
        return without_extras(cls.forward)

    assert arguments(type(ours)) == arguments(type(theirs))
    assert call(type(ours)) == call(type(theirs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["seq", "batch"])
def test_results_and_gradients(device: str, kind: str, batch_first: bool, norm_first: bool) -> None:
    for bias, activation in ((True, "relu"), (False, "gelu"), (True, torch.nn.functional.silu)):
        options = {"batch_first": batch_first, "norm_first": norm_first, "bias": bias, "activation": activation}
        ours, theirs = (model.to(device) for model in twins(kind, **options))
        for batched, causal, lengths in itertools.product((True, False), repeat=3):
            tensors = [t.detach().to(device).requires_grad_() for t in inputs(kind, batch_first, batched)]
            given = {name: mask.to(device) for name, mask in masks(kind, causal, lengths, batched).items()}
            assert_same(results(ours, tensors, **given), results(theirs, tensors, **given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["encoder_layer", "decoder_layer"])
def test_every_dtype(kind: str, dtype: torch.dtype) -> None:
    ours, theirs = twins(kind, dtype=dtype)
    tensors, given = inputs(kind, dtype=dtype), masks(kind, True, True)
    assert_same(results(ours, tensors, **given), results(theirs, tensors, **given))


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_computes_what_training_computes(kind: str) -> None:
    """Torch's inference-only path holds zeros at padded positions; real ones are the same."""
    ours, theirs = (model.eval() for model in twins(kind, batch_first=True))
    tensors, given = inputs(kind, True), masks(kind, False, True)
    with torch.no_grad():
        found, expected = ours(*tensors, **given), theirs(*tensors, **given)
        ours.train()
        assert torch.equal(found, ours(*tensors, **given))
    real = ~given["src_key_padding_mask" if kind.startswith("encoder") else "tgt_key_padding_mask"]
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["encoder", "decoder", "transformer"])
def test_additive_and_mismatched_masks(kind: str) -> None:
    ours, theirs = twins(kind)
    tensors, given = inputs(kind), masks(kind, True, True)
    additive = {name: torch.zeros(mask.shape).masked_fill(mask, -math.inf) for name, mask in given.items()}
    assert_same(results(ours, tensors, **additive), results(theirs, tensors, **additive))
    mixed = {name: additive[name] if "padding" in name else mask for name, mask in given.items()}
    found, texts = [], []
    for model in (ours, theirs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(results(model, tensors, **mixed))
        texts.append({str(w.message) for w in caught})
    assert texts[0] == texts[1]
    assert len(texts[0]) == 1
    assert_same(*found)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("form", ["bool", "additive", "hint", "other", "none"])
def test_causal_masks_are_recognised(monkeypatch, kind: str, form: str) -> None:
    """A stack looks once whether its mask is the causal one; the kernel then skips what it hides."""
    hints = []
    honest = F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        hints.append((is_causal, attn_mask is None))
        return honest(query, key, value, attn_mask, dropout_p, is_causal, **options)

    model, tensors = build(nn, kind), inputs(kind)
    length, flag = (S, "is_causal") if kind == "encoder" else (T, "tgt_is_causal")
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)
    given = {"mask" if kind == "encoder" else "tgt_mask": mask}
    if form == "additive":
        given = {name: nn.Transformer.generate_square_subsequent_mask(length) for name in given}
    elif form == "hint":
        given[flag] = True
    elif form == "other":
        mask[1, 0] = True
    elif form == "none":
        given = {}
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model(*tensors, **given)
    expected = {"other": (False, False), "none": (False, True)}.get(form, (True, True))
    assert hints[0] == expected
    assert hints.count(expected) >= 2  # of both layers


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_reaches_nothing(kind: str, norm_first: bool, poison: float) -> None:
    model = build(nn, kind, batch_first=True, norm_first=norm_first)
    given = masks(kind, False, True)
    tensors = inputs(kind, True)
    source, target = (given.get(n) for n in ("src_key_padding_mask", "tgt_key_padding_mask"))
    if kind == "transformer":
        rows = [source, target]
    else:
        rows = [source] if kind.startswith("encoder") else [target, given["memory_key_padding_mask"]]

    def run(fill: float) -> list[Tensor]:
        filled = [t.masked_fill(row.unsqueeze(-1), fill) for t, row in zip(tensors, rows, strict=True)]
        output = model(*filled, **given)[~rows[1 if kind == "transformer" else 0]]
        return [output.detach(), *torch.autograd.grad(output.square().sum(), [*tensors, *model.parameters()])]

    for a, b in zip(run(poison), run(0.0), strict=True):
        assert torch.equal(a, b)


def test_sequence_of_padding_alone_is_finite() -> None:
    """A sequence without a single token: torch gives NaN, and poisons every weight with it."""
    model = build(nn, "transformer", batch_first=True)
    tensors = inputs("transformer", True)
    empty = torch.arange(S) >= torch.tensor([[S], [0], [4]])
    found = results(model, tensors, src_key_padding_mask=empty, memory_key_padding_mask=empty)
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_both_ways_copies_and_pickles(kind: str) -> None:
    ours, theirs = twins(kind)
    tensors = inputs(kind)
    for source, other in ((ours, theirs), (theirs, ours)):
        for parameter in source.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        other.load_state_dict(source.state_dict(), strict=True)
        assert_same(results(ours, tensors), results(theirs, tensors))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [type(a) for a in other.modules()] == [type(a) for a in ours.modules()]
        assert_same(results(other, tensors), results(ours, tensors))


def test_stacks_take_any_layer() -> None:
    """As torch: copies of what is given, ours or not; a custom encoder is left alone."""
    theirs = torch.nn.TransformerEncoderLayer(E, H, 16, 0.0)
    stack = nn.TransformerEncoder(theirs, 2)
    assert all(type(layer) is torch.nn.TransformerEncoderLayer for layer in stack.layers)
    model = nn.Transformer(E, H, 1, 1, 16, custom_encoder=stack)
    assert model.encoder is stack
    assert all(type(layer) is torch.nn.TransformerEncoderLayer for layer in stack.layers)
    assert type(model.decoder) is nn.TransformerDecoder
    assert model(torch.randn(S, B, E), torch.randn(T, B, E)).shape == (T, B, E)


def test_decoding_token_by_token_is_the_causal_pass() -> None:
    """Every prefix decodes as the whole does there, and the first token alone needs no mask."""
    model = build(nn, "decoder", batch_first=True).eval()
    target, memory = inputs("decoder", True)
    with torch.no_grad():
        whole = model(target, memory, **masks("decoder", True, False))
        torch.testing.assert_close(model(target[:, :1], memory), whole[:, :1])
        for t in range(2, T + 1):
            part = model(target[:, :t], memory, tgt_mask=torch.ones(t, t, dtype=torch.bool).triu(1))
            torch.testing.assert_close(part, whole[:, :t])


def test_gradients_at_the_start_are_the_papers() -> None:
    """Xiong et al.: with the norm after the block the last layer's gradients are the largest, before it the first's."""
    for norm_first in (False, True):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, norm_first=norm_first, batch_first=True)
        model = nn.TransformerEncoder(layer, 12, nn.LayerNorm(32) if norm_first else None, enable_nested_tensor=False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.xavier_uniform_(parameter)
        head = torch.nn.Linear(32, 10)
        loss = torch.nn.functional.cross_entropy(
            head(model(torch.randn(16, 20, 32))).flatten(0, 1), torch.randint(0, 10, (320,))
        )
        norms = [g.norm() for g in torch.autograd.grad(loss, [one.linear2.weight for one in model.layers])]
        assert (norms[-1] > norms[0]) == (not norm_first)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_refuse_as_torch_does(kind: str) -> None:
    ours, theirs = twins(kind)
    tensors = inputs(kind)
    wide = [torch.zeros(*t.shape[:-1], E + 1) for t in tensors]
    more = [*tensors[:-1], torch.zeros(S, B + 1, E)] if len(tensors) > 1 else [torch.zeros(S)]
    bad = [(wide, {}), (more, {})]
    name = next(iter(masks(kind, False, True)))
    bad += [(tensors, {name: torch.zeros(B, 17, dtype=torch.bool)}), (tensors, {name: torch.zeros(B, S).int()})]
    for arguments, options in bad:
        found = []
        for model in (ours, theirs):
            with pytest.raises((RuntimeError, ValueError, AssertionError, IndexError)) as caught:
                model(*arguments, **options)
            found.append((caught.type, str(caught.value)))
        assert found[0] == found[1]


def test_constructors_refuse_as_torch_does() -> None:
    for name, arguments in (
        ("TransformerEncoderLayer", (E, 3)),
        ("TransformerEncoderLayer", (E, H, 16, 0.0, "tanh")),
        ("TransformerDecoderLayer", (E, H, 16, 0.0, "tanh")),
        ("TransformerEncoderLayer", (E, H, 16, 2.0)),
        ("Transformer", (E, 3)),
        ("TransformerEncoder", ()),
        ("LayerNorm", ()),
    ):
        found = []
        for namespace in (nn, torch.nn):
            with pytest.raises((RuntimeError, ValueError, AssertionError, TypeError)) as caught:
                getattr(namespace, name)(*arguments)
            found.append((caught.type, str(caught.value)))
        assert found[0] == found[1]


@pytest.mark.filterwarnings("default:enable_nested_tensor is True")
def test_warns_of_nested_tensors_as_torch_does() -> None:
    texts = []
    for namespace in (nn, torch.nn):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            build(namespace, "encoder", norm_first=True)
        texts.append([(w.category, str(w.message)) for w in caught])
    assert texts[0] == texts[1]
    assert len(texts[0]) == 1


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_whole(dynamic: bool) -> None:
    torch._dynamo.reset()
    model = build(nn, "transformer", 1, batch_first=True, norm_first=dynamic)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    tensors, given = inputs("transformer", True), masks("transformer", True, True)
    assert_same(results(compiled, tensors, **given), results(model, tensors, **given))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors, **given), model(*tensors, **given))
    torch._dynamo.reset()


def test_training_is_torchs(device: str) -> None:
    """Twenty steps from the same weights end in the same loss."""
    losses = []
    for model in twins("transformer", batch_first=True):
        model = model.to(device)
        torch.manual_seed(2)
        source, target = torch.randn(B, S, E, device=device), torch.randn(B, T, E, device=device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(20):
            optimizer.zero_grad()
            loss = (model(source, target) - target).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)
