"""Attention over pixels and along edges, the vision Transformer, and what self-attention can and cannot tell apart."""

from __future__ import annotations

import math

import pytest
import torch
from support import normal
from torch import Tensor

import pyseqnet.functional as F
from pyseqnet import models, nn


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def compiled(layer: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(layer, fullgraph=True, backend="aot_eager")


# --- images ----------------------------------------------------------------------------------------------------------


def test_an_image_is_the_set_of_its_pixels() -> None:
    layer = nn.ImageSelfAttention(6, 2).eval()
    image = normal((2, 6, 5, 10), 1, torch.float32)
    pixels = image.permute(0, 2, 3, 1).reshape(2, 50, 6)
    expected, _ = layer.attention(pixels, pixels, pixels)
    output = layer(image)
    torch.testing.assert_close(output.permute(0, 2, 3, 1).reshape(2, 50, 6), expected)
    order = torch.randperm(50)  # without positions, pixels may be shuffled
    shuffled = image.flatten(2)[:, :, order].unflatten(2, (5, 10))
    torch.testing.assert_close(layer(shuffled).flatten(2), output.flatten(2)[:, :, order])
    torch.testing.assert_close(layer(image.contiguous(memory_format=torch.channels_last)), output)
    with pytest.raises(ValueError, match=r"input must be \(N, 6, H, W\)"):
        layer(image[:, :5])
    with pytest.raises(TypeError, match="batch first"):
        nn.ImageSelfAttention(6, 2, batch_first=False)


def block_reference(block: nn.SelfAttention2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """The block of Zhang et al. in plain torch."""
    conv, pool = torch.nn.functional.conv2d, torch.nn.functional.max_pool2d
    query = conv(x, block.query.weight).flatten(2).transpose(1, 2)
    key, value = (pool(conv(x, part.weight), 2).flatten(2) for part in (block.key, block.value))
    weights = torch.softmax(query @ key, -1)
    image = (weights @ value.transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])
    return x + block.gamma * conv(image, block.out.weight), weights


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_block_of_self_attention_gans(spectral_norm: bool) -> None:
    block = nn.SelfAttention2d(16, spectral_norm).double()
    x = normal((2, 16, 7, 6), 1)
    assert torch.equal(block(x), x)  # gamma starts at 0
    with torch.no_grad():
        block.gamma.fill_(0.7)
    block.eval()  # spectral normalisation then holds its weights
    output, weights = block(x, need_weights=True)
    expected, expected_weights = block_reference(block, x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights, expected_weights)
    assert weights.shape == (2, 42, 9)
    if spectral_norm:
        for part in (block.query, block.value):
            assert torch.linalg.matrix_norm(part.weight[:, :, 0, 0], 2) < 1.3  # one power iteration at the start
    parameters = list(block.parameters())
    found = torch.autograd.grad(output.square().sum(), parameters)
    for one, other in zip(found, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
        torch.testing.assert_close(one, other)


def test_block_refuses_and_compiles() -> None:
    for channels in (0, 12):
        with pytest.raises(ValueError, match="multiple of 8"):
            nn.SelfAttention2d(channels)
    block = nn.SelfAttention2d(8, spectral_norm=False)
    with pytest.raises(ValueError, match="H, W >= 2"):
        block(torch.zeros(1, 8, 1, 4))
    assert block(torch.zeros(0, 8, 4, 4)).shape == (0, 8, 4, 4)
    torch.nn.init.ones_(block.gamma)
    x = normal((1, 8, 4, 4), 1, torch.float32)
    torch.testing.assert_close(compiled(block)(x), block(x))


def test_vision_transformer() -> None:
    model = models.VisionTransformer(
        5, image_size=(8, 12), patch_size=4, channels=2, d_model=16, num_layers=2, layers={"attention": "linear"}
    )
    image = normal((3, 2, 8, 12), 1, torch.float32)
    assert model.encode(image).shape == (3, 1 + 6, 16)
    # A patch is one linear map of its pixels.
    patches = image.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(3, 6, -1)
    expected = torch.nn.functional.linear(patches, model.patches.weight.flatten(1), model.patches.bias)
    torch.testing.assert_close(model.patches(image).flatten(2).transpose(1, 2), expected)
    for text, options in (("multiples of patch_size", {"image_size": 10}), ("multiples", {"patch_size": 0})):
        with pytest.raises(ValueError, match=text):
            models.VisionTransformer(5, **options)
    with pytest.raises(ValueError, match=r"image must be \(N, C, 8, 12\)"):
        model(image.transpose(2, 3))


def test_vision_transformer_learns_where_the_bright_patch_is() -> None:
    model = models.VisionTransformer(4, image_size=8, patch_size=4, channels=1, d_model=16, nhead=2, num_layers=1)
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 4, (64,), generator=generator)
    images = 0.3 * torch.randn(64, 1, 8, 8, generator=generator)
    for n, where in enumerate(label.tolist()):
        images[n, :, where // 2 * 4 : where // 2 * 4 + 4, where % 2 * 4 : where % 2 * 4 + 4] += 1
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), label).backward()
        optimizer.step()
    assert (model(images).argmax(1) == label).float().mean() > 0.95


def test_heads_with_fixed_offsets_are_a_convolution() -> None:
    """Cordonnier, Loukas and Jaggi, 2020: nine heads that each look at one neighbour are a 3x3 convolution."""
    height, width, channels, filters = 5, 6, 4, 3
    image, weight = normal((1, channels, height, width), 1), normal((filters, channels, 3, 3), 2)
    row, column = (t.flatten() for t in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    offsets = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1)]
    sees = torch.stack(
        [(row[None] - row[:, None] == r) & (column[None] - column[:, None] == c) for r, c in offsets]
    )  # (9, queries, keys); at the edge a query sees nothing, which is zero padding
    pixels = image.flatten(2).transpose(1, 2).unsqueeze(1).expand(1, 9, -1, -1)
    heads = F.scaled_dot_product_attention(pixels, pixels, pixels, sees)
    output = torch.einsum("bhpc,och->bop", heads, weight.flatten(2)).unflatten(2, (height, width))
    torch.testing.assert_close(output, torch.nn.functional.conv2d(image, weight, padding=1))


def test_i_saw_a_saw() -> None:
    """Two equal words get equal outputs from any layer that sees each word alone, and from self-attention without
    positions, whose output follows its inputs' order; positions or a causal mask tell them apart."""
    first, second = 1, 3
    words = torch.nn.Embedding(3, 16)(torch.tensor([[0, 1, 2, 1]]))  # I saw a saw
    connected = torch.nn.Linear(16, 8)(words)
    torch.testing.assert_close(connected[:, first], connected[:, second])
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    output = layer(words)
    torch.testing.assert_close(output[:, first], output[:, second])
    placed = layer(nn.SinusoidalPositions(16, batch_first=True)(words))
    causal = layer(words, src_mask=torch.ones(4, 4, dtype=torch.bool).triu(1), is_causal=True)
    for told in (placed, causal):
        assert (told[:, first] - told[:, second]).abs().max() > 1e-2


# --- graphs ----------------------------------------------------------------------------------------------------------


def dense_graph_attention(layer: nn.GraphAttention, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """The same with a dense mask: (output, alpha (heads, N, N))."""
    nodes = x.shape[0]
    sees = torch.zeros(nodes, nodes, dtype=torch.bool)
    sees[edges[1], edges[0]] = True
    if layer.add_self_loops:
        sees |= torch.eye(nodes, dtype=torch.bool)
    projected = layer.lin(x).view(nodes, layer.heads, layer.out_features)
    source, target = ((projected * att).sum(-1).T for att in (layer.att_src, layer.att_dst))  # (heads, N)
    scores = torch.nn.functional.leaky_relu(source[:, None] + target[:, :, None], layer.negative_slope)
    alpha = torch.softmax(scores.masked_fill(~sees, -math.inf), -1).nan_to_num()
    output = torch.einsum("hij,jhc->ihc", alpha, projected)
    output = output.flatten(1) if layer.concat else output.mean(1)
    return output + layer.bias, alpha


@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("loops", [False, True])
def test_edges_and_the_dense_mask_agree(concat: bool, loops: bool) -> None:
    layer = nn.GraphAttention(5, 3, heads=2, concat=concat, add_self_loops=loops).double()
    torch.nn.init.normal_(layer.bias)
    x = (normal((9, 5), 1) * 20).requires_grad_()  # scores far apart: no overflow
    generator = torch.Generator().manual_seed(1)
    edges = (torch.rand(9, 9, generator=generator) > 0.6).nonzero().T
    edges = edges[:, edges[1] != 4]  # one node that nobody points to
    output, (used, alpha) = layer(x, edges, need_weights=True)
    expected, dense = dense_graph_attention(layer, x, edges)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(alpha, dense[:, used[1], used[0]].T)
    leaves = [x, *layer.parameters()]
    found = torch.autograd.grad(output.square().sum(), leaves)
    for one, other in zip(found, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        torch.testing.assert_close(one, other)


def test_graph_attention_derivatives_and_compilation() -> None:
    layer = nn.GraphAttention(3, 2, heads=2).double()
    edges = torch.tensor([[0, 1, 2, 2, 0], [1, 2, 0, 1, 2]])
    x = normal((4, 3), 1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: layer(x, edges), [x])
    torch.testing.assert_close(compiled(layer)(x, edges), layer(x, edges))
    order = torch.tensor([2, 0, 3, 1])  # renaming the nodes renames the outputs
    renamed = torch.empty(4, dtype=torch.int64)
    renamed[order] = torch.arange(4)
    torch.testing.assert_close(layer(x[order], renamed[edges]), layer(x, edges)[order])
    none = edges[:, :0]
    torch.testing.assert_close(layer(x, none), layer.lin(x))  # every node sees itself only
    assert layer(x[:0], none).shape == (0, 4)


def test_graph_attention_refuses() -> None:
    layer = nn.GraphAttention(3, 2)
    x, edges = torch.zeros(4, 3), torch.tensor([[0, 1], [1, 2]])
    for arguments, error, text in (
        ((x[:, :2], edges), ValueError, r"x must be \(N, 3\)"),
        ((x, edges.T[:1]), ValueError, r"edge_index must be \(2, edges\)"),
        ((x, edges.int()), TypeError, "edge_index must be an int64 tensor, got torch.int32"),
        ((x, [[0], [1]]), TypeError, "edge_index must be an int64 tensor, got list"),
        ((x, edges + 2), ValueError, "between 0 and 3"),
        ((x, edges - 1), ValueError, "between 0 and 3"),
    ):
        with pytest.raises(error, match=text):
            layer(*arguments)
    for options, text in (({"heads": 0}, "heads"), ({"dropout": 1.0}, "dropout")):
        with pytest.raises(ValueError, match=text):
            nn.GraphAttention(3, 2, **options)


def test_dropout_drops_edges_in_training_only() -> None:
    layer = nn.GraphAttention(3, 4, dropout=0.5)
    x, edges = normal((6, 3), 1, torch.float32), torch.combinations(torch.arange(6)).T
    assert not torch.equal(layer(x, edges), layer(x, edges))
    layer.eval()
    assert torch.equal(layer(x, edges), layer(x, edges))
