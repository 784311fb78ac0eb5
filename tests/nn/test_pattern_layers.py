"""Patterns in layers: multi-head attention, Transformer layers, windows for speech, Longformer, and decoding."""

from __future__ import annotations

import functools

import pytest
import torch
from support import normal
from torch import Tensor

from pyseqnet import masks, models, nn
from pyseqnet.masks import Causal, Dense, Edges, Global, Local, Strided, per_head

B, T, E, H = 2, 9, 16, 4
PATTERNS = {
    "local": Local(2),
    "asymmetric": Local(3, 1),
    "strided": Strided(3),
    "longformer": Local(1) | Global(2),
    "sparse": Causal() & (Local(2) | Strided(3)),
    "dense": Dense(torch.rand(T, T, generator=torch.Generator().manual_seed(0)) > 0.5),
    "heads": per_head([Local(1), Strided(2), Causal(), Global(1)]),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def as_mask(pattern: masks.Pattern, length: int = T) -> Tensor:
    """In torch.nn's sense, True = ignore: (L, L), or (B * heads, L, L)."""
    dense = ~pattern.to_dense(length, length)
    return dense if dense.dim() == 2 else dense.expand(B, *dense.shape).flatten(0, 1)


def gradients(output: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output.square().sum(), leaves)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_pattern_is_its_dense_mask(name: str, batch_first: bool) -> None:
    pattern = PATTERNS[name]
    layer = nn.MultiheadAttention(E, H, batch_first=batch_first, pattern=pattern)
    plain = nn.MultiheadAttention(E, H, batch_first=batch_first)
    plain.load_state_dict(layer.state_dict())
    x = normal((B, T, E) if batch_first else (T, B, E), 1, torch.float32).requires_grad_()
    padding = torch.arange(T) >= torch.tensor([[T], [6]])
    for ignored in (None, padding):
        output, weights = layer(x, x, x, key_padding_mask=ignored)
        expected, expected_weights = plain(x, x, x, key_padding_mask=ignored, attn_mask=as_mask(pattern))
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(weights, expected_weights)
        assert torch.equal(layer(x, x, x, key_padding_mask=ignored, need_weights=False)[0], output)
    found = gradients(output, [x, *layer.parameters()])
    for one, other in zip(found, gradients(expected, [x, *plain.parameters()]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_mask_comes_beside_the_pattern() -> None:
    layer = nn.MultiheadAttention(E, H, batch_first=True, pattern=Local(3))
    plain = nn.MultiheadAttention(E, H, batch_first=True)
    plain.load_state_dict(layer.state_dict())
    x, bias = normal((B, T, E), 1, torch.float32), normal((T, T), 2, torch.float32)
    hidden = as_mask(Local(3))
    causal = torch.ones(T, T, dtype=torch.bool).triu(1)
    for mask, both in ((bias, bias.masked_fill(hidden, -torch.inf)), (causal, causal | hidden)):
        torch.testing.assert_close(layer(x, x, x, attn_mask=mask)[0], plain(x, x, x, attn_mask=both)[0])
    fast = layer(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(fast, plain(x, x, x, attn_mask=causal | hidden)[0])


def test_compiles_with_a_pattern() -> None:
    layer = nn.MultiheadAttention(E, H, batch_first=True, pattern=Local(2))
    x = normal((B, T, E), 1, torch.float32)
    expected = layer(x, x, x, need_weights=False)[0]  # the pattern's tiles are made here, and kept
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x, x, need_weights=False)[0], expected)


@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "dense"])
def test_decoding_with_a_pattern(name: str) -> None:
    layer = nn.MultiheadAttention(E, H, batch_first=True, pattern=PATTERNS[name]).eval()
    x = normal((B, T, E), 3, torch.float32)
    causal = torch.ones(T, T, dtype=torch.bool).triu(1)
    whole, weights = layer(x, x, x, attn_mask=causal)
    cache = layer.new_cache()
    with torch.no_grad():
        for begin, end in ((0, 1), (1, 4), (4, 5), (5, 9)):
            new = x[:, begin:end]
            output, weight = layer(new, new, new, is_causal=True, cache=cache)
            torch.testing.assert_close(output, whole[:, begin:end])
            torch.testing.assert_close(weight, weights[:, begin:end, :end])
    cache.truncate(4)
    padding = torch.arange(T) < torch.tensor([[0], [2]])
    whole, _ = layer(x, x, x, attn_mask=causal, key_padding_mask=padding)
    with torch.no_grad():  # without weights: keys that nobody sees are not read
        for begin, end in ((4, 5), (5, 7), (7, 9)):
            new, ignored = x[:, begin:end], padding[:, :end]
            output, _ = layer(new, new, new, ignored, is_causal=True, need_weights=False, cache=cache)
            torch.testing.assert_close(output, whole[:, begin:end])


def test_transformer_layers_take_patterns_of_their_own() -> None:
    kinds = [Local(1), Causal() & Strided(2), None, per_head([Local(1), Local(2), Local(3), Global(1)])]
    layers = [nn.TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True, pattern=kind) for kind in kinds]
    model = nn.TransformerEncoder(layers, None)
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True), 4)
    plain.load_state_dict(model.state_dict())
    x = normal((B, T, E), 4, torch.float32)
    expected = x
    for layer, kind in zip(plain.layers, kinds, strict=True):
        expected = layer(expected, src_mask=None if kind is None else as_mask(kind))
    torch.testing.assert_close(model(x), expected)
    whole = model(x, mask=torch.ones(T, T, dtype=torch.bool).triu(1), is_causal=True)
    with torch.no_grad():
        state = model.new_state()
        steps = [model(token, state=state) for token in x.split(1, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    decoder = nn.TransformerDecoderLayer(E, H, 32, 0.0, batch_first=True, pattern=Local(1))
    twin = nn.TransformerDecoderLayer(E, H, 32, 0.0, batch_first=True)
    twin.load_state_dict(decoder.state_dict())
    torch.testing.assert_close(decoder(x, x), twin(x, x, tgt_mask=as_mask(Local(1))))


@pytest.mark.parametrize(("left", "right"), [(2, 1), (3, 0), (0, 0), (100, 100)])
def test_truncated_self_attention(left: int, right: int) -> None:
    layer = nn.TruncatedSelfAttention(E, H, batch_first=True, left=left, right=right)
    plain = nn.MultiheadAttention(E, H, batch_first=True)
    plain.load_state_dict(layer.state_dict())
    x = normal((B, T, E), 5, torch.float32)
    i, j = torch.arange(T).unsqueeze(1), torch.arange(T)
    mask = (j < i - left) | (j > i + right)
    torch.testing.assert_close(layer(x, x, x)[0], plain(x, x, x, attn_mask=mask)[0])
    changed = x.clone()
    changed[:, 5] = 0  # only the frames whose window holds it move
    moved = (layer(changed, changed, changed)[0] - layer(x, x, x)[0]).abs().amax((0, 2)) > 0
    assert moved.tolist() == [5 - right <= frame <= 5 + left for frame in range(T)]


def test_truncated_self_attention_in_a_transformer() -> None:
    attention = functools.partial(nn.TruncatedSelfAttention, left=3, right=0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, batch_first=True, attention=attention), 2).eval()
    x = normal((B, T, E), 6, torch.float32)
    with torch.no_grad():
        state = model.new_state()
        steps = [model(token, state=state) for token in x.split(1, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), model(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_longformer_with_equal_projections_is_one_pattern(bias: bool, batch_first: bool) -> None:
    layer = nn.LongformerSelfAttention(E, H, 0.0, bias, batch_first, window=2, global_tokens=2)
    x = normal((B, T, E) if batch_first else (T, B, E), 7, torch.float32)
    padding = torch.arange(T) >= torch.tensor([[T], [6]])
    one = nn.MultiheadAttention(E, H, bias=bias, batch_first=batch_first, pattern=Local(2) | Global(2))
    one.load_state_dict(layer.state_dict(), strict=False)
    output, _ = layer(x, x, x, key_padding_mask=padding, need_weights=False)
    torch.testing.assert_close(output, one(x, x, x, key_padding_mask=padding)[0])
    single = x[0] if batch_first else x[:, 0]
    torch.testing.assert_close(layer(single, single, single, need_weights=False)[0], one(single, single, single)[0])


def test_longformer_has_projections_of_its_own() -> None:
    layer = nn.LongformerSelfAttention(E, H, 0.0, batch_first=True, window=1, global_tokens=2)
    torch.nn.init.normal_(layer.global_in_proj_weight, std=0.3)
    x = normal((B, T, E), 8, torch.float32)
    output, _ = layer(x, x, x, need_weights=False)
    everyone = nn.MultiheadAttention(E, H, batch_first=True)
    everyone.load_state_dict(layer.state_dict(), strict=False)
    neighbours = everyone(x, x, x, attn_mask=as_mask(Local(1) | Global(2)))[0]
    torch.testing.assert_close(output[:, 2:], neighbours[:, 2:])
    with torch.no_grad():
        everyone.in_proj_weight.copy_(layer.global_in_proj_weight)
        everyone.in_proj_bias.copy_(layer.global_in_proj_bias)
    torch.testing.assert_close(output[:, :2], everyone(x, x, x)[0][:, :2])
    output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    attention = functools.partial(nn.LongformerSelfAttention, window=1)
    model = nn.TransformerEncoderLayer(E, H, 32, batch_first=True, attention=attention)
    assert model(x).shape == x.shape
    for arguments, options in (((x, x.clone(), x), {}), ((x, x, x), {"need_weights": True})):
        with pytest.raises(ValueError, match="LongformerSelfAttention"):
            layer(*arguments, **{"need_weights": False, **options})


def test_dot_product_graph_attention() -> None:
    edges = torch.tensor([[0, 1, 2, 2, 5, 8], [1, 2, 0, 1, 5, 3]])
    layer = nn.MultiheadAttention(E, H, batch_first=True, pattern=Edges(edges, T))
    x = normal((B, T, E), 9, torch.float32)
    output, weights = layer(x, x, x, average_attn_weights=False)
    held = torch.zeros(T, T, dtype=torch.bool)
    held[edges[1], edges[0]] = True
    assert torch.equal(weights != 0, held.expand_as(weights))
    torch.testing.assert_close(output[:, 4], layer.out_proj.bias.expand(B, E))  # nobody points to node 4


def test_vision_transformer_with_windows() -> None:
    options = {"image_size": 8, "patch_size": 2, "channels": 1, "d_model": 16, "num_layers": 1}
    windowed = models.VisionTransformer(3, layers={"pattern": Local(2) | Global(1)}, **options)
    plain = models.VisionTransformer(3, **options)
    plain.load_state_dict(windowed.state_dict())
    image = normal((2, 1, 8, 8), 1, torch.float32)
    assert not torch.allclose(windowed.encode(image)[:, 5:], plain.encode(image)[:, 5:])


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"pattern must come from pyseqnet\.masks, got Tensor"):
        nn.MultiheadAttention(E, H, pattern=torch.ones(T, T))
    with pytest.raises(ValueError, match="pattern is of 2 heads, the layer has 4"):
        nn.MultiheadAttention(E, H, pattern=per_head([Local(1), Local(2)]))
    for extra in ("add_bias_kv", "add_zero_attn"):
        with pytest.raises(ValueError, match="does not go with add_bias_kv"):
            nn.MultiheadAttention(E, H, pattern=Local(1), **{extra: True})
    with pytest.raises(ValueError, match="pattern belongs to softmax attention"):
        nn.TransformerEncoderLayer(E, H, attention="linear", pattern=Local(1))
    x = torch.zeros(B, 5, E)
    layer = nn.MultiheadAttention(E, H, batch_first=True, pattern=Edges(torch.tensor([[0], [1]]), T))
    with pytest.raises(ValueError, match="edge_index is for 9 keys"):
        layer(x, x, x)
