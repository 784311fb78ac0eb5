"""Layers of `nn.efficient` one by one: what each is equal to, and how many pairs of query and key it computes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as torch_F
from support import normal
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import pyseqnet.functional as F
from pyseqnet import masks, nn
from pyseqnet.masks import Causal, Global, Local, RandomBlocks
from pyseqnet.nn.efficient import base, clustered, feature_maps, reduced_keys, reformer, sinkhorn

B, T, E, H, D = 2, 13, 16, 4, 4
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tokens(length: int = T, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal((B, length, E), seed, dtype)


def made(kind: type, **options: object) -> torch.nn.Module:
    layer = kind(E, H, batch_first=True, dtype=torch.float64, **options)
    for parameter in layer.parameters():
        if parameter.dim() == 1:  # biases begin as zeros
            parameter.data.normal_()
    return layer


def dense(layer: torch.nn.Module) -> nn.MultiheadAttention:
    """Multi-head attention with the layer's projections."""
    plain = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict(), strict=False)
    return plain


def run(layer: torch.nn.Module, x: Tensor, causal: bool = False, padding: Tensor | None = None) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if causal else None
    return layer(x, x, x, key_padding_mask=padding, attn_mask=mask, is_causal=causal, need_weights=False)[0]


def by_hand(layer: base.MultiheadMixer, x: Tensor, mask: Tensor) -> Tensor:
    """Dense attention of the layer's projections under a mask (.., L, S)."""
    q, k, v = layer._heads(x, x, x)
    return joined(layer, torch_F.scaled_dot_product_attention(q, k, v, mask))


def joined(layer: base.MultiheadMixer, heads: Tensor) -> Tensor:
    return layer.out_proj(heads.transpose(1, 2).flatten(2))


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many pairs of a query and a key each call of softmax attention computes, all heads together."""
    counted: list[int] = []
    original = F.scaled_dot_product_attention

    def counting(query: Tensor, key: Tensor, *rest: object, **options: object) -> object:
        pattern, begins = options.get("pattern"), options.get("cu_seqlens_q")
        if begins is not None:
            keys = options["cu_seqlens_k"].diff()  # type: ignore[attr-defined]
            counted.append(int((begins.diff() * keys).sum()))  # type: ignore[attr-defined]
        elif pattern is not None:
            tiles = pattern.compile(query.shape[-2], key.shape[-2], heads=query.shape[-3])  # type: ignore[attr-defined]
            copies = query.shape[0] * (1 if pattern.heads else query.shape[1])  # type: ignore[attr-defined]
            counted.append(copies * tiles[1].shape[0] * 64 * 64)
        else:
            counted.append(math.prod(query.shape[:-1]) * key.shape[-2])
        return original(query, key, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    yield counted
    assert counted


# --- patterns --------------------------------------------------------------------------------------------------------


def test_random_blocks_are_a_seeds() -> None:
    pattern = RandomBlocks(2, 4, seed=3)
    seen = pattern.to_dense(37, 41)
    layout = torch.nn.functional.pad(seen, (0, 3, 0, 3)).unflatten(0, (10, 4)).unflatten(2, (11, 4)).any(3).any(1)
    assert layout.sum(1).tolist() == [2] * 10
    assert torch.equal(seen, layout.repeat_interleave(4, 0).repeat_interleave(4, 1)[:37, :41])
    assert torch.equal(seen, RandomBlocks(2, 4, seed=3).to_dense(37, 41))
    assert RandomBlocks(2, 4, seed=3) == pattern != RandomBlocks(2, 4, seed=4)
    assert not torch.equal(seen, RandomBlocks(2, 4, seed=4).to_dense(37, 41))
    assert RandomBlocks(11, 4).to_dense(37, 41).all()
    assert not RandomBlocks(0, 4).to_dense(37, 41).any()
    q, k = normal((1, 2, 137, 8), 1), normal((1, 2, 201, 8), 2)
    for block in (4, 48, 64, 100):
        both = RandomBlocks(1, block) | Local(3)
        expected = torch_F.scaled_dot_product_attention(q, k, k, both.to_dense(137, 201))
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, k, pattern=both), expected, **EXACT)
    tiles = RandomBlocks(3, 64).compile(1024, 1024)[1]
    assert tiles.shape[0] == 16 * 3
    assert (tiles[:, 1] == -1).all()  # each of them full
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        RandomBlocks(-1)


def test_big_bird_and_mixed_heads_are_their_masks() -> None:
    x = tokens(30)
    options = {"window": 1, "global_tokens": 2, "random_blocks": 2, "block": 4}
    heads = [(Local(1) | Global(2) | RandomBlocks(2, 4, 5 + h)).to_dense(30, 30) for h in range(H)]
    assert len({mask.numpy().tobytes() for mask in heads}) == H
    layer = made(nn.BigBirdAttention, seed=5, **options)
    mask = ~torch.stack(heads).expand(B, -1, -1, -1).flatten(0, 1)
    torch.testing.assert_close(run(layer, x), dense(layer)(x, x, x, attn_mask=mask)[0], **EXACT)
    everything = made(nn.BigBirdAttention, window=0, global_tokens=0, random_blocks=30, block=1)
    torch.testing.assert_close(run(everything, x), run(dense(everything), x), **EXACT)

    turns = [Local(2), Causal(), Global(1)]
    layer = made(nn.MixedHeadAttention, patterns=turns)
    mask = ~torch.stack([turns[h % 3].to_dense(30, 30) for h in range(H)]).expand(B, -1, -1, -1).flatten(0, 1)
    output, weights = layer(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(output, dense(layer)(x, x, x, attn_mask=mask)[0], **EXACT)
    for h in range(H):
        assert not weights[:, h][:, ~turns[h % 3].to_dense(30, 30)].any()
    assert made(nn.MixedHeadAttention).pattern.heads == H
    with pytest.raises(ValueError, match="patterns must not be empty"):
        nn.MixedHeadAttention(E, H, patterns=[])


@pytest.mark.parametrize("kind", [nn.LocalAttention, nn.BigBirdAttention])
def test_pairs_of_patterns_grow_linearly(kind: type, pairs: list[int]) -> None:
    layer = kind(E, H, batch_first=True)
    with torch.no_grad():
        for length in (2048, 4096):
            run(layer, torch.zeros(1, length, E))
    assert 1.8 < pairs[1] / pairs[0] < 2.3
    assert pairs[1] < 0.35 * H * 4096**2


# --- choices of keys -------------------------------------------------------------------------------------------------


def test_top_k(pairs: list[int]) -> None:
    x = tokens()
    for options in ({"k": T}, {"k": 100}, {"threshold": 0.0}):
        layer = made(nn.TopKAttention, **options)
        for causal in (False, True):
            torch.testing.assert_close(run(layer, x, causal), run(dense(layer), x, causal), **EXACT)
    layer = made(nn.TopKAttention, k=3)
    q, k, _ = layer._heads(x, x, x)
    scores = q @ k.transpose(2, 3) / math.sqrt(D)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(3, scores.topk(3).indices, True)
    torch.testing.assert_close(run(layer, x), by_hand(layer, x, kept), **EXACT)
    padding = torch.arange(T) >= torch.tensor([[T], [2]])  # fewer keys than k
    few = [run(of, x, padding=padding)[1, :2] for of in (layer, dense(layer))]
    torch.testing.assert_close(*few, **EXACT)
    layer = made(nn.TopKAttention, threshold=0.1)
    q, k, _ = layer._heads(x, x, x)
    weights = (q @ k.transpose(2, 3) / math.sqrt(D)).softmax(3)
    assert 0 < (weights >= 0.1).double().mean() < 1
    torch.testing.assert_close(run(layer, x), by_hand(layer, x, weights >= 0.1), **EXACT)
    nothing = made(nn.TopKAttention, threshold=1.0)
    torch.testing.assert_close(run(nothing, x), nothing.out_proj.bias.expand(B, T, E))
    pairs.clear()
    long = tokens(700)  # more than one block of queries
    q, k, _ = layer._heads(long, long, long)
    layer = made(nn.TopKAttention, k=5)
    q, k, _ = layer._heads(long, long, long)
    kept = torch.zeros(B, H, 700, 700, dtype=torch.bool).scatter(3, (q @ k.transpose(2, 3)).topk(5).indices, True)
    torch.testing.assert_close(run(layer, long), by_hand(layer, long, kept), **EXACT)
    assert pairs == [B * H * 700**2]  # all scores are needed
    with pytest.raises(ValueError, match="not both"):
        nn.TopKAttention(E, H, k=3, threshold=0.5)
    with pytest.raises(ValueError, match="threshold must be between 0 and 1"):
        nn.TopKAttention(E, H, threshold=2.0)


def test_attention_within_given_clusters(pairs: list[int]) -> None:
    q, k, v = normal((B, H, 11, 5), 1), normal((B, H, 17, 5), 2), normal((B, H, 17, 3), 3)
    a = torch.randint(0, 4, (B, H, 11))
    b = torch.randint(0, 4, (B, H, 17))
    b[0, 0] = 2  # clusters without a key, and without a query
    a[1, 1] = 3
    leaves = [t.requires_grad_() for t in (q, k, v)]
    output = clustered.attention_within_clusters(q, k, v, a, b, 4)
    mask = a.unsqueeze(3) == b.unsqueeze(2)
    assert pairs == [int(mask.sum())]
    expected = F.scaled_dot_product_attention_reference(q, k, v, mask)
    torch.testing.assert_close(output, expected, **EXACT)
    assert not output[0, 0][a[0, 0] != 2].any()
    for one, other in zip(*(torch.autograd.grad(o.square().sum(), leaves) for o in (output, expected)), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_clustered_attention(pairs: list[int]) -> None:
    x = tokens(64)
    one = made(nn.ClusteredAttention, clusters=1)
    torch.testing.assert_close(run(one, x), run(dense(one), x), **EXACT)
    padding = torch.arange(64) >= torch.tensor([[64], [30]])
    torch.testing.assert_close(run(one, x, padding=padding)[~padding], run(dense(one), x, padding=padding)[~padding])
    layer = made(nn.ClusteredAttention, clusters=4)
    pairs.clear()
    output = run(layer, x)
    q, k, _ = layer._heads(x, x, x)
    points = torch_F.normalize(torch.cat([q, k], 2).float(), dim=-1)
    labels = clustered.k_means(points, 4, 5)
    mask = labels[..., :64].unsqueeze(3) == labels[..., 64:].unsqueeze(2)
    torch.testing.assert_close(output, by_hand(layer, x, mask), **EXACT)
    assert pairs == [int(mask.sum())]
    assert pairs[0] < 0.5 * B * H * 64**2


def test_k_means_finds_groups() -> None:
    directions = torch_F.normalize(torch.eye(3), dim=1)
    truth = torch.arange(30) % 3
    points = torch_F.normalize(directions[truth] + normal((30, 3), 1, torch.float32) * 0.1, dim=1)
    labels = clustered.k_means(points, 3, 10)
    assert len({(a, b) for a, b in zip(truth.tolist(), labels.tolist(), strict=True)}) == 3


def shared_scores(layer: nn.ReformerAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shared, value = layer._heads(x, x, x)
    scores = shared @ torch_F.normalize(shared, dim=-1).transpose(2, 3) / math.sqrt(D)
    return shared, value, scores - 5e4 * torch.eye(x.shape[1], dtype=x.dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("across", [False, True])
def test_reformer_is_attention_over_the_union_of_its_rounds(across: bool, causal: bool) -> None:
    layer = made(nn.ReformerAttention, bucket_size=4, n_hashes=3, attend_across_buckets=across)
    x = tokens(24)
    padding = torch.arange(24) >= torch.tensor([[24], [17]])
    shared, value, scores = shared_scores(layer, x.masked_fill(padding.unsqueeze(2), 0))
    buckets = reformer.hash_vectors(shared, layer.rotations[:, :, :3])
    seen = torch.zeros(B, H, 24, 24, dtype=torch.bool)
    for b, h, r in itertools.product(range(B), range(H), range(3)):
        of = [int(n) if not padding[b, t] else 99 for t, n in enumerate(buckets[b, h, r])]
        order = sorted(range(24), key=lambda t: (of[t], t))
        for place, i in enumerate(order):
            begin = max(place // 4 - 1, 0) * 4
            for j in order[begin : (place // 4 + 1) * 4]:
                if across or of[i] == of[j]:
                    seen[b, h, i, j] = True
    seen &= ~padding[:, None, None, :]
    seen |= torch.eye(24, dtype=torch.bool)
    if causal:
        seen = seen.tril()
    assert 0.02 < seen.double().mean() < 0.9
    expected = joined(layer, scores.masked_fill(~seen, -math.inf).softmax(3) @ value)
    output = run(layer, x, causal, padding)
    torch.testing.assert_close(output[~padding], expected[~padding], rtol=1e-9, atol=1e-9)


def test_reformer_tends_to_dense_attention(pairs: list[int]) -> None:
    x = tokens(40)
    one = made(nn.ReformerAttention, bucket_size=40, n_hashes=2, attend_across_buckets=True)
    _, value, scores = shared_scores(one, x)
    torch.testing.assert_close(run(one, x), joined(one, scores.softmax(3) @ value), rtol=1e-9, atol=1e-9)
    later = torch.ones(40, 40, dtype=torch.bool).triu(1)
    causal = joined(one, scores.masked_fill(later, -math.inf).softmax(3) @ value)
    torch.testing.assert_close(run(one, x, causal=True), causal, rtol=1e-9, atol=1e-9)
    pairs.clear()
    errors = []
    for rounds in (1, 4, 16, 64):
        layer = made(nn.ReformerAttention, bucket_size=8, n_hashes=rounds)
        layer.load_state_dict({**one.state_dict(), "rotations": layer.rotations})
        errors.append((run(layer, x) - joined(one, scores.softmax(3) @ value)).square().mean().sqrt().item())
        assert pairs.pop() == B * H * rounds * 40 * 16
    assert sorted(errors, reverse=True) == errors
    assert errors[-1] < 0.25 * errors[0]
    run(made(nn.ReformerAttention, bucket_size=8, n_hashes=2), tokens(80))
    assert pairs == [B * H * 2 * 80 * 16]  # linear in the length


def test_routing(pairs: list[int]) -> None:
    x = tokens()
    one = made(nn.RoutingAttention, clusters=1, window=T).eval()
    for causal in (False, True):
        torch.testing.assert_close(run(one, x, causal), run(dense(one), x, causal), **EXACT)
    layer = made(nn.RoutingAttention, clusters=3, window=5).eval()
    pairs.clear()
    for causal in (False, True):
        q, k, v = layer._heads(x, x, x)
        expected = torch.zeros_like(q)
        for b, h in itertools.product(range(B), range(H)):
            times = torch.zeros(T, dtype=torch.float64)
            for centroid in layer.centroids[h]:
                rows, columns = (
                    (torch_F.normalize(t[b, h], dim=1) @ centroid).topk(5).indices.sort().values for t in (q, k)
                )
                mask = rows.unsqueeze(1) >= columns if causal else None
                part = F.scaled_dot_product_attention_reference(q[b, h, rows], k[b, h, columns], v[b, h, columns], mask)
                expected[b, h, rows] += part
                times[rows] += 1
            expected[b, h] /= times.clamp(min=1).unsqueeze(1)
        torch.testing.assert_close(run(layer, x, causal), joined(layer, expected), **EXACT)
    assert pairs == [B * H * 3 * 5**2] * 2


def test_routing_learns_its_centroids() -> None:
    layer = made(nn.RoutingAttention, clusters=2, window=3, decay=0.5, seed=1)
    before = layer.centroids.clone()
    run(layer.eval(), tokens())
    assert torch.equal(layer.centroids, before)
    run(layer.train(), tokens())
    assert not torch.equal(layer.centroids, before)
    torch.testing.assert_close(layer.centroids.norm(dim=2), torch.ones(H, 2, dtype=torch.float64))
    directions = torch_F.normalize(normal((2, D), 3), dim=1)
    layer.centroids.copy_(torch_F.normalize(directions + 0.3 * normal((H, 2, D), 4), dim=2))
    points = torch_F.normalize(directions[torch.arange(20) % 2] + 0.05 * normal((B, H, 20, D), 5), dim=3)
    for _ in range(20):
        layer.update(points)
    assert (layer.centroids * directions).sum(2).min() > 0.99
    still = layer.centroids.clone()
    layer.update(points, torch.zeros(B, 1, 20, dtype=torch.bool))  # of padding nothing is learned
    assert torch.equal(layer.centroids, still)


def test_sinkhorn_balances() -> None:
    scores = normal((2, 3, 6, 6), 1) * 0.75
    matrix = sinkhorn.sinkhorn(scores, 12)
    for dim in (2, 3):
        torch.testing.assert_close(matrix.sum(dim), torch.ones(2, 3, 6, dtype=torch.float64), rtol=0, atol=1e-3)
    allowed = torch.tensor([True] * 4 + [False] * 2)
    part = sinkhorn.sinkhorn(scores, 12, (allowed.unsqueeze(1) & allowed).expand_as(scores))
    torch.testing.assert_close(part[..., :4, :4], sinkhorn.sinkhorn(scores[..., :4, :4], 12))
    assert not part[..., 4:, :].any()
    assert not part[..., 4:].any()
    before = torch.ones(6, 6, dtype=torch.bool).tril(-1).expand_as(scores)
    causal = sinkhorn.sinkhorn(scores, 12, before, causal=True)
    changed = scores.clone()
    changed[..., 4:, :] += 1
    assert torch.equal(sinkhorn.sinkhorn(changed, 12, before, causal=True)[..., :4, :], causal[..., :4, :])
    assert not causal.triu().any()


@pytest.mark.parametrize("causal", [False, True])
def test_sinkhorn_with_a_permutation(causal: bool) -> None:
    q, k, v = (normal((B, H, 3, 4, 5), seed) for seed in (1, 2, 3))
    flat = [t.flatten(2, 3) for t in (q, k, v)]
    hidden = torch.zeros(B, 3, 4, dtype=torch.bool)
    block = torch.arange(12) // 4
    inside = (torch.arange(12).unsqueeze(1) >= torch.arange(12)) | torch.tensor(not causal)

    def attended(sort: Tensor, hidden: Tensor = hidden) -> Tensor:
        sort = sort.expand(B, H, 3, 3)
        return sinkhorn.attention_to_sorted_blocks(q, k, v, sort, hidden, causal, 0.0).flatten(2, 3)

    local = (block.unsqueeze(1) == block) & inside
    expected = F.scaled_dot_product_attention_reference(*flat, local)
    if causal:  # nothing comes before
        torch.testing.assert_close(attended(torch.zeros(3, 3, dtype=torch.float64)), expected, **EXACT)
    else:  # the identity: every key twice
        torch.testing.assert_close(attended(torch.eye(3, dtype=torch.float64)), expected, **EXACT)
    source = torch.tensor([0, 0, 1]) if causal else torch.tensor([1, 2, 0])
    sort = torch.eye(3, dtype=torch.float64)[source]
    if causal:
        sort[0] = 0
    moved = (source[block].unsqueeze(1) == block) & (torch.ones(12, 12).tril(-1).bool() | torch.tensor(not causal))
    both = local | moved if not causal else local | (moved & (block > 0).unsqueeze(1))
    torch.testing.assert_close(attended(sort), F.scaled_dot_product_attention_reference(*flat, both), **EXACT)
    padded = hidden.clone()
    padded[:, 1, 2:] = True
    expected = F.scaled_dot_product_attention_reference(*flat, both & ~padded.flatten(1)[:, None, None, :])
    torch.testing.assert_close(attended(sort, padded), expected, **EXACT)


def test_sinkhorn_pairs(pairs: list[int]) -> None:
    layer = made(nn.SinkhornAttention, block_size=4)
    for length in (30, 64):
        run(layer, tokens(length))
    assert pairs == [B * H * 32 * 8, B * H * 64 * 8]
    noisy = made(nn.SinkhornAttention, block_size=4, gumbel=True)
    assert not torch.equal(run(noisy, tokens()), run(noisy, tokens()))
    assert torch.equal(run(noisy.eval(), tokens()), run(noisy, tokens()))


# --- fewer keys ------------------------------------------------------------------------------------------------------


def test_linformer(pairs: list[int]) -> None:
    x = tokens()
    layer = made(nn.LinformerAttention, seq_len=T, k=T)
    for projection in (layer.key_projection, layer.value_projection):
        projection.data.copy_(torch.eye(T))
    torch.testing.assert_close(run(layer, x), run(dense(layer), x), **EXACT)
    layer = made(nn.LinformerAttention, seq_len=20, k=5, share_kv=True)
    assert layer.value_projection is None
    q, k, v = layer._heads(x, x, x)
    e = layer.key_projection[:, :T]
    expected = joined(layer, torch_F.scaled_dot_product_attention(q, e @ k, e @ v))
    torch.testing.assert_close(run(layer, x), expected, **EXACT)
    assert pairs == [B * H * T * T] * 2 + [B * H * T * 5]


def test_memory_compressed(pairs: list[int]) -> None:
    x = tokens()
    layer = made(nn.MemoryCompressedAttention, factor=1)
    for conv in (layer.key_conv, layer.value_conv):
        conv.weight.data.copy_(torch.eye(D).repeat(H, 1).unsqueeze(2))
        conv.bias.data.zero_()
    for causal in (False, True):
        torch.testing.assert_close(run(layer, x, causal), run(dense(layer), x, causal), **EXACT)
    layer = made(nn.MemoryCompressedAttention, factor=3)
    q, k, v = layer._heads(x, x, x)
    channels = [torch_F.pad(t.transpose(2, 3).flatten(1, 2), (0, 2)) for t in (k, v)]
    convs = (layer.key_conv, layer.value_conv)
    k, v = (
        torch_F.conv1d(t, c.weight, c.bias, 3, groups=H).unflatten(1, (H, D)).transpose(2, 3)
        for t, c in zip(channels, convs, strict=True)
    )
    pairs.clear()
    torch.testing.assert_close(run(layer, x), joined(layer, torch_F.scaled_dot_product_attention(q, k, v)), **EXACT)
    assert pairs == [B * H * T * 5]
    seen = torch.tensor([[3 * j + 2 <= i for j in range(5)] for i in range(T)])
    assert torch.equal(reduced_keys.CompressedCausal(3).to_dense(T, 5), seen)
    expected = joined(layer, F.scaled_dot_product_attention_reference(q, k, v, seen))
    torch.testing.assert_close(run(layer, x, causal=True), expected, **EXACT)


def test_compressed_causal_skips_tiles() -> None:
    pattern = reduced_keys.CompressedCausal(3)
    q, k = normal((1, 1, 700, 4), 1), normal((1, 1, 234, 4), 2)
    expected = F.scaled_dot_product_attention_reference(q, k, k, pattern.to_dense(700, 234))
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, k, pattern=pattern), expected, **EXACT)
    assert pattern.compile(700, 234)[1].shape[0] < 0.75 * 11 * 4


# --- linear attention ------------------------------------------------------------------------------------------------


TOKENS = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)  # of G6


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (nn.LinearMultiheadAttention, [[0.6875, 1.0], [0.565217, 1.217391], [0.636364, 1.090909]]),
        (nn.EfficientAttention, [[0.707510, 0.959537], [0.395538, 1.474821], [0.589698, 1.154127]]),
    ],
)
def test_golden_numbers_of_linear_attention(kind: type, expected: list[list[float]]) -> None:
    layer = kind(2, 1, batch_first=True, bias=False, dtype=torch.float64)
    layer.in_proj_weight.data.copy_(torch.eye(2).repeat(3, 1))
    layer.out_proj.weight.data.copy_(torch.eye(2))
    output = run(layer, TOKENS)
    torch.testing.assert_close(output, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-6)


def test_performer_estimates_softmax_attention() -> None:
    x = tokens() * 0.5
    plain = dense(nn.PerformerAttention(E, H, batch_first=True, dtype=torch.float64))

    def errors(features: int) -> Tensor:
        found = []
        for seed in range(60):
            layer = nn.PerformerAttention(E, H, batch_first=True, num_features=features, seed=seed, dtype=torch.float64)
            layer.load_state_dict(plain.state_dict(), strict=False)
            found.append(run(layer, x) - run(plain, x))
        return torch.stack(found)

    # the median: where a sum of estimates comes near zero an error is large
    deviation = [errors(m).abs().median().item() for m in (64, 256, 1024)]
    for more, fewer in itertools.pairwise(deviation):
        assert 1.6 < more / fewer < 2.5  # 1 / sqrt(m): half for four times the features
    many = errors(1024)
    assert many.mean(0).abs().mean() < 0.25 * many.abs().mean()  # the error is noise, not bias
    layer = made(nn.PerformerAttention, num_features=8)
    before = run(layer, x)
    layer.redraw(torch.Generator().manual_seed(9))
    assert not torch.equal(run(layer, x), before)


def test_random_feature_attention_estimates_a_gaussian_kernel() -> None:
    x = tokens()
    base_layer = made(nn.RandomFeatureAttention)
    base_layer.feature_map.sigma.data.uniform_(0.5, 1.5)
    weights = {k: v for k, v in base_layer.state_dict().items() if "projection" not in k}
    q, k, v = (t.unflatten(2, (H, D)).transpose(1, 2) for t in base_layer._project(x, x, x))
    q, k = (torch_F.normalize(t, dim=3) * base_layer.feature_map.sigma for t in (q, k))
    kernel = (-(q.unsqueeze(3) - k.unsqueeze(2)).square().sum(4) / 2).exp()
    exact = base_layer.out_proj((kernel / kernel.sum(3, keepdim=True) @ v).transpose(1, 2).flatten(2))
    deviation = []
    for features in (64, 256, 1024):
        found = []
        for seed in range(40):
            layer = made(nn.RandomFeatureAttention, num_features=features, seed=seed)
            layer.load_state_dict(weights, strict=False)
            found.append(run(layer, x) - exact)
        deviation.append(torch.stack(found).abs().median().item())
    for more, fewer in itertools.pairwise(deviation):
        assert 1.6 < more / fewer < 2.5


@pytest.mark.parametrize("length", [1, 63, 64, 150])
def test_gates_are_the_recurrence(length: int) -> None:
    q, k, v = (normal((B, H, length, n), seed).abs() for n, seed in ((3, 1), (3, 2), (5, 3)))
    log_gate = torch_F.logsigmoid(normal((B, H, length), 4) * 6 - 2)  # some nearly closed
    leaves = [t.requires_grad_() for t in (q, k, v, log_gate)]
    output = feature_maps.gated_linear_attention(*leaves)
    gate = log_gate.exp()
    state, z, expected = torch.zeros(B, H, 3, 5).double(), torch.zeros(B, H, 3).double(), []
    for t in range(length):
        g = gate[:, :, t, None]
        state = g.unsqueeze(3) * state + (1 - g).unsqueeze(3) * k[:, :, t].unsqueeze(3) * v[:, :, t].unsqueeze(2)
        z = g * z + (1 - g) * k[:, :, t]
        norm = (q[:, :, t] * z).sum(2, keepdim=True) + 1e-6
        expected.append((q[:, :, t].unsqueeze(2) @ state).squeeze(2) / norm)
    expected = torch.stack(expected, 2)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    for one, other in zip(*(torch.autograd.grad(o.sum(), leaves) for o in (output, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_gated_random_feature_attention() -> None:
    layer = made(nn.RandomFeatureAttention, num_features=64, gate=True)
    x = tokens().requires_grad_()
    output = run(layer, x, causal=True)
    (gradient,) = torch.autograd.grad(output[:, 5].sum(), x)
    assert not gradient[:, 6:].any()
    assert gradient[:, :6].any()
    padding = torch.arange(T) >= torch.tensor([[T], [7]])
    poisoned = x.detach().masked_fill(padding.unsqueeze(2), math.nan)
    real = run(layer, poisoned, causal=True, padding=padding)[~padding]
    torch.testing.assert_close(real, output[~padding])
    assert all(g.isfinite().all() for g in torch.autograd.grad(real.sum(), list(layer.parameters())))
    time_first = made(nn.RandomFeatureAttention, num_features=64, gate=True)
    time_first.load_state_dict(layer.state_dict())
    time_first.batch_first = False
    torch.testing.assert_close(run_time_first(time_first, x.transpose(0, 1)).transpose(0, 1), output)
    with pytest.raises(ValueError, match="with a gate it is causal self-attention"):
        run(layer, x)


def run_time_first(layer: torch.nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x, is_causal=True, need_weights=False)[0]


@pytest.mark.parametrize("kind", [nn.PerformerAttention, nn.RandomFeatureAttention])
def test_random_features_decode_token_by_token(kind: type) -> None:
    layer, x = made(kind, num_features=8).eval(), tokens()
    cache = layer.new_cache()
    with torch.no_grad():
        steps = [layer(t, t, t, need_weights=False, is_causal=True, cache=cache)[0] for t in x.split(1, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), run(layer, x, causal=True))


@pytest.mark.parametrize("kind", [nn.PerformerAttention, nn.RandomFeatureAttention, nn.EfficientAttention])
def test_operations_of_linear_attention_grow_linearly(kind: type) -> None:
    counts = []
    for length in (256, 512):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(kind(E, H, batch_first=True), torch.zeros(1, length, E))
        counts.append(counter.get_total_flops())
    assert counts[1] == 2 * counts[0] > 0


# --- without products of queries and keys ----------------------------------------------------------------------------


def test_synthesizer() -> None:
    x = tokens()
    layer = made(nn.SynthesizerAttention, seq_len=20)
    (v,) = layer._heads(x, x, x)
    scores = layer.scores[:, :T, :T]
    torch.testing.assert_close(run(layer, x), joined(layer, scores.softmax(2) @ v), **EXACT)
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    causal = scores.masked_fill(later, -math.inf).softmax(2)
    torch.testing.assert_close(run(layer, x, causal=True), joined(layer, causal @ v), **EXACT)
    layer.scores.data.zero_()  # mean pooling
    torch.testing.assert_close(run(layer, x), joined(layer, v.mean(2, keepdim=True).expand_as(v)), **EXACT)

    factors = made(nn.SynthesizerAttention, seq_len=20, mode="factorized_random", rank=3)
    layer.load_state_dict(
        {**factors.state_dict(), "scores": factors.left @ factors.right.transpose(1, 2)}, strict=False
    )
    torch.testing.assert_close(run(factors, x), run(layer, x), **EXACT)
    synthesised = made(nn.SynthesizerAttention, seq_len=20, mode="dense")
    (v,) = synthesised._heads(x, x, x)
    hidden = torch.relu(synthesised.hidden(x)).unflatten(2, (H, D)).transpose(1, 2)
    scores = torch.stack([hidden[:, h] @ synthesised.synthesis[h, :, :T] for h in range(H)], 1)
    torch.testing.assert_close(run(synthesised, x), joined(synthesised, scores.softmax(3) @ v), **EXACT)
    fixed = made(nn.SynthesizerAttention, trainable=False)
    assert not fixed.scores.requires_grad
    assert fixed.in_proj_weight.shape == (E, E)  # values alone
    with pytest.raises(ValueError, match="mode must be one of 'dense', 'random', 'factorized_random'; got 'fixed'"):
        nn.SynthesizerAttention(E, H, mode="fixed")
    with pytest.raises(ValueError, match="trainable=False belongs to the random modes"):
        nn.SynthesizerAttention(E, H, mode="dense", trainable=False)


def dft(n: int) -> Tensor:
    at = torch.arange(n, dtype=torch.float64)
    return torch.polar(torch.ones(n, n, dtype=torch.float64), -2 * math.pi * at.unsqueeze(1) * at / n)


def test_fnet_is_two_matrices() -> None:
    x = tokens()
    layer = made(nn.FNetMixing)
    expected = (dft(T) @ x.to(torch.complex128) @ dft(E)).real
    torch.testing.assert_close(run(layer, x), expected, rtol=1e-10, atol=1e-10)
    assert not list(layer.parameters())


def test_gated_and_plain_mlps() -> None:
    x = tokens()
    layer = made(nn.GatedMLPMixing, seq_len=20, hidden=12)
    layer.spatial_weight.data.normal_()
    u, v = torch_F.gelu(layer.in_proj(x)).chunk(2, -1)
    v = torch_F.layer_norm(v, (12,), layer.norm.weight, layer.norm.bias)
    for causal, weight in ((False, layer.spatial_weight), (True, layer.spatial_weight.tril())):
        expected = layer.out_proj(u * (weight[:T, :T] @ v + layer.spatial_bias[:T, None]))
        torch.testing.assert_close(run(layer, x, causal), expected, **EXACT)
    fresh = nn.GatedMLPMixing(E, batch_first=True, seq_len=20, dtype=torch.float64)
    u = torch_F.gelu(fresh.in_proj(x)).chunk(2, -1)[0]  # begins as a feed-forward block
    torch.testing.assert_close(run(fresh, x), fresh.out_proj(u), rtol=0, atol=5e-3)
    layer = made(nn.MLPMixing, seq_len=T, hidden=7)
    expected = layer.back(torch_F.gelu(layer.into(x.transpose(1, 2)))).transpose(1, 2)
    torch.testing.assert_close(run(layer, x), expected, **EXACT)


@pytest.mark.parametrize(
    ("kind", "power"), [(nn.GatedMLPMixing, 2), (nn.MLPMixing, 1)], ids=lambda value: getattr(value, "__name__", None)
)
def test_operations_of_mlps(kind: type, power: int) -> None:
    """A square of the positions for gates, the hidden width times them for the mixer."""
    layer = kind(E, batch_first=True, seq_len=512, hidden=8)
    counts = []
    for length in (256, 512):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(layer, torch.zeros(1, length, E))
        channels = 2 * length * E * 8 * (3 if power == 2 else 0)  # the projections of channels
        counts.append(counter.get_total_flops() - channels)
    assert counts[1] == counts[0] * 2**power
    assert counts[0] == (2 * 8 * 256**2 if power == 2 else 2 * 2 * 256 * 8 * E)


def test_multiplications_of_the_lectures() -> None:
    """G5: (d + d') N^2 for K Q^T first, 2 d d' N for V K^T first; equal at N = 2 d d' / (d + d')."""

    def counts(n: int, d: int, e: int) -> tuple[int, int]:
        q, k, v = torch.zeros(n, d), torch.zeros(n, d), torch.zeros(n, e)
        found = []
        for product in (lambda: (q @ k.T) @ v, lambda: q @ (k.T @ v)):
            with FlopCounterMode(display=False) as counter:
                product()
            found.append(counter.get_total_flops() // 2)
        return found[0], found[1]

    assert counts(1024, 64, 64) == (134_217_728, 8_388_608)
    assert counts(64, 64, 64) == (524_288, 524_288)
    assert counts(32, 64, 64) == (131_072, 262_144)
    assert counts(4096, 64, 128) == (3_221_225_472, 67_108_864)
    assert masks.Local(1).to_dense(8, 8).sum() == 22  # G12
