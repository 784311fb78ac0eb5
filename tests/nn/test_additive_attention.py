"""nn.AdditiveAttention and nn.LocationAwareAttention: against plain torch, step by step and in a loop."""

from __future__ import annotations

import math

import pytest
import torch
from support import normal
from torch import Tensor

from pyseqnet import nn


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return normal((3, 4, 6), 1, dtype), normal((3, 7, 5), 2, dtype), torch.tensor([7, 2, 5])


def visible(key: Tensor, lengths: Tensor) -> Tensor:
    return (torch.arange(key.shape[1]) < lengths.unsqueeze(1)).unsqueeze(1)


def test_additive_is_the_formula() -> None:
    torch.manual_seed(0)
    layer = nn.AdditiveAttention(6, 5, 8).double()
    torch.nn.init.normal_(layer.bias)
    query, key, lengths = inputs(torch.float64)
    output, weights = layer(query, key, key_lengths=lengths)
    total = layer.query_proj(query).unsqueeze(2) + layer.key_proj(key).unsqueeze(1) + layer.bias
    scores = (torch.tanh(total) @ layer.weight).masked_fill(~visible(key, lengths), -math.inf)
    torch.testing.assert_close(weights, scores.softmax(-1))
    torch.testing.assert_close(output, scores.softmax(-1) @ key)
    once = layer.project_key(key)
    for i in range(query.shape[1]):  # steps of a decoder
        out, weight = layer(query[:, i], key, key_lengths=lengths, projected_key=once)
        torch.testing.assert_close(out, output[:, i])
        torch.testing.assert_close(weight, weights[:, i])
    assert layer(query, key, need_weights=False)[1] is None


def location_reference(layer: nn.LocationAwareAttention, query: Tensor, key: Tensor, lengths: Tensor) -> list[Tensor]:
    """Equation 8 of Chorowski et al. in plain torch, a query at a time."""
    previous = cumulative = query.new_zeros(key.shape[:2])
    outputs, weights = [], []
    for i in range(query.shape[1]):
        past = torch.stack([previous, cumulative], 1) if layer.cumulative else previous.unsqueeze(1)
        kernel = layer.location_conv.weight
        features = torch.nn.functional.conv1d(past, kernel, padding=kernel.shape[2] // 2).transpose(1, 2)
        total = layer.query_proj(query[:, i]).unsqueeze(1) + layer.key_proj(key) + layer.location_proj(features)
        scores = torch.tanh(total + layer.bias) @ layer.weight
        previous = scores.masked_fill(~visible(key, lengths)[:, 0], -math.inf).softmax(-1)
        cumulative = cumulative + previous
        outputs.append((previous.unsqueeze(1) @ key).squeeze(1))
        weights.append(previous)
    return [torch.stack(outputs, 1), torch.stack(weights, 1), previous, cumulative]


@pytest.mark.parametrize("cumulative", [False, True])
def test_location_aware_is_the_formula(cumulative: bool) -> None:
    torch.manual_seed(0)
    layer = nn.LocationAwareAttention(6, 5, 8, channels=3, kernel_size=5, cumulative=cumulative).double()
    query, key, lengths = inputs(torch.float64)
    output, weights, state = layer(query, key, key_lengths=lengths)
    expected = location_reference(layer, query, key, lengths)
    for one, other in zip((output, weights, *state), expected, strict=True):
        torch.testing.assert_close(one, other)
    # the same in single steps, and gradients through the chain of weights
    steps, state = [], None
    for i in range(query.shape[1]):
        out, _, state = layer(query[:, i], key, key_lengths=lengths, state=state)
        steps.append(out)
    torch.testing.assert_close(torch.stack(steps, 1), output)
    parameters = list(layer.parameters())
    found = torch.autograd.grad(output.square().sum(), parameters)
    wanted = torch.autograd.grad(expected[0].square().sum(), parameters)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_without_location_it_is_additive() -> None:
    torch.manual_seed(0)
    layer = nn.LocationAwareAttention(6, 5, 8, channels=3, kernel_size=5)
    torch.nn.init.zeros_(layer.location_proj.weight)
    plain = nn.AdditiveAttention(6, 5, 8)
    plain.load_state_dict(layer.state_dict(), strict=False)
    query, key, lengths = inputs()
    output, weights, _ = layer(query, key, key_lengths=lengths)
    expected, expected_weights = plain(query, key, key_lengths=lengths)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights, expected_weights)


def test_state_follows_its_beams() -> None:
    layer = nn.LocationAwareAttention(6, 5, 8, channels=3, kernel_size=5)
    query, key, _ = inputs()
    _, _, state = layer(query, key)
    order = torch.tensor([2, 0, 0])
    output, _, _ = layer(query[order, 0], key[order], state=state.reorder(order))
    expected, _, _ = layer(query[:, 0], key, state=state)
    torch.testing.assert_close(output, expected[order])


@pytest.mark.parametrize("kind", [nn.AdditiveAttention, nn.LocationAwareAttention])
def test_padding_never_leaks(kind: type) -> None:
    torch.manual_seed(0)
    layer = kind(6, 5, 8)
    query, key, lengths = inputs()
    results = []
    for fill in (0.0, math.nan):
        key = key.masked_fill(~visible(key, lengths).transpose(1, 2), fill)
        output, weights, *_ = layer(query, key, key_lengths=lengths)
        loss = output.square().sum() + weights.square().sum()
        results.append([output, weights, *torch.autograd.grad(loss, list(layer.parameters()))])
    for one, other in zip(*results, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [nn.AdditiveAttention, nn.LocationAwareAttention])
def test_compiles_and_survives_odd_inputs(kind: type) -> None:
    torch.manual_seed(0)
    layer = kind(6, 5, 8)
    query, key, _ = inputs()
    expected = layer(query, key)[0]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key)[0], expected)
    strided = layer(query.transpose(0, 1).contiguous().transpose(0, 1), key.repeat(1, 1, 2)[..., :5])[0]
    torch.testing.assert_close(strided, expected)
    assert layer(query[:, :0], key)[0].shape == (3, 0, 5)
    assert layer(query[:0], key[:0])[0].shape == (0, 4, 5)
    assert not layer(query, key[:, :0])[0].any()


def test_errors() -> None:
    for arguments, text in (((0, 5, 8), "query_dim"), ((6, -1, 8), "key_dim"), ((6, 5, 0), "hidden_dim")):
        with pytest.raises(ValueError, match=text):
            nn.AdditiveAttention(*arguments)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        nn.LocationAwareAttention(6, 5, 8, kernel_size=4)
    with pytest.raises(ValueError, match="channels must be positive"):
        nn.LocationAwareAttention(6, 5, 8, channels=0)
    layer = nn.LocationAwareAttention(6, 5, 8)
    query, key, _ = inputs()
    for arguments, text in (((query[..., :5], key), "query must be"), ((query, key[:2]), "key must be")):
        with pytest.raises(ValueError, match=text):
            layer(*arguments)
    with pytest.raises(ValueError, match=r"state.previous must be \(3, 7\)"):
        layer(query, key, state=layer(query, key[:, :6])[2])
