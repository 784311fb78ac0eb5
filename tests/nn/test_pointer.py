"""Copying: against probabilities added up by hand in float64."""

from __future__ import annotations

import doctest
import math

import pytest
import torch

from pyseqnet.nn import PointerGenerator, pointer, pointer_log_probs, pointer_loss


def problem(dtype: torch.dtype = torch.float64):
    batch, steps, size, words, extra = 3, 4, 6, 5, 3
    logits = torch.randn(batch, steps, words, dtype=dtype, requires_grad=True)
    gate = torch.randn(batch, steps, 1, dtype=dtype, requires_grad=True)
    weights = torch.randn(batch, steps, size, dtype=dtype).softmax(2)
    weights[1, :, 4:] = 0  # padding
    weights = weights / weights.sum(2, keepdim=True)
    source = torch.randint(0, words + extra, (batch, size))
    return logits, gate, weights.requires_grad_(), source, extra


def test_examples() -> None:
    results = doctest.testmod(pointer)
    assert results.attempted
    assert not results.failed


def test_probabilities_are_sums_over_places() -> None:
    logits, gate, weights, source, extra = problem()
    found = pointer_log_probs(logits, gate, weights, source, extra).exp()
    write = gate.sigmoid()
    wanted = torch.nn.functional.pad(write * logits.softmax(2), (0, extra))
    for b, s in torch.cartesian_prod(torch.arange(3), torch.arange(6)).tolist():
        wanted[b, :, source[b, s]] += (1 - write[b, :, 0]) * weights[b, :, s]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found.sum(2), torch.ones(3, 4, dtype=torch.float64))
    target = torch.randint(0, 5 + extra, (3, 4))
    target = torch.where(found.gather(2, target.unsqueeze(2)).squeeze(2) > 0, target, 0)
    target[0, 1] = -100
    loss = pointer_loss(logits, gate, weights, source, target)
    kept = target != -100
    by_hand = -wanted.gather(2, target.clamp(min=0).unsqueeze(2)).squeeze(2).log()[kept].mean()
    torch.testing.assert_close(loss, by_hand)
    inputs = (logits, gate, weights)
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(by_hand, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients() -> None:
    logits, gate, weights, source, extra = problem()
    mass = torch.randn(3, 4, 8, dtype=torch.float64)

    def weighted(*inputs: torch.Tensor) -> torch.Tensor:
        log_probs = pointer_log_probs(*inputs, source, extra)
        return (log_probs.exp() * mass).sum()

    full = (weights.detach() * 0.9 + 0.01).requires_grad_()  # away from the kink at 0
    assert torch.autograd.gradcheck(weighted, (logits, gate, full))


def test_an_unseen_word_can_only_be_copied() -> None:
    logits, gate = torch.randn(1, 1, 4), torch.zeros(1, 1, 1)
    weights, source = torch.tensor([[[0.7, 0.3]]]), torch.tensor([[5, 2]])
    log_probs = pointer_log_probs(logits, gate, weights, source, extra=2)
    assert log_probs[0, 0, 5].exp().item() == pytest.approx(0.35)
    assert log_probs[0, 0, 4].item() == -math.inf  # neither in the vocabulary nor in the source
    target = torch.tensor([[4]])
    assert pointer_loss(logits, gate, weights, source, target).item() == math.inf
    as_unknown = pointer_loss(logits, gate, weights, source, target, unknown=3)
    assert as_unknown.item() == pytest.approx(-math.log(0.5 * logits.softmax(2)[0, 0, 3].item()), rel=1e-5)


def test_nothing_underflows_and_no_gradient_is_nan() -> None:
    logits = torch.tensor([[[0.0, -300.0, 0.0]]], requires_grad=True)
    gate = torch.tensor([[[200.0]]], requires_grad=True)  # copies with probability e^-200, which float32 has not
    weights, source = torch.tensor([[[1.0, 0.0]]], requires_grad=True), torch.tensor([[3, 1]])
    for target, wanted in ((1, 300 + math.log(2)), (3, 200.0)):
        loss = pointer_loss(logits, gate, weights, source, torch.tensor([[target]]))
        assert loss.item() == pytest.approx(wanted, rel=1e-5)
        for grad in torch.autograd.grad(loss, (logits, gate, weights)):
            assert bool(grad.isfinite().all())
        log_probs = pointer_log_probs(logits, gate, weights, source, extra=2)
        assert log_probs[0, 0, target].item() == pytest.approx(-wanted, rel=1e-5)
        for grad in torch.autograd.grad(log_probs[0, 0, target], (logits, gate, weights)):
            assert bool(grad.isfinite().all())


def test_layer_learns_to_copy_what_it_has_never_seen() -> None:
    """Write the word that stands behind the mark: half of them are not in the vocabulary."""
    torch.manual_seed(0)
    layer, key = PointerGenerator(8, 4), torch.nn.Parameter(torch.zeros(8))
    optimizer = torch.optim.Adam([*layer.parameters(), key], 0.05)
    marks = torch.nn.functional.one_hot(torch.arange(60) % 5, 5).float()
    source = torch.randint(0, 8, (60, 5))
    target = source.gather(1, marks.argmax(1, keepdim=True))

    def parts() -> tuple[torch.Tensor, torch.Tensor]:
        weights = (marks * key.sum()).softmax(1).unsqueeze(1)
        return key.expand(60, 1, 8), weights

    for _ in range(100):
        states, weights = parts()
        loss = layer.loss(states, weights, source, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    states, weights = parts()
    assert bool((layer(states, weights, source, extra=4).argmax(2) == target).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.zeros(3, 4)}, r"gate must be \(3, 4, 1\)"),
        ({"source": torch.zeros(3, 5, dtype=torch.int64)}, r"source must be \(3, 6\)"),
        ({"weights": torch.zeros(3, 3, 6)}, r"must be \(B, T, V\) and \(B, T, S\)"),
        ({"extra": 0, "source": torch.full((3, 6), 7)}, "source must hold numbers from 0 to 4; got 7 to 7"),
    ],
)
def test_bad_input(change, message: str) -> None:
    logits, gate, weights, source, extra = problem()
    arguments = {"logits": logits, "gate": gate, "weights": weights, "source": source, "extra": extra, **change}
    with pytest.raises(ValueError, match=message):
        pointer_log_probs(**arguments)
