"""Self-attention beside what it is compared with: a layer over the whole sentence, recurrence, convolution."""

from __future__ import annotations

import pytest
import torch
from support import normal
from torch import Tensor

import pyseqnet.functional as F
from pyseqnet import models, nn


def test_a_layer_over_the_whole_sentence() -> None:
    """For one input, attention is a fully connected layer over all positions, with the Kronecker product of the
    attention matrix and the value projection as its weight. That layer has a weight for every pair of positions and
    ends at the sentence that it was made for; attention's parameters know of no length."""
    length, width = 7, 6
    x = normal((1, length, width), 0, torch.float64)
    layer = nn.MultiheadAttention(width, 1, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        output, weights = layer(x, x, x)
        value = layer.in_proj_weight[2 * width :]
        whole = torch.nn.Linear(length * width, length * width, dtype=torch.float64)
        whole.weight.copy_(torch.kron(weights[0], layer.out_proj.weight @ value))
        shift = layer.out_proj(layer.in_proj_bias[2 * width :])
        whole.bias.copy_(shift.repeat(length))
        torch.testing.assert_close(whole(x.flatten()), output.flatten())
        assert layer(*[normal((1, 50, width), 1, torch.float64)] * 3)[0].shape == (1, 50, width)
        with pytest.raises(RuntimeError):
            whole(normal((50 * width,), 1, torch.float64))
    assert whole.weight.numel() == length**2 * width**2
    assert sum(p.numel() for p in layer.parameters()) == 4 * (width**2 + width)


def test_distance_costs_recurrence_steps_and_attention_none() -> None:
    """The first token's gradient at the last position decays by a factor a step through a recurrent layer; one layer
    of attention joins them directly, and moving the token to the neighbouring place changes nothing."""
    length, width = 60, 8
    x = normal((1, length, width), 0, torch.float64).requires_grad_()
    recurrent = nn.RNN(width, width, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        recurrent.weight_hh_l0.copy_(0.5 * torch.eye(width))
    slope = torch.autograd.grad(recurrent(x)[0][:, -1].sum(), x)[0].norm(dim=2)[0]
    assert slope[0] < slope[-1] * 0.5 ** (length - 1)

    out = F.scaled_dot_product_attention(x, x, x)
    direct = torch.autograd.grad(out[:, -1].sum(), x)[0].norm(dim=2)[0]
    assert direct[0] > 1e-4
    order = [length - 2, *range(1, length - 2), 0, length - 1]
    moved = F.scaled_dot_product_attention(*[x[:, order]] * 3)
    torch.testing.assert_close(moved[:, -1], out[:, -1])


def _crosses(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with an upright or a diagonal cross of 3 x 3 pixels somewhere."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = 0.3 * torch.randn(count, 1, 16, 16, generator=generator), torch.arange(count) % 2
    diagonal = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    upright = torch.tensor([[0.0, 1, 0], [1, 1, 1], [0, 1, 0]])
    places = torch.randint(0, 14, (count, 2), generator=generator).tolist()
    for image, label, (row, column) in zip(images, labels, places, strict=True):
        image[0, row : row + 3, column : column + 3] += upright if label else diagonal
    return images, labels


def _accuracy(model: torch.nn.Module) -> float:
    """On new images, after 60 steps on 200."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    (images, labels), (new_images, new_labels) = _crosses(200, 1), _crosses(500, 2)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    with torch.no_grad():
        return (model.eval()(new_images).argmax(1) == new_labels).float().mean().item()


def test_few_images_favour_convolution() -> None:
    """What a convolution knows from the start (small things that may stand anywhere), attention must learn from data
    (Dosovitskiy et al., An image is worth 16x16 words, 2021): with few images it generalises worse."""
    torch.manual_seed(0)
    convolution = torch.nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        torch.nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveMaxPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 2),
    )
    transformer = models.VisionTransformer(
        2, image_size=16, patch_size=4, channels=1, d_model=32, nhead=4, num_layers=2, dim_feedforward=64
    )
    of_convolution, of_transformer = _accuracy(convolution), _accuracy(transformer)
    assert of_convolution > 0.85
    assert of_transformer < of_convolution - 0.1
