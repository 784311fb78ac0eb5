"""Decoding token by token with caches gives what the whole sequence gives."""

from __future__ import annotations

import math

import pytest
import torch
from support import normal
from torch import Tensor

from pyseqnet import nn

B, T, S, E, H = 3, 7, 5, 16, 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def causal_mask(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def pieces(length: int, sizes: tuple[int, ...]) -> list[slice]:
    """Slices of the sizes in turn until the length is used up."""
    found, at = [], 0
    while at < length:
        size = sizes[len(found) % len(sizes)]
        found.append(slice(at, min(at + size, length)))
        at += size
    return found


# --- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preallocated", [False, True])
def test_cache_holds_what_was_appended(preallocated: bool) -> None:
    key, value = normal((B, H, 150, 4), 1, torch.float32), normal((B, H, 150, 6), 2, torch.float32)
    cache = nn.PreallocatedCache(B, H, 200, 4, 6) if preallocated else nn.KeyValueCache()
    where = cache._key.data_ptr() if preallocated else None
    for part in pieces(150, (1, 3, 60)):
        keys, values = cache.append(key[:, :, part], value[:, :, part])
        assert torch.equal(keys, key[:, :, : part.stop])
        assert torch.equal(values, value[:, :, : part.stop])
        assert cache.length == part.stop
    order = torch.tensor([2, 2, 0])
    cache.reorder(order)
    assert torch.equal(cache.key, key[order])
    assert torch.equal(cache.value, value[order])
    cache.truncate(100)
    keys, _ = cache.append(key[order][:, :, 100:101], value[order][:, :, 100:101])
    assert torch.equal(keys, key[order][:, :, :101])
    if preallocated:
        assert cache._key.data_ptr() == where
    cache.reset()
    assert cache.length == 0


def test_growing_doubles() -> None:
    cache, moves, where = nn.KeyValueCache(), 0, None
    for _ in range(1000):
        cache.append(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
        moves += cache._key.data_ptr() != where
        where = cache._key.data_ptr()
    assert moves <= 6


def test_cache_errors() -> None:
    key = torch.zeros(2, 4, 3, 8)
    cache = nn.PreallocatedCache(2, 4, 4, 8)
    cache.append(key, key)
    with pytest.raises(IndexError, match="room for 4 positions; 6"):
        cache.append(key, key)
    with pytest.raises(RuntimeError, match=r"torch.no_grad\(\)"):
        cache.append(key[:, :, :1].clone().requires_grad_(), key[:, :, :1])
    with pytest.raises(ValueError, match="index must have shape"):
        cache.reorder(torch.tensor([0]))
    for wrong, text in (
        (key[:1], r"key must be \(2, 4, S, 8\)"),
        (key.double(), "key must be torch.float32"),
        (key[0], "key and value must be"),
    ):
        with pytest.raises(ValueError, match=text):
            cache.append(wrong, wrong)
    with pytest.raises(ValueError, match="length must be between 0 and 3"):
        cache.truncate(4)
    for arguments, text in (((2, 0, 4, 8), "num_heads"), ((2, 4, 0, 8), "capacity"), ((-1, 4, 4, 8), "batch_size")):
        with pytest.raises(ValueError, match=text):
            nn.PreallocatedCache(*arguments)


# --- multi-head attention --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_zero_attn": True}, {"add_bias_kv": True}], ids=str)
def test_self_attention_step_by_step(batch_first: bool, options: dict) -> None:
    layer = nn.MultiheadAttention(E, H, batch_first=batch_first, **options).eval()
    x = normal((B, T, E), 1, torch.float32)
    x = x if batch_first else x.transpose(0, 1)
    dim = int(batch_first)
    mask = causal_mask(T)
    if options.keys() & {"add_zero_attn", "add_bias_kv"}:  # torch pads the mask so that all see the extra key
        whole, weights = layer(x, x, x, attn_mask=mask)
    else:
        whole, weights = layer(x, x, x, attn_mask=mask, is_causal=True)
    for preallocate in (False, True):
        cache = layer.new_cache(T, B) if preallocate else layer.new_cache()
        with torch.no_grad():
            for part in pieces(T, (1, 2, 1)):
                new = x[:, part] if batch_first else x[part]
                output, weight = layer(new, new, new, is_causal=True, cache=cache)
                torch.testing.assert_close(output, whole.narrow(dim, part.start, part.stop - part.start))
                torch.testing.assert_close(
                    weight[:, :, : part.stop], weights[:, part, : part.stop], msg=lambda m: f"weights: {m}"
                )
        assert cache.length == T


def test_padding_of_all_positions() -> None:
    layer = nn.MultiheadAttention(E, H, batch_first=True).eval()
    x = normal((B, T, E), 2, torch.float32)
    padding = torch.arange(T) < torch.tensor([[0], [2], [1]])  # at the beginning, as prompts are padded
    whole, _ = layer(x, x, x, key_padding_mask=padding, attn_mask=causal_mask(T), is_causal=True)
    cache = layer.new_cache()
    with torch.no_grad():
        for part in pieces(T, (2, 1)):
            output, _ = layer(
                x[:, part],
                x[:, part],
                x[:, part],
                key_padding_mask=padding[:, : part.stop],
                is_causal=True,
                cache=cache,
            )
            torch.testing.assert_close(output, whole[:, part])


@pytest.mark.parametrize("kdim", [None, 6])
def test_memory_is_projected_once(kdim: int | None) -> None:
    layer = nn.MultiheadAttention(E, H, kdim=kdim, vdim=kdim, batch_first=True).eval()
    x, memory = normal((B, T, E), 3, torch.float32), normal((B, S, kdim or E), 4, torch.float32)
    padding = torch.arange(S) >= torch.tensor([[5], [3], [1]])
    whole, _ = layer(x, memory, memory, key_padding_mask=padding)
    cache = layer.new_cache(memory=True)
    for part in pieces(T, (1, 2)):
        output, _ = layer(x[:, part], memory, memory, key_padding_mask=padding, cache=cache)
        torch.testing.assert_close(output, whole[:, part])
        memory = torch.full_like(memory, math.nan)  # it is not looked at again
    order = torch.tensor([1, 1, 0])
    cache.reorder(order)
    output, _ = layer(x[order], memory, memory, key_padding_mask=padding[order], cache=cache)
    torch.testing.assert_close(output, whole[order])


def test_gradients_through_a_growing_cache() -> None:
    layer = nn.MultiheadAttention(E, H, batch_first=True)
    x = normal((B, T, E), 5, torch.float32).requires_grad_()
    whole, _ = layer(x, x, x, attn_mask=causal_mask(T), is_causal=True, need_weights=False)
    cache = layer.new_cache()
    steps = [layer(token, token, token, need_weights=False, cache=cache)[0] for token in x.split(1, 1)]
    leaves = [x, *layer.parameters()]
    found = torch.autograd.grad(torch.cat(steps, 1).square().sum(), leaves)
    wanted = torch.autograd.grad(whole.square().sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory", [False, True])
def test_second_derivatives_through_a_cache(memory: bool) -> None:
    """A gradient penalty on a decoder that runs token by token is that of the whole pass."""
    layer = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    x, source = (normal((B, T, E), n, torch.float64).requires_grad_() for n in (5, 6))
    if memory:
        whole, _ = layer(x, source, source, need_weights=False)
    else:
        whole, _ = layer(x, x, x, attn_mask=causal_mask(T), is_causal=True, need_weights=False)
    cache = layer.new_cache(memory=memory)
    steps = []
    for token in x.split(1, 1):
        key = source if memory else token
        steps.append(layer(token, key, key, need_weights=False, cache=cache)[0])
    leaves = [x, source, *layer.parameters()] if memory else [x, *layer.parameters()]

    def penalised(output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        slopes = torch.autograd.grad(output.square().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(slopes.square().sum(), leaves, allow_unused=True, materialize_grads=True)

    for one, other in zip(penalised(torch.cat(steps, 1)), penalised(whole), strict=True):
        torch.testing.assert_close(one, other)


def test_multihead_errors() -> None:
    layer = nn.MultiheadAttention(E, H, batch_first=True)
    x = torch.zeros(B, 2, E)
    cache = layer.new_cache()
    with torch.no_grad():
        layer(x, x, x, cache=cache)
    for options, text in (
        ({"key_padding_mask": torch.zeros(B, 2, dtype=torch.bool)}, r"key_padding_mask must have shape \(3, 4\)"),
        ({"attn_mask": torch.zeros(2, 2, dtype=torch.bool)}, r"attn_mask must have shape \(2, 4\)"),
    ):
        with pytest.raises(ValueError, match=text):
            layer(x, x, x, cache=cache, **options)
    assert cache.length == 2  # a refused step leaves it as it was
    with pytest.raises(TypeError, match="cache must be a KeyValueCache"):
        layer(x, x, x, cache={})
    with pytest.raises(ValueError, match="is_causal means nothing"):
        layer(x, x, x, is_causal=True, cache=layer.new_cache(memory=True))
    with pytest.raises(ValueError, match="needs batch_size"):
        layer.new_cache(10)
    memory = layer.new_cache(memory=True)
    layer(x, x, x, cache=memory)
    with pytest.raises(ValueError, match="batch size 3 of the cached memory"):
        layer(x[:2], x, x, cache=memory)
    with pytest.raises(ValueError, match="features"):
        layer(x[..., :3], x[..., :3], x[..., :3], cache=cache)


# --- stacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_language_model(norm_first: bool, batch_first: bool, attention: str) -> None:
    layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=batch_first, norm_first=norm_first, attention=attention)
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(E), enable_nested_tensor=False).eval()
    x = normal((B, T, E), 6, torch.float32)
    x = x if batch_first else x.transpose(0, 1)
    whole = model(x, mask=causal_mask(T), is_causal=True)
    for state in (model.new_state(), model.new_state(T, B)):
        with torch.no_grad():
            for part in pieces(T, (1, 3)):
                assert state.length == part.start
                output = model(x[:, part] if batch_first else x[part], state=state)
                torch.testing.assert_close(output, whole[:, part] if batch_first else whole[part])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_decoder_with_beams(norm_first: bool, batch_first: bool) -> None:
    layer = nn.TransformerDecoderLayer(E, H, 32, batch_first=batch_first, norm_first=norm_first)
    model = nn.TransformerDecoder(layer, 2, nn.LayerNorm(E)).eval()
    x, memory = normal((B, T, E), 7, torch.float32), normal((B, S, E), 8, torch.float32)
    padding = torch.arange(S) >= torch.tensor([[5], [3], [1]])

    def whole(x: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        x, memory = (x, memory) if batch_first else (x.transpose(0, 1), memory.transpose(0, 1))
        mask = causal_mask(x.shape[int(batch_first)])
        output = model(x, memory, tgt_mask=mask, tgt_is_causal=True, memory_key_padding_mask=padding)
        return output if batch_first else output.transpose(0, 1)

    def step(x: Tensor, memory: Tensor, padding: Tensor, state: nn.DecodingState) -> Tensor:
        x, memory = (x, memory) if batch_first else (x.transpose(0, 1), memory.transpose(0, 1))
        output = model(x, memory, memory_key_padding_mask=padding, state=state)
        return output if batch_first else output.transpose(0, 1)

    state = model.new_state()
    with torch.no_grad():
        for part in pieces(4, (1, 2)):
            torch.testing.assert_close(step(x[:, part], memory, padding, state), whole(x, memory, padding)[:, part])
        order = torch.tensor([2, 0, 0])  # beams that survive
        state.reorder(order)
        beams = torch.cat([x[order][:, :4], x[:, 4:]], 1)
        expected = whole(beams, memory[order], padding[order])
        for part in (slice(4, 5), slice(5, 7)):
            output = step(beams[:, part], memory[order], padding[order], state)
            torch.testing.assert_close(output, expected[:, part])
        state.truncate(5)
        output = step(beams[:, 5:], memory[order], padding[order], state)
        torch.testing.assert_close(output, expected[:, 5:])


@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits(autocast: bool) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, batch_first=True), 2).eval()
    x = normal((B, T, E), 10, torch.float32)
    if not autocast:
        model, x = model.bfloat16(), x.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        whole = model(x, mask=causal_mask(T), is_causal=True)
        for state in (model.new_state(), model.new_state(T, B)):
            steps = torch.cat([model(token, state=state) for token in x.split(1, 1)], 1)
            assert state[0].self_attention.key.dtype == torch.bfloat16
            torch.testing.assert_close(steps, whole, atol=0.05, rtol=0.02)


def test_later_tokens_change_no_bit_of_earlier_outputs() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True), 2)
    x = normal((B, T, E), 9, torch.float32)
    other = torch.cat([x[:, :4], torch.randn(B, T - 4, E)], 1)
    first, second = (model(t, mask=causal_mask(T), is_causal=True) for t in (x, other))
    assert torch.equal(first[:, :4], second[:, :4])
    assert not torch.equal(first[:, 4:], second[:, 4:])


def test_stack_errors() -> None:
    layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x = torch.zeros(B, 1, E)
    with pytest.raises(TypeError, match="state must come from new_state"):
        model(x, state=[None, None])
    with pytest.raises(ValueError, match="state is of 1 layers; there are 2"):
        model(x, state=nn.DecodingState([layer.new_state()]))
    with pytest.raises(ValueError, match="the mask must be None"):
        model(x, mask=torch.zeros(1, 1, dtype=torch.bool), state=model.new_state())
    with pytest.raises(ValueError, match="cannot go back"):
        nn.RecurrentCache().truncate(3)

    class Plain(torch.nn.MultiheadAttention):
        pass

    foreign = nn.TransformerEncoderLayer(E, H, 32, batch_first=True, attention=Plain)
    assert foreign(x).shape == x.shape
    with pytest.raises(TypeError, match="Plain cannot decode token by token"):
        foreign.new_state()


def test_compiles() -> None:
    layer = nn.TransformerDecoderLayer(E, H, 32, batch_first=True)
    model = nn.TransformerDecoder(layer, 1).eval()
    memory, x = normal((B, S, E), 1, torch.float32), normal((B, 3, E), 2, torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager, traced = model.new_state(8, B), model.new_state(8, B)
    with torch.no_grad():
        for i in range(3):
            torch.testing.assert_close(
                compiled(x[:, i : i + 1], memory, state=traced), model(x[:, i : i + 1], memory, state=eager)
            )
