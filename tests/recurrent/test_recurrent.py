"""Recurrent layers: every kernel of the dispatch tables on random problems, then the rules one by one (C1-C21)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    DTYPES,
    Implementation,
    allowed_error,
    dtypes,
    error_of,
    implementations,
    is_beyond_this_machine,
    is_refusal,
    largest,
    normal,
    poisoned_memory,
    seeds,
    threads,
    view_as,
)
from torch import Tensor

import pyseqnet.functional as F
from pyseqnet import nn
from pyseqnet.functional._recurrent_layer import plain_layer
from pyseqnet.functional._recurrent_reference import GATES, HAS_CELL, IS_JORDAN, Options, weight_shapes

EXAMPLES = 60
ops = torch.ops.pyseqnet
PLAIN_MODES = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")
VIEWS = ("contiguous", "contiguous", "narrowed", "transposed", "offset", "step", "expanded")


# --- every kernel -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    mode: str
    T: int
    B: int
    I: int  # noqa: E741 - the family's letters
    H: int
    P: int  # projected features, 0: none
    D: int  # directions
    form: str  # dense, lengths, packed
    batch_first: bool
    bias: bool
    state: bool  # whether h_0 (and c_0) are given
    dtype: torch.dtype
    x_view: str
    gy_view: str
    arriving: tuple[bool, bool, bool]  # gradients of the output, h_n, c_n
    seed: int
    zoneout: str = "none"  # or masks, rates
    clips: bool = False
    output: str = "identity"

    @property
    def features(self) -> int:
        return self.P or self.H

    def lengths(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        if self.form == "packed":
            found = torch.randint(1, self.T + 1, (self.B,), generator=generator)
            found[:1] = self.T
            return found.sort(descending=True).values
        return torch.randint(0, self.T + 1, (self.B,), generator=generator)

    def batch_sizes(self) -> Tensor:
        return (torch.arange(self.T).unsqueeze(1) < self.lengths()).sum(1)

    def rows(self, features: int, seed: int, view: str) -> Tensor:
        """A tensor of the problem's form; NaN in the padding."""
        if self.form == "packed":
            return view_as(self.values((int(self.batch_sizes().sum()), features), seed), view)
        tensor = self.values((self.T, self.B, features), seed)
        if self.form == "lengths":
            outside = torch.arange(self.T).unsqueeze(1) >= self.lengths()
            tensor = tensor.masked_fill(outside.unsqueeze(2), math.nan)
            view = "contiguous" if view == "expanded" else view
        return view_as(tensor.transpose(0, 1) if self.batch_first else tensor, view)

    def values(self, shape: tuple[int, ...], seed: int) -> Tensor:
        value = normal(shape, self.seed + seed, self.dtype)
        return value.abs() if self.mode.endswith("RELU") else value

    def weights(self) -> list[Tensor]:
        """Of the usual size. For relu each unit's terms have one sign: rounding cannot move a sum over the kink."""
        shapes = weight_shapes(self.mode, self.I, self.H, self.features, self.bias)
        found = []
        for number in range(self.D):
            for place, (name, shape) in enumerate(shapes.items()):
                w = normal(shape, self.seed + 100 + 10 * number + place)
                if self.mode.endswith("RELU"):
                    sign = (1 - 2 * (torch.arange(shape[0]) % 2)).to(w)
                    sign = torch.ones_like(sign) if name in ("w_hr", "b_hr") else sign
                    w = w.abs() / math.sqrt(self.H) * (sign if w.dim() == 1 else sign.unsqueeze(1))
                w = w / math.sqrt(self.H)
                found.append((1 + w if name.startswith("gain") else w).to(self.dtype))
        return found

    def extras(self) -> str:
        rate = 0.3 if self.zoneout == "rates" else 0.0
        return Options(
            output=self.output,
            decay=0.4 if self.mode in IS_JORDAN and self.seed % 2 else 0.0,
            limit=0.4 if self.clips else 0.0,
            zone_h=rate,
            zone_c=rate / 2 if self.mode in HAS_CELL else 0.0,
        ).words()

    def masks(self) -> tuple[Tensor | None, Tensor | None]:
        """Of zoneout, of h and c."""
        if self.zoneout != "masks":
            return None, None
        rows = int(self.batch_sizes().sum()) if self.form == "packed" else self.T * self.B
        of_h, of_c = (
            normal((self.D, rows, width), self.seed + k) > 0.7 for k, width in ((40, self.features), (41, self.H))
        )
        return of_h, of_c if self.mode in HAS_CELL else None

    def states(self) -> tuple[Tensor | None, Tensor | None]:
        if not self.state and self.form != "packed":
            return None, None
        h = self.values((self.D, self.B, self.features), 20)
        return h, (self.values((self.D, self.B, self.H), 21) if self.mode in HAS_CELL else None)

    def arguments(self, device: str) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
        """(input, h_0, c_0, weights), lengths, batch_sizes."""
        tensors = [self.rows(self.I, 10, self.x_view), *self.states(), *self.weights()]
        lengths = self.lengths() if self.form == "lengths" else None
        batch_sizes = self.batch_sizes() if self.form == "packed" else None
        return [None if t is None else t.to(device) for t in tensors], lengths, batch_sizes

    def options(self) -> tuple[str, int, bool, bool]:
        return self.mode.lower(), self.D, self.bias, self.batch_first

    def gradients(self, output: Tensor) -> list[Tensor | None]:
        gy = self.rows(self.D * self.features, 30, self.gy_view)
        assert gy.shape == output.shape
        states = [self.values((self.D, self.B, self.features), 31)]
        states += [self.values((self.D, self.B, self.H), 32)] if self.mode in HAS_CELL else []
        return [g if a else None for g, a in zip((gy, *states), self.arriving, strict=False)]


def takes_projection(mode: str) -> bool:
    return mode in HAS_CELL or mode in IS_JORDAN


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    mode = draw(st.sampled_from(tuple(GATES)) if draw(st.booleans()) else st.sampled_from(PLAIN_MODES))
    dtype = draw(dtypes)
    H = draw(st.sampled_from((1, 2, 3, 5, 8, 16, 17, 20, 33)))
    form = draw(st.sampled_from(("dense", "dense", "lengths", "packed")))
    arriving = draw(
        st.sampled_from(((True, True, True), (True, False, False), (False, True, False), (True, False, True)))
    )
    return Problem(
        mode=mode,
        T=draw(st.sampled_from((1, 2, 3, 7, 12))),
        B=draw(st.sampled_from((1, 2, 3, 5, 9, 17))),
        I=draw(st.sampled_from((1, 2, 3, 7, 16, 19, 32))),
        H=H,
        P=draw(st.integers(0, H - 1) if mode in HAS_CELL else st.integers(1, 9)) if takes_projection(mode) else 0,
        D=draw(st.sampled_from((1, 2))),
        form=form,
        batch_first=form != "packed" and draw(st.booleans()),
        bias=draw(st.booleans()),
        state=draw(st.booleans()),
        dtype=dtype,
        x_view=draw(st.sampled_from(VIEWS)),
        gy_view=draw(st.sampled_from(VIEWS)),
        arriving=arriving,
        seed=draw(seeds),
        zoneout=draw(st.sampled_from(("none", "none", "none", "masks", "rates"))),
        # rounding to 16 bits could move a sum over the limit, or over relu's kink
        clips=draw(st.integers(0, 4)) == 0 and mode != "GRU" and dtype in (torch.float32, torch.float64),
        output=draw(st.sampled_from(("identity", "tanh", "sigmoid"))) if mode in IS_JORDAN else "identity",
    )


@functools.lru_cache(maxsize=1000)  # every kernel meets the same problems
def plainly(p: Problem, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """Results, then gradients, of plain torch on the CPU in this dtype; the arguments in the order of the gradients."""
    tensors, lengths, batch_sizes = p.arguments("cpu")
    leaves = [None if t is None else t.to(dtype).detach().clone().requires_grad_() for t in tensors]
    form = p.mode, p.D, p.batch_first, lengths, batch_sizes, p.extras(), *p.masks()
    results = plain_layer(*form, *leaves)
    found = [r for r in results if r is not None]
    pairs = [(r, g.to(dtype)) for r, g in zip(found, p.gradients(found[0]), strict=True) if g is not None]
    wanted = [t for t in leaves if t is not None]
    gradients = torch.autograd.grad([r for r, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, gradients, strict=True)]
    return [r.detach() for r in found], gradients, tensors


def assert_close(p: Problem, names: list[str], found: list[Tensor], torchs: list, exact: list, factor: float) -> None:
    # Terms are as large as anything that flows through the layer (1 in 1 - h * h), and a weight's gradient sums them
    # over all rows.
    magnitude = torch.tensor([max(1.0, *map(largest, exact)) * math.sqrt(p.T * p.B)])
    if p.mode == "LSTM_LAYER_NORM":  # divides by deviations that may be small: by 0.003 where there is one unit
        magnitude *= 300 if p.H < 5 else 5
    for name, a, b, c in zip(names, found, torchs, exact, strict=True):
        assert a.dtype == p.dtype
        bound = allowed_error(b, c, magnitude, factor)
        assert error_of(a, c) <= bound, f"{name}: {error_of(a, c)} > {bound}"


def check_forward(p: Problem, entry: Implementation) -> None:
    exact, _, _ = plainly(p, torch.float64)
    torchs, _, _ = plainly(p, p.dtype)
    (x, h, c, *weights), lengths, batch_sizes = p.arguments(entry.device)
    masks = [None if m is None else m.to(entry.device) for m in p.masks()]
    for reserve in (True, False):
        with entry.pinned(), poisoned_memory(), threads(2):
            y, h_n, c_n, gates, cells = ops.recurrent_forward(
                x, h, c, weights, lengths, batch_sizes, *p.options(), reserve, *masks, p.extras()
            )  # fmt: skip
        found = [y, h_n, c_n] if p.mode in HAS_CELL else [y, h_n]
        assert_close(p, ["output", "h_n", "c_n"][: len(found)], found, torchs, exact, 2)
        assert c_n.numel() > 0 or p.mode not in HAS_CELL or p.B == 0
        if not reserve:
            assert gates.numel() == cells.numel() == 0


def check_backward(p: Problem, entry: Implementation) -> None:
    _, exact, tensors = plainly(p, torch.float64)
    _, torchs, _ = plainly(p, p.dtype)
    (x, h, c, *weights), lengths, batch_sizes = p.arguments(entry.device)
    extras = (*(None if m is None else m.to(entry.device) for m in p.masks()), p.extras())
    form = (weights, lengths, batch_sizes, *p.options(), True, *extras)
    y, _, _, gates, cells = ops.recurrent_forward(x, h, c, *form)
    gradients = [None if g is None else g.to(entry.device) for g in p.gradients(y)]
    gradients += [None] * (3 - len(gradients))
    saved = (x, y, h, c, weights, gates, cells, lengths, batch_sizes, *p.options())
    with entry.pinned(), poisoned_memory(), threads(2):
        needs = True, h is not None, c is not None, True
        gx, gh, gc, gw = ops.recurrent_backward(*gradients, *saved, *needs, *extras)
    present = [n for n, t in zip(("input", "h_0", "c_0"), tensors, strict=False) if t is not None]
    found = [g for g, t in zip((gx, gh, gc), tensors, strict=False) if t is not None] + list(gw)
    names = present + [f"weight {k}" for k in range(len(gw))]
    assert_close(p, names, found, torchs, exact, 3)
    some = ops.recurrent_backward(*gradients, *saved, True, False, False, False, *extras)
    assert some[3] == []
    assert some[1].numel() == some[2].numel() == 0


def check(entry: Implementation, p: Problem) -> bool:
    """Compares one kernel on one problem with torch; False if the kernel is not for it."""
    if not any(p.arriving[: 3 if p.mode in HAS_CELL else 2]):
        p = replace(p, arriving=(True, True, True))
    try:
        (check_forward if entry.operation == "recurrent_forward" else check_backward)(p, entry)
    except RuntimeError as error:
        if is_beyond_this_machine(error):
            pytest.skip(str(error))
        if not is_refusal(error):
            raise
        return False
    return True


@pytest.mark.parametrize("entry", implementations("recurrent"))
def test_every_kernel_agrees_with_torch(entry: Implementation) -> None:
    accepted = 0

    @settings(max_examples=EXAMPLES)
    @given(problems())
    def on_random_problems(p: Problem) -> None:
        nonlocal accepted
        accepted += check(entry, p)

    on_random_problems()
    assert accepted >= EXAMPLES // 10, f"{entry.kernel} accepted only {accepted} of {EXAMPLES} problems"


PLAIN = Problem(
    mode="LSTM", T=5, B=3, I=4, H=6, P=0, D=1, form="dense", batch_first=False, bias=True, state=True,
    dtype=torch.float32, x_view="contiguous", gy_view="contiguous", arriving=(True, True, True), seed=0,
)  # fmt: skip
CORNERS = {
    "one of everything": replace(PLAIN, T=1, B=1, I=1, H=1),
    "no sequences": replace(PLAIN, B=0),
    "a wide layer": replace(PLAIN, H=130, I=70, T=3),
    "a wide batch": replace(PLAIN, B=150, T=3, D=2),
    "many steps": replace(PLAIN, T=150, B=2),
    "many steps, lengths": replace(PLAIN, T=150, B=3, form="lengths", D=2),
    "packed, both directions": replace(PLAIN, T=40, B=13, H=19, form="packed", D=2),
    "projection, both directions, lengths": replace(PLAIN, H=20, P=7, D=2, form="lengths", B=9),
    "a gradient of the last state alone": replace(PLAIN, arriving=(False, True, False), D=2, form="lengths"),
    "odd features": replace(PLAIN, I=1, H=33, B=7),
}


@pytest.mark.parametrize("mode", GATES)
@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.parametrize("entry", implementations("recurrent"))
def test_every_kernel_in_corner_cases(entry: Implementation, name: str, mode: str) -> None:
    corner = replace(CORNERS[name], mode=mode)
    if mode in IS_JORDAN:
        corner = replace(corner, P=corner.P or 3, seed=1)
    elif mode not in HAS_CELL:
        corner = replace(corner, P=0)
    for dtype in (torch.float32, torch.bfloat16) if mode in PLAIN_MODES else (torch.float32,):
        check(entry, replace(corner, dtype=dtype))


# --- the worked example -----------------------------------------------------------------------------------------

INPUTS = {  # G3: inputs, outputs
    "the example": ([[1, 1], [1, 1], [2, 2]], [4, 12, 32]),
    "the last first": ([[2, 2], [1, 1], [1, 1]], [8, 20, 44]),
    "the last second": ([[1, 1], [2, 2], [1, 1]], [4, 16, 36]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INPUTS)
def test_worked_example_of_elmans_network(device: str, name: str, dtype: torch.dtype) -> None:
    """C2, C3: all weights 1, no biases; memories 2, 6, 16. All values are positive: relu is the identity."""
    inputs, outputs = INPUTS[name]
    network = nn.RNN(2, 2, nonlinearity="relu", bias=False, device=device, dtype=dtype)
    for weight in network.parameters():
        torch.nn.init.ones_(weight)
    x = torch.tensor(inputs, dtype=dtype, device=device)
    memory, h_n = network(x)
    output = memory @ torch.ones(2, 2, dtype=dtype, device=device)
    assert output.tolist() == [[y, y] for y in outputs]
    assert memory.tolist() == [[y / 2, y / 2] for y in outputs]
    assert h_n.tolist() == [memory[-1].tolist()]


def one_unit(value: float = 0.5) -> list[Tensor]:
    return [torch.full(shape, value, dtype=torch.float64) for shape in ((4, 1), (4, 1))] + [torch.zeros(4).double()] * 2


def test_one_lstm_unit(device: str) -> None:
    """G14: x = 1, h = 0.5, c = 0.25, all weights 0.5: c = 0.601174, h = 0.365320."""
    x, h, c = (torch.full((1, 1), v, dtype=torch.float64, device=device) for v in (1.0, 0.5, 0.25))
    params = [w.to(device) for w in one_unit()]
    for h_1, c_1 in (F.lstm_cell(x, (h, c), *params), F.lstm_cell_reference(x, (h, c), *params)):
        assert h_1.item() == pytest.approx(0.365320, abs=5e-7)
        assert c_1.item() == pytest.approx(0.601174, abs=5e-7)
    output, (h_n, c_n) = F.lstm(x.unsqueeze(0), (h.unsqueeze(0), c.unsqueeze(0)), params)
    assert torch.equal(output, h_n)
    assert h_n.item() == pytest.approx(0.365320, abs=5e-7)
    assert c_n.item() == pytest.approx(0.601174, abs=5e-7)


# --- the mechanisms ---------------------------------------------------------------------------------------------


def gate_bias(gate: int, value: float, hidden: int = 3) -> list[Tensor]:
    """Parameters of an LSTM of 3 units whose gate (0: i, 1: f, 2: g, 3: o) has this bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4 * hidden, 2), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,))
    params = [torch.randn(s, generator=generator, dtype=torch.float64) * 0.5 for s in shapes]
    params[2][gate * hidden : (gate + 1) * hidden] = value
    return params


@pytest.mark.parametrize("dtype", DTYPES)
def test_closed_gates(device: str, dtype: torch.dtype) -> None:
    """C10-C12: with i and f closed or open, c is unchanged or erased; a closed output gate gives 0."""
    x = normal((1, 2, 2), 0, dtype).to(device)
    h, c = normal((1, 2, 3), 1, dtype).to(device), normal((1, 2, 3), 2, dtype).to(device)

    def run(*settings: tuple[int, float]) -> tuple[Tensor, Tensor]:
        params = gate_bias(0, 0.0)
        for gate, value in settings:
            params[2][3 * gate : 3 * gate + 3] = value
        _, (h_n, c_n) = F.lstm(x, (h, c), [w.to(device, dtype) for w in params])
        return h_n, c_n

    closed, opened = -math.inf, math.inf
    assert torch.equal(run((0, closed), (1, opened))[1], c)
    assert (
        run((0, closed), (1, closed))[1].abs().max().item() < 1e-37
    )  # what a clamped exponential leaves of a closed gate
    assert run((3, closed))[0].abs().max().item() < 1e-37
    remembered = run((0, closed), (1, opened), (3, opened))[0]
    torch.testing.assert_close(remembered, c.tanh())


def test_constant_error_carousel(device: str) -> None:
    """C19, C21: open forget gates carry a gradient of 1 through 1000 steps."""
    params = [w.to(device) for w in gate_bias(1, 1e4)]
    x = normal((1000, 1, 2), 0).to(device)
    c_0 = normal((1, 1, 3), 1).to(device).requires_grad_()
    h_0 = torch.zeros_like(c_0)
    for weight in params[:2]:
        weight.zero_()
    _, (_, c_n) = F.lstm(x, (h_0, c_0), params)
    (gradient,) = torch.autograd.grad(c_n.sum(), c_0)
    torch.testing.assert_close(gradient, torch.ones_like(c_0))


@pytest.mark.parametrize(("weight", "product"), [(1.01, 20751.6), (0.99, 4.36e-5)])
def test_gradients_explode_or_vanish(device: str, weight: float, product: float) -> None:
    """C19: y = w^999 x through 1000 steps of a linear unit."""
    params = [torch.ones(1, 1).double().to(device), torch.full((1, 1), weight).double().to(device)]
    x = torch.zeros(1000, 1, 1, dtype=torch.float64, device=device)
    x[0] = 1
    x.requires_grad_()
    output, _ = F.rnn(x, None, params, nonlinearity="relu")
    assert output[-1].item() == pytest.approx(product, rel=1e-2 if weight < 1 else 1e-5)
    (gradient,) = torch.autograd.grad(output[-1].sum(), x)
    assert gradient[0].item() == pytest.approx(weight**999, rel=1e-5)


def test_parameter_counts() -> None:
    """C14: an LSTM has four times the parameters of an Elman network."""
    counts = [sum(p.numel() for p in cls(256, 256).parameters()) for cls in (nn.LSTM, nn.RNN, nn.GRU)]
    assert counts == [526336, 131584, 3 * 131584]


def test_stacked_projection_is_four(device: str) -> None:
    """C15: one product with the stacked (4H, I + H) weights is four products."""
    x, h, c = (normal(s, k).to(device) for k, s in enumerate(((3, 4), (3, 5), (3, 5))))
    w_ih, w_hh = normal((20, 4), 3).to(device), normal((20, 5), 4).to(device)
    i, f, g, o = (x @ a.T + h @ b.T for a, b in zip(w_ih.chunk(4), w_hh.chunk(4), strict=True))
    expected = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h_1, c_1 = F.lstm_cell(x, (h, c), w_ih, w_hh)
    torch.testing.assert_close(c_1, expected)
    torch.testing.assert_close(h_1, o.sigmoid() * expected.tanh())


def test_weights_are_tied_over_time(device: str) -> None:
    """C4: the gradient of W_hh is the sum over the steps of single cells' gradients."""
    x, h = normal((6, 2, 3), 0).to(device), torch.zeros(2, 4, dtype=torch.float64, device=device)
    params = [normal(s, k).to(device).requires_grad_() for k, s in enumerate(((4, 3), (4, 4), (4,), (4,)), 1)]
    copies = [[p.detach().clone().requires_grad_() for p in params] for _ in x]
    for step, own in zip(x, copies, strict=True):
        h = F.rnn_cell(step, h, *own)
    h.square().sum().backward()
    _, h_n = F.rnn(x, None, params)
    h_n.square().sum().backward()
    for number, weight in enumerate(params):
        torch.testing.assert_close(weight.grad, sum(own[number].grad for own in copies))


@pytest.mark.parametrize("mode", ["lstm", "gru", "rnn"])
def test_truncated_backpropagation(device: str, mode: str) -> None:
    """C18: cutting into chunks changes nothing in the values; detached states cut the gradient, others do not."""
    hidden, gates = 5, {"lstm": 4, "gru": 3, "rnn": 1}[mode]
    function = getattr(F, mode)
    shapes = ((gates * hidden, 3), (gates * hidden, hidden), (gates * hidden,), (gates * hidden,))
    params = [(0.3 * normal(s, k)).to(device).requires_grad_() for k, s in enumerate(shapes)]
    x = normal((12, 2, 3), 9).to(device)

    def detached(state: Tensor | tuple) -> Tensor | tuple:
        return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()

    def run(chunk: int, cut: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        state, outputs = None, []
        for part in x.split(chunk):
            y, state = function(part, detached(state) if cut and state is not None else state, params)
            outputs.append(y)
        output = torch.cat(outputs)
        return output, torch.autograd.grad(output.square().sum(), params)

    whole, full = run(12, False)
    joined, same = run(4, False)
    torch.testing.assert_close(joined, whole)
    cut_output, truncated = run(4, True)
    torch.testing.assert_close(cut_output, whole)
    for a, b, c in zip(full, same, truncated, strict=True):
        torch.testing.assert_close(a, b)
        assert not torch.allclose(a, c)


# --- lengths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf, 6e4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_padding_never_leaks(device: str, name: str, dtype: torch.dtype, poison: float) -> None:
    """C8: whatever the padding holds, in the input or in arriving gradients; it is 0 in what comes out."""
    torch.manual_seed(0)
    layer = getattr(nn, name)(3, 4, 2, bidirectional=True, device=device, dtype=dtype)
    lengths = torch.tensor([2, 6, 1, 4])
    outside = (torch.arange(6).unsqueeze(1) >= lengths).unsqueeze(2).to(device)
    x = normal((6, 4, 3), 0, dtype).to(device)
    gy = normal((6, 4, 8), 1, dtype).to(device)
    results = []
    for filler in (0.0, poison):
        leaf = x.masked_fill(outside, filler).requires_grad_()
        y, state = layer(leaf, lengths=lengths)
        assert y.masked_select(outside).count_nonzero() == 0
        states = state if isinstance(state, tuple) else (state,)
        gx, *gw = torch.autograd.grad(
            [y, *states], [leaf, *layer.parameters()], [gy.masked_fill(outside, filler), *states]
        )
        assert gx.masked_select(outside).count_nonzero() == 0
        results.append([y, *states, gx, *gw])
    for clean, poisoned in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_are_packed_sequences(device: str, name: str, batch_first: bool) -> None:
    """Each sequence alone, torch's packed sequences, and a padded batch with lengths: the same."""
    torch.manual_seed(0)
    layer = getattr(nn, name)(3, 4, 2, bidirectional=True, batch_first=batch_first, device=device, dtype=torch.float64)
    theirs = getattr(torch.nn, name)(
        3, 4, 2, bidirectional=True, batch_first=batch_first, device=device, dtype=torch.float64
    )  # fmt: skip
    theirs.load_state_dict(layer.state_dict())
    lengths = torch.tensor([3, 7, 1, 7, 5])
    x = normal((7, 5, 3), 0).to(device)
    x = x.transpose(0, 1).contiguous() if batch_first else x
    y, state = layer(x, lengths=lengths)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    for network in (layer, theirs):
        y_packed, state_packed = network(packed)
        unpacked, _ = torch.nn.utils.rnn.pad_packed_sequence(y_packed, batch_first)
        torch.testing.assert_close(y, unpacked)
        for a, b in zip(state, state_packed, strict=True):
            torch.testing.assert_close(a, b)
    for b, length in enumerate(lengths.tolist()):
        own = (x[b] if batch_first else x[:, b])[:length]
        alone, last = layer(own)
        torch.testing.assert_close((y[b] if batch_first else y[:, b])[:length], alone)
        for whole, single in zip(state, last, strict=True) if name == "LSTM" else [(state, last)]:
            torch.testing.assert_close(whole[:, b], single)


def test_an_empty_sequence_is_refused_by_its_index(device: str) -> None:
    layer = nn.LSTM(3, 4, bidirectional=True, device=device)
    for lengths, words in (([5, 0, 3], "0 at index 1"), ([5, 3, -2], "-2 at index 2"), ([6, 1, 1], "6 at index 0")):
        with pytest.raises(ValueError, match=rf"lengths: expected values from 1 to the input's 5 steps, .*: {words}$"):
            layer(torch.zeros(5, 3, 3, device=device), lengths=torch.tensor(lengths))


def test_kernels_leave_the_state_of_an_empty_sequence(device: str) -> None:
    h, c = (normal((2, 2, 4), k, torch.float32).to(device) for k in (0, 1))
    weights = [w.to(device) for w in nn.LSTM(3, 4, bidirectional=True)._flat_weights]
    x, lengths = normal((5, 2, 3), 2, torch.float32).to(device), torch.tensor([0, 5])
    y, h_n, c_n, _, _ = ops.recurrent_forward(x, h, c, weights, lengths, None, "lstm", 2, True, False, False)
    assert y[:, 0].count_nonzero() == 0
    assert torch.equal(h_n[:, 0], h[:, 0])
    assert torch.equal(c_n[:, 0], c[:, 0])


def test_lengths_may_be_a_list(device: str) -> None:
    layer, x = nn.GRU(3, 4, device=device), normal((5, 2, 3), 0, torch.float32).to(device)
    strided = torch.tensor([2, 9, 5])[::2]
    for lengths in ([2, 5], (2, 5), strided):
        assert torch.equal(layer(x, lengths=lengths)[0], layer(x, lengths=torch.tensor([2, 5]))[0])


# --- the public functions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_functions_agree_with_their_references(device: str, name: str, options: dict) -> None:
    layer = getattr(torch.nn, name.upper())(3, 4, **options, dtype=torch.float64, device=device)
    x = normal((5, 6, 3), 0).to(device).requires_grad_()
    lengths = torch.randint(1, 6, (5 if "batch_first" in options else 6,))
    for chosen in (None, lengths):
        found = []
        for function in (getattr(F, name), getattr(F, f"{name}_reference")):
            y, state = function(x, None, layer._flat_weights, **options, lengths=chosen)
            results = [y, *(state if isinstance(state, tuple) else (state,))]
            grads = torch.autograd.grad(sum(r.square().sum() for r in results), [x, *layer.parameters()])
            found.append([*results, *grads])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["lstm_cell", "gru_cell", "rnn_cell"])
@pytest.mark.parametrize("biases", [(True, True), (False, False), (True, False), (False, True)])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_cells_agree_with_torch(device: str, name: str, biases: tuple[bool, bool], nonlinearity: str) -> None:
    gates = {"lstm_cell": 4, "gru_cell": 3, "rnn_cell": 1}[name]
    options = {"nonlinearity": nonlinearity} if name == "rnn_cell" else {}
    shapes = ((gates * 4, 3), (gates * 4, 4), (gates * 4,), (gates * 4,))
    params = [normal(s, k).to(device).requires_grad_() for k, s in enumerate(shapes)]
    chosen = [*params[:2], *(p if given else None for p, given in zip(params[2:], biases, strict=True))]
    torchs = getattr(torch, name if name != "rnn_cell" else f"rnn_{nonlinearity}_cell")
    x, h, c = (normal(s, 7 + k).to(device).requires_grad_() for k, s in enumerate(((5, 3), (5, 4), (5, 4))))
    hx = (h, c) if name == "lstm_cell" else h
    leaves = [x, h, *([c] if name == "lstm_cell" else []), *(p for p in chosen if p is not None)]
    found = []
    for function, kept in ((getattr(F, name), options), (torchs, {}), (getattr(F, f"{name}_reference"), options)):
        results = function(x, hx, *chosen, **kept)
        results = results if isinstance(results, tuple) else (results,)
        grads = torch.autograd.grad(sum(r.pow(3).sum() for r in results), leaves)
        with torch.no_grad():
            again = function(x, hx, *chosen, **kept)
        found.append([*results, *(again if isinstance(again, tuple) else (again,)), *grads])
    for ours, theirs, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(ours, plain)


def test_dropout_between_layers(device: str) -> None:
    """C17: of the outputs of every layer but the last, scaled by 1 / (1 - p), drawn from torch's generator."""
    layer = nn.RNN(4, 512, 2, nonlinearity="relu", dropout=0.3, bias=False, device=device)
    with torch.no_grad():
        layer.weight_ih_l0.fill_(0.25)
        layer.weight_hh_l0.zero_()
        layer.weight_ih_l1.copy_(torch.eye(512))
        layer.weight_hh_l1.zero_()
    x = torch.ones(20, 8, 4, device=device)
    torch.manual_seed(3)
    y, _ = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x)[0], y)
    assert not torch.equal(layer(x)[0], y)
    kept = y > 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.7))
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.01)
    layer.eval()
    assert torch.equal(layer(x)[0], torch.ones_like(y))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_dropout_draws_as_torch_on_the_cpu(name: str) -> None:
    ours, theirs = getattr(nn, name)(3, 8, 3, dropout=0.5), getattr(torch.nn, name)(3, 8, 3, dropout=0.5)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(6, 2, 3)
    found = []
    for layer in (ours, theirs):
        torch.manual_seed(5)
        found.append(layer(x)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_bitwise_equal_for_any_number_of_threads_and_run_to_run(device: str, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = getattr(nn, name)(24, 40, bidirectional=True, device=device, dtype=dtype)
    x, lengths = normal((17, 13, 24), 0, dtype).to(device), torch.randint(1, 18, (13,))
    for chosen in (None, lengths):
        results = []
        for count in (1, 2, 3, 2, 1):
            with threads(count):
                leaf = x.clone().requires_grad_()
                y, _ = layer(leaf, lengths=chosen)
                results.append([y.detach(), *torch.autograd.grad(y.sum(), [leaf, *layer.parameters()])])
        for others in results[1:]:
            for a, b in zip(others, results[0], strict=True):
                assert torch.equal(a, b)
