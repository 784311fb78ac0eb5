"""What recurrent networks are for, shown: long memories are learned, gradients kept or cut as asked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import normal
from torch import Tensor

from pyseqnet import nn
from pyseqnet.training import detach, truncated_bptt


def adding_problem(steps: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hochreiter & Schmidhuber: numbers and two marks; the sum of the marked numbers is wanted at the end."""
    numbers = torch.rand(steps, batch, generator=generator)
    marks = torch.zeros(steps, batch)
    for low, high in ((0, steps // 2), (steps // 2, steps)):
        marks[torch.randint(low, high, (batch,), generator=generator), torch.arange(batch)] = 1
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(0)


def error_after_training(make: Callable[[], torch.nn.Module], seed: int, rate: float, updates: int) -> float:
    """Mean squared error on fresh problems of 50 steps; 0.167 is that of always saying 1."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    layer = make()
    head = torch.nn.Linear(layer.hidden_size, 1)
    parameters = [*layer.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for _ in range(updates):
        x, wanted = adding_problem(50, 32, generator)
        loss = (head(layer(x)[0][-1]).squeeze(1) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    with torch.no_grad():
        x, wanted = adding_problem(50, 1000, generator)
        return (head(layer(x)[0][-1]).squeeze(1) - wanted).square().mean().item()


def test_an_lstm_learns_to_add_over_fifty_steps_where_elman_does_not() -> None:
    """C21: on at least two of three seeds."""
    won = 0
    for seed in range(3):
        lstm = error_after_training(lambda: nn.LSTM(2, 32, forget_bias=1.0), seed, 1e-2, 1200)
        elman = error_after_training(lambda: nn.RNN(2, 32), seed, 1e-3, 1200)
        won += lstm < 0.01 and elman > 0.1
        if won == 2:
            return
    raise AssertionError(f"only {won} of 3 seeds")


@pytest.mark.parametrize("options", [{}, {"peephole": "diagonal"}, {"peephole": "full"}], ids=str)
def test_open_forget_gates_keep_gradients(device: str, options: dict) -> None:
    """C21: through 1000 steps the gradient of c is 1, whatever the peepholes are wired to."""
    layer = nn.LSTM(2, 3, device=device, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.bias_ih_l0[3:6] = 1e4
    c_0 = normal((1, 1, 3), 1).to(device).requires_grad_()
    _, (_, c_n) = layer(normal((1000, 1, 2), 0).to(device), (torch.zeros_like(c_0), c_0))
    (gradient,) = torch.autograd.grad(c_n.sum(), c_0)
    torch.testing.assert_close(gradient, torch.ones_like(c_0))


def test_clipping_gradients(device: str) -> None:
    """C20, G13: (3, 4) clipped to norm 1 is (0.6, 0.8), and the norm before is returned; by value: each by itself."""
    layer = nn.RNN(1, 1, nonlinearity="relu", bias=False, device=device)
    for kind in ("norm", "value"):
        for parameter, gradient in zip(layer.parameters(), (3.0, 4.0), strict=True):
            parameter.grad = torch.full_like(parameter, gradient)
        if kind == "norm":
            assert torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0).item() == pytest.approx(5.0)
            expected = (0.6, 0.8)
        else:
            torch.nn.utils.clip_grad_value_(layer.parameters(), 3.5)
            expected = (3.0, 3.5)
        found = [parameter.grad.item() for parameter in layer.parameters()]
        assert found == pytest.approx(expected, rel=1e-5)


def test_clipping_stops_an_explosion() -> None:
    """C19, C20: y = w^999 x; the raw gradient is enormous, the clipped step is not."""
    layer = nn.RNN(1, 1, nonlinearity="relu", bias=False, dtype=torch.float64)
    torch.nn.init.ones_(layer.weight_ih_l0)
    torch.nn.init.constant_(layer.weight_hh_l0, 1.01)
    x = torch.zeros(1000, 1, 1, dtype=torch.float64)
    x[0] = 1
    layer(x)[0][-1].sum().backward()
    assert layer.weight_hh_l0.grad.item() == pytest.approx(999 * 1.01**998, rel=1e-6)
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    assert torch.cat([p.grad.flatten() for p in layer.parameters()]).norm().item() == pytest.approx(1.0)


LAYERS = {
    "lstm": lambda **o: nn.LSTM(3, 5, 2, peephole="diagonal", **o),
    "gru": lambda **o: nn.GRU(3, 5, **o),
    "jordan": lambda **o: nn.JordanRNN(3, 5, 4, decay=0.5, **o),
}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_truncated_backpropagation_is_that_of_detached_pieces(device: str, name: str, batch_first: bool) -> None:
    """C18: with as many steps as there are, the whole; with fewer, the same values and other gradients."""
    layer = LAYERS[name](batch_first=batch_first, device=device, dtype=torch.float64)
    x = normal((2, 7, 3) if batch_first else (7, 2, 3), 0).to(device)
    time = 1 if batch_first else 0
    whole, last = layer(x)
    full = torch.autograd.grad(whole.square().sum(), list(layer.parameters()))
    for steps in (3, 7, 100):
        layer.zero_grad()
        outputs, parts = [], []
        for part, output, state in truncated_bptt(layer, x, steps):
            assert not any(s.requires_grad for s in (state if isinstance(state, tuple) else (state,)))
            output.square().sum().backward()
            outputs.append(output.detach())
            parts.append((part.start, part.stop))
        assert parts == ([(0, 3), (3, 6), (6, 7)] if steps == 3 else [(0, 7)])
        torch.testing.assert_close(torch.cat(outputs, time), whole)
        for a, b in zip(
            state if isinstance(state, tuple) else (state,),
            detach(last if isinstance(last, tuple) else (last,)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
        same = [torch.allclose(p.grad, g) for p, g in zip(layer.parameters(), full, strict=True)]
        assert all(same) == (steps >= 7)


def test_truncated_backpropagation_of_lengths(device: str) -> None:
    layer = nn.LSTM(3, 5, device=device, dtype=torch.float64)
    lengths, x = torch.tensor([7, 2, 4]), normal((7, 3, 3), 0).to(device)
    whole, (h_n, c_n) = layer(x, lengths=lengths)
    pieces = list(truncated_bptt(layer, x, 3, lengths=lengths))
    torch.testing.assert_close(torch.cat([output for _, output, _ in pieces]), whole)
    torch.testing.assert_close(pieces[-1][2], (h_n, c_n))
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        next(truncated_bptt(layer, x, 0))
    with pytest.raises(TypeError, match="state: expected tensors"):
        detach("h")


def test_small_numbers_are_flushed_inside_the_kernels_alone() -> None:
    """Gradients that decay through time do not become denormal numbers; the caller's arithmetic keeps its own."""
    smallest = torch.finfo(torch.float32).tiny
    layer = nn.LSTM(4, 40)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.02)
    x = torch.randn(200, 8, 4, requires_grad=True)
    tiny = torch.tensor(smallest / 8)
    for flush in (False, True):
        assert torch.set_flush_denormal(flush)
        try:
            y, _ = layer(x)
            (gx,) = torch.autograd.grad(y[-1].sum(), x)
            assert bool((gx == 0).any())
            assert not bool(((gx != 0) & (gx.abs() < smallest)).any()) or flush
            found = (tiny * 0.5).double().item()
        finally:
            torch.set_flush_denormal(False)
        assert (found == 0) == flush
