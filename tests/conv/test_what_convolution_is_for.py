"""What the lectures say about convolutional networks, as checks: parameters, locality, augmentation, boards, text."""

from __future__ import annotations

import pytest
import torch
from support import DTYPES, normal
from torch import Tensor

import pyseqnet.functional as F
from pyseqnet import models, nn
from pyseqnet.data import images as digits


def parameters(layer: torch.nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())


def test_sharing_saves_parameters() -> None:
    """A2, A8, A10, A14: fully connected 3e7, locally connected 17 280 000, convolution 1792."""
    assert torch.nn.Linear(100 * 100 * 3, 1000, bias=False, device="meta").weight.numel() == 30_000_000
    local = nn.LocallyConnected2d(3, 64, 3, input_size=100, padding=1, bias=False, device="meta")
    assert parameters(local) == 17_280_000
    convolution = nn.Conv2d(3, 64, 3, padding=1)
    assert parameters(convolution) == 1792
    assert convolution.weight.shape == (64, 3, 3, 3)
    assert nn.Conv2d(64, 64, 3).weight.shape == (64, 64, 3, 3)  # the next layer's filters are as deep as the maps


# --- locally connected (A10) -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), ((2, 1), (1, 2))])
def test_locally_connected_is_its_definition(stride: object, padding: object, dtype: torch.dtype) -> None:
    layer = nn.LocallyConnected2d(3, 4, (3, 2), (7, 6), stride, padding, dtype=torch.float64)
    x = normal((2, 3, 7, 6), 0)
    exact = torch.zeros(2, 4, *layer.output_size, dtype=torch.float64)
    strides, pads = layer.stride, layer.padding
    padded = torch.nn.functional.pad(x, (pads[1], pads[1], pads[0], pads[0]))
    for p in range(layer.output_size[0]):
        for q in range(layer.output_size[1]):
            top, left = p * strides[0], q * strides[1]
            patch = padded[:, :, top : top + 3, left : left + 2]
            exact[:, :, p, q] = torch.einsum("ncrs,kcrs->nk", patch, layer.weight[p, q]) + layer.bias[:, p, q]
    w, b = layer.weight.detach().to(dtype), layer.bias.detach().to(dtype)
    bound = 8 * torch.finfo(dtype).eps
    for function in (F.locally_connected2d, F.locally_connected2d_reference):
        found = function(x.to(dtype), w, b, stride, padding)
        assert found.is_contiguous()
        torch.testing.assert_close(found.double(), exact.detach(), rtol=bound, atol=bound)
        torch.testing.assert_close(function(x[1].to(dtype), w, b, stride, padding), found[1], rtol=bound, atol=bound)


def test_locally_connected_with_equal_filters_is_a_convolution() -> None:
    convolution = nn.Conv2d(3, 4, 3, 2, 1)
    layer = nn.LocallyConnected2d(3, 4, 3, 9, 2, 1)
    with torch.no_grad():
        layer.weight.copy_(convolution.weight.expand_as(layer.weight))
        layer.bias.copy_(convolution.bias[:, None, None].expand_as(layer.bias))
    x = normal((2, 3, 9, 9), 0, torch.float32)
    torch.testing.assert_close(layer(x), convolution(x))
    layer.load_state_dict(nn.LocallyConnected2d(3, 4, 3, 9, 2, 1).state_dict(), strict=True)
    assert not torch.allclose(layer(x), convolution(x))
    shifted = layer(x.roll(2, 3))
    assert not torch.allclose(shifted[..., 2:], layer(x)[..., 1:-1])  # not equivariant any more


def test_locally_connected_gradients_and_compile() -> None:
    x, w, b = normal((2, 2, 4, 3), 0), normal((3, 2, 3, 2, 2, 2), 1), normal((3, 3, 2), 2)
    inputs = [t.requires_grad_() for t in (x, w, b)]
    assert torch.autograd.gradcheck(F.locally_connected2d, inputs)
    assert torch.autograd.gradgradcheck(F.locally_connected2d, inputs)
    compiled = torch.compile(F.locally_connected2d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w, b), F.locally_connected2d(x, w, b))


@pytest.mark.parametrize(
    ("shapes", "options", "words"),
    [
        (((1, 2, 4, 4), (3, 3, 5, 2, 2), None), {}, "weight must have 6 dimensions"),
        (((1, 2, 4), (3, 3, 5, 2, 2, 2), None), {}, "channels"),
        (((4, 4), (3, 3, 5, 2, 2, 2), None), {}, "input must have"),
        (((1, 3, 4, 4), (3, 3, 5, 2, 2, 2), None), {}, "2 channels, got 3"),
        (((1, 2, 4, 4), (3, 3, 5, 2, 2, 2), (5,)), {}, r"bias must have shape \(5, 3, 3\)"),
        (((1, 2, 5, 4), (3, 3, 5, 2, 2, 2), None), {}, "3 x 3 positions"),
        (((1, 2, 4, 4), (3, 3, 5, 2, 2, 2), None), {"stride": 0}, "stride must be positive"),
    ],
)
def test_locally_connected_refuses(shapes: tuple, options: dict, words: str) -> None:
    tensors = [None if shape is None else torch.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match=words):
        F.locally_connected2d(*tensors, **options)


def test_locally_connected_layer_refuses() -> None:
    with pytest.raises(ValueError, match="larger than the padded input_size"):
        nn.LocallyConnected2d(1, 1, 5, 4)
    with pytest.raises(ValueError, match="stride must be positive"):
        nn.LocallyConnected2d(1, 1, 2, 4, stride=0)


# --- other views of the same sum ---------------------------------------------------------------------------------


def test_a_window_classifier_is_a_convolution() -> None:
    """D10: an MLP on each word and its neighbours = Conv1d of the window's width, then of width 1."""
    w, length, features, hidden, tags = 2, 9, 6, 8, 3
    first, second = torch.nn.Linear((2 * w + 1) * features, hidden), torch.nn.Linear(hidden, tags)
    words = normal((2, length, features), 0, torch.float32)
    padded = torch.nn.functional.pad(words, (0, 0, w, w))
    windows = padded.unfold(1, 2 * w + 1, 1).transpose(2, 3).flatten(2)  # (N, length, window * features)
    by_window = second(torch.relu(first(windows)))
    wide, narrow = nn.Conv1d(features, hidden, 2 * w + 1, padding=w), nn.Conv1d(hidden, tags, 1)
    with torch.no_grad():
        wide.weight.copy_(first.weight.view(hidden, 2 * w + 1, features).transpose(1, 2))
        narrow.weight.copy_(second.weight.unsqueeze(2))
        wide.bias.copy_(first.bias)
        narrow.bias.copy_(second.bias)
    by_convolution = narrow(torch.relu(wide(words.transpose(1, 2)))).transpose(1, 2)
    torch.testing.assert_close(by_convolution, by_window)


def test_attention_can_be_a_convolution() -> None:
    """D26 (Cordonnier et al., 2020): nine heads, each looking at one fixed neighbour, are a 3x3 convolution."""
    size, channels, filters = 6, 4, 5
    x, w = normal((2, channels, size, size), 0, torch.float32), normal((filters, channels, 3, 3), 1, torch.float32)
    row, column = torch.arange(size).repeat_interleave(size), torch.arange(size).repeat(size)
    offsets = [(r, s) for r in (-1, 0, 1) for s in (-1, 0, 1)]
    sees = torch.stack(
        [(row == row[:, None] + r) & (column == column[:, None] + s) for r, s in offsets]
    )  # (heads, queries, keys): at most one key; none where the neighbour lies outside: attention gives 0 there
    tokens = x.flatten(2).transpose(1, 2)  # (N, pixels, channels)
    values = torch.einsum("npc,kch->nhpk", tokens, w.flatten(2))
    nothing = torch.zeros(2, 9, size * size, 1)
    heads = F.scaled_dot_product_attention(nothing, nothing, values, sees[None])
    by_attention = heads.sum(1).transpose(1, 2).unflatten(2, (size, size))
    torch.testing.assert_close(by_attention, F.conv2d(x, w, padding=1), rtol=1e-5, atol=1e-5)


# --- what convolution does not do --------------------------------------------------------------------------------


def train(model: torch.nn.Module, steps: int, batch) -> torch.nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(steps):
        inputs, labels = batch(step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model


def accuracy(model: torch.nn.Module, inputs: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(inputs).argmax(1) == labels).float().mean())


def test_rotation_has_to_be_shown() -> None:
    """A21: turned digits are not recognised; a network that saw turned ones in training recognises them."""
    pytest.importorskip("sklearn")
    data = digits.digits(0)
    generator = torch.Generator().manual_seed(0)

    def batch(most: float):
        def make(step: int) -> tuple[Tensor, Tensor]:
            chosen = torch.randint(len(data.train_labels), (64,), generator=generator)
            angles = (2 * torch.rand(64, generator=generator) - 1) * most
            images = data.train_images[chosen]
            return digits.turned_and_scaled(images, angles, 1.0) if most else images, data.train_labels[chosen]

        return make

    turned = digits.turned_and_scaled(data.test_images, 40.0, 1.0)
    torch.manual_seed(0)
    plain = train(models.ImageClassifier(1, 8, (16, 32)), 150, batch(0))
    torch.manual_seed(0)
    augmented = train(models.ImageClassifier(1, 8, (16, 32)), 250, batch(50))
    assert accuracy(plain, data.test_images, data.test_labels) > 0.94
    assert accuracy(plain, turned, data.test_labels) < 0.75
    assert accuracy(augmented, turned, data.test_labels) > 0.88
    assert accuracy(augmented, data.test_images, data.test_labels) > 0.88


def test_rotating_by_right_angles_is_exact() -> None:
    images = normal((3, 1, 8, 8), 0, torch.float32)
    found = digits.turned_and_scaled(images, torch.tensor([0.0, 90.0, 180.0]), 1.0)
    expected = torch.stack([images[0], images[1].rot90(1, (1, 2)), images[2].rot90(2, (1, 2))])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_policy_of_go() -> None:
    """A20: 19x19x48 in, zero-padded to 23x23 by the first layer, nothing pooled, 361 scores out."""
    policy = models.GoPolicy(filters=8)
    kernels = [m.kernel_size for m in policy.modules() if isinstance(m, nn.Conv2d)]
    assert kernels == [(5, 5), *[(3, 3)] * 11, (1, 1)]
    assert not any(isinstance(m, (torch.nn.MaxPool2d, torch.nn.AvgPool2d)) for m in policy.modules())
    boards = normal((2, 48, 19, 19), 0, torch.float32)
    scores = policy(boards)
    assert scores.shape == (2, 361)
    torch.testing.assert_close(policy(boards[1]), scores[1], rtol=1e-4, atol=1e-5)
    scores.square().sum().backward()
    assert all(p.grad is not None for p in policy.parameters())
    whole = models.GoPolicy()
    filters = 48 * 192 * 25 + 192 + 11 * (192 * 192 * 9 + 192) + 192
    assert parameters(whole) == filters + 361
    with pytest.raises(ValueError, match="layers must be"):
        models.GoPolicy(layers=0)
    pooled = models.GoPolicy(3, 4, 2, 5, pool=2)
    board = pooled(normal((1, 3, 5, 5), 0, torch.float32)).view(5, 5)
    torch.testing.assert_close(board[0], board[1])  # rows 0 and 1 share what was pooled, row 2 begins the next
    assert (board[1] - board[2]).abs().max() > 1e-6


def test_boards_need_every_point() -> None:
    """A20: the answer is the point right of the only stone. Pooling cannot say which of four points that was."""
    size = 9

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        row, column = (torch.randint(n, (64,), generator=generator) for n in (size, size - 1))
        boards = torch.zeros(64, 1, size, size)
        boards[torch.arange(64), 0, row, column] = 1
        return boards, row * size + column + 1

    torch.manual_seed(0)
    policy = train(models.GoPolicy(1, 8, 2, size), 120, batch)
    torch.manual_seed(0)
    pooled = torch.nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2), torch.nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(8, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Upsample((size, size)),
        nn.Conv2d(8, 1, 1), torch.nn.Flatten(),
    )  # fmt: skip
    train(pooled, 120, batch)
    boards, answers = batch(1000)
    assert accuracy(policy, boards, answers) > 0.95
    assert accuracy(pooled, boards, answers) < 0.6
