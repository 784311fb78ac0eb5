"""Convolution: every kernel of the dispatch tables on random problems, then what a convolution is.

Ids such as A3 are rows of the project's table of mechanisms, G1 its golden numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    free_memory,
    implementations,
    is_beyond_this_machine,
    is_refusal,
    largest,
    normal,
    poisoned_memory,
    seeds,
    threads,
    view_as,
    views,
    winograd_bound_holds,
)
from torch import Tensor

import pyseqnet.functional as F

EXAMPLES = 100
ops = torch.ops.pyseqnet


# --- problems ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    dims: int
    N: int
    image: tuple[int, ...]  # H W, or W
    groups: int
    group_channels: int
    group_filters: int
    taps: tuple[int, ...]  # R S, or S
    stride: tuple[int, ...]
    before: tuple[int, ...]  # padding
    after: tuple[int, ...]
    dilation: tuple[int, ...]
    dtype: torch.dtype
    x_view: str
    w_view: str
    gy_view: str
    with_bias: bool
    seed: int

    def __post_init__(self) -> None:
        assert all(extent > 0 for extent in self.out)

    @property
    def out(self) -> tuple[int, ...]:
        sizes = zip(self.image, self.taps, self.before, self.after, self.dilation, self.stride, strict=True)
        return tuple((size + a + b - d * (k - 1) - 1) // s + 1 for size, k, a, b, d, s in sizes)

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """x, w, bias, gy in the problem's dtype and with its strides."""
        K = self.groups * self.group_filters
        x = normal((self.N, self.groups * self.group_channels, *self.image), self.seed, self.dtype).to(device)
        w = normal((K, self.group_channels, *self.taps), self.seed + 1, self.dtype).to(device)
        b = normal((K,), self.seed + 2, self.dtype).to(device) if self.with_bias else None
        gy = normal((self.N, K, *self.out), self.seed + 3, self.dtype).to(device)
        return view_as(x, self.x_view), view_as(w, self.w_view), b, view_as(gy, self.gy_view)

    def geometry(self) -> tuple[int, ...]:
        def both(values: tuple[int, ...], filler: int) -> tuple[int, ...]:
            return values if self.dims == 2 else (filler, *values)

        return (
            *both(self.stride, 1), *both(self.before, 0), *both(self.after, 0), *both(self.dilation, 1), self.groups,
        )  # fmt: skip


def torch_convolution(p: Problem, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """The definition, in whatever dtype and on whatever device its arguments are."""
    pads = [amount for pair in zip(reversed(p.before), reversed(p.after), strict=True) for amount in pair]
    convolution = torch.conv1d if p.dims == 1 else torch.conv2d
    return convolution(torch.nn.functional.pad(x, pads), w, b, p.stride, 0, p.dilation, p.groups)


GRADIENTS = ("conv_input_gradient", "conv_weight_gradient", "conv_bias_gradient")


def torch_result(operation: str, p: Problem, x: Tensor, w: Tensor, b: Tensor | None, gy: Tensor) -> Tensor:
    x, w = x.detach().contiguous(), w.detach().contiguous()
    if operation == "conv_forward":
        return torch_convolution(p, x, w, b)
    leaves = [x, w, w.new_zeros(w.shape[0])]
    wanted = leaves[GRADIENTS.index(operation)].requires_grad_()
    return torch.autograd.grad(torch_convolution(p, *leaves), wanted, gy)[0]


def our_result(operation: str, p: Problem, x: Tensor, w: Tensor, b: Tensor | None, gy: Tensor) -> Tensor:
    with poisoned_memory(), threads(2):
        if operation == "conv_forward":
            return ops.conv_forward(x, w, b, *p.geometry())
        needs = [operation == name for name in GRADIENTS]
        return ops.conv_backward(gy, x, w, *p.geometry(), *needs)[GRADIENTS.index(operation)]


@st.composite
def problems(draw: st.DrawFn, kind: str = "any") -> Problem:
    """Small problems. Kinds: any, depthwise, winograd (3x3, stride 1, more than one block of channels)."""
    if kind == "any":
        kind = draw(st.sampled_from(("general", "general", "depthwise", "winograd", "pointwise")))
    winograd = kind == "winograd"
    dims = 2 if winograd else draw(st.sampled_from((1, 2, 2)))
    small, per_dim = st.integers(1, 3), lambda strategy: tuple(draw(strategy) for _ in range(dims))
    taps = (3, 3) if winograd else (1,) * dims if kind == "pointwise" else per_dim(st.integers(1, 5))
    dilation = (1, 1) if winograd else per_dim(small)
    stride = (1, 1) if winograd else per_dim(small)
    before, after = per_dim(st.integers(0, 3)), per_dim(st.integers(0, 3))
    # at least one output pixel; some images end in the middle of a stride or of a vector
    image = tuple(
        max(1, d * (k - 1) + 1 - a - b) + draw(st.integers(0, 40 if dims == 1 else 18))
        for k, d, a, b in zip(taps, dilation, before, after, strict=True)
    )
    if kind == "depthwise":
        groups, group_channels, group_filters = draw(st.sampled_from((1, 2, 3, 7, 8, 16, 17, 33))), 1, 1
    elif winograd:
        groups = 1
        group_channels, group_filters = draw(st.integers(1, 64)), draw(st.integers(1, 64))
    else:
        groups = draw(st.sampled_from((1, 1, 1, 2, 3)))
        group_channels, group_filters = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    return Problem(
        dims=dims,
        N=draw(st.integers(1, 3)),
        image=image,
        groups=groups,
        group_channels=group_channels,
        group_filters=group_filters,
        taps=taps,
        stride=stride,
        before=before,
        after=after,
        dilation=dilation,
        dtype=draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16))) if winograd else draw(dtypes),
        x_view=draw(views),
        w_view=draw(st.sampled_from(("contiguous", "channels_last", "narrowed", "transposed", "offset"))),
        gy_view=draw(views),
        with_bias=draw(st.booleans()),
        seed=draw(seeds),
    )


def kind_for(kernel: str) -> str:
    """What to draw so that a kernel for special problems gets enough of them."""
    return next((kind for kind in ("depthwise", "winograd") if kind in kernel), "any")


# --- every kernel -----------------------------------------------------------------------------------------------


def check(entry: Implementation, p: Problem) -> bool:
    """Compares one kernel on one problem with torch; False if the kernel is not for it."""
    x, w, b, gy = p.tensors(entry.device)
    try:
        with entry.pinned():
            found = our_result(entry.operation, p, x, w, b, gy)
    except RuntimeError as error:
        if is_beyond_this_machine(error):
            pytest.skip(str(error))
        if not is_refusal(error):
            raise
        return False
    wide = [None if t is None else t.double().cpu() for t in (x, w, b, gy)]
    exact = torch_result(entry.operation, p, *wide)
    reference = torch_result(entry.operation, p, x, w, b, gy)
    assert found.dtype == p.dtype
    # the sums of the absolute values of the terms
    magnitude = torch_result(entry.operation, p, *[None if t is None else t.abs() for t in wide])
    bound = allowed_error(reference, exact, magnitude, 2 if entry.operation == "conv_forward" else 3)
    error = error_of(found, exact)
    wider = entry.is_winograd and p.dtype is torch.float32 and not math.isinf(error)
    if wider and winograd_bound_holds(found.cpu(), exact, largest(exact)):
        return True
    assert error <= bound, f"off by {error:.3g}, allowed {bound:.3g}"
    return True


@pytest.mark.parametrize("entry", implementations("conv"))
def test_every_kernel_agrees_with_torch(entry: Implementation) -> None:
    accepted = 0

    @settings(max_examples=EXAMPLES)
    @given(problems(kind_for(entry.kernel)))
    def on_random_problems(p: Problem) -> None:
        nonlocal accepted
        accepted += check(entry, p)

    on_random_problems()
    assert accepted >= EXAMPLES // 10, f"{entry.kernel} accepted only {accepted} of {EXAMPLES} problems"


def plain(dtype: torch.dtype = torch.float32, **changes: object) -> Problem:
    values: dict = {
        "dims": 2, "N": 2, "image": (9, 11), "groups": 1, "group_channels": 6, "group_filters": 10, "taps": (3, 3),
        "stride": (1, 1), "before": (1, 1), "after": (1, 1), "dilation": (1, 1), "dtype": dtype,
        "x_view": "contiguous", "w_view": "contiguous", "gy_view": "contiguous", "with_bias": True, "seed": 0,
    }  # fmt: skip
    return Problem(**{**values, **changes})


CORNERS = {
    "one element": plain(image=(1, 1), taps=(1, 1), before=(0, 0), after=(0, 0), group_channels=1, group_filters=1),
    "one element padded": plain(image=(1, 1), group_channels=1, group_filters=1),
    "kernel as large as the image": plain(image=(3, 3), before=(0, 0), after=(0, 0)),
    "one row": plain(image=(1, 300), taps=(1, 7), before=(0, 3), after=(0, 3)),
    "one column": plain(image=(300, 1), taps=(7, 1), before=(3, 0), after=(3, 0)),
    "more padding than image": plain(image=(2, 2), before=(9, 9), after=(9, 9)),
    "stride past the image": plain(stride=(50, 50)),
    "stride larger than the kernel": plain(image=(20, 20), taps=(2, 2), stride=(5, 5)),
    "large kernel": plain(image=(20, 20), taps=(11, 11), before=(5, 5), after=(5, 5)),
    "padding after only": plain(before=(0, 0), after=(1, 1)),
    "one filter": plain(group_filters=1),
    "many filters of one channel": plain(group_channels=1, group_filters=70),
    "many channels": plain(image=(5, 5), group_channels=300, group_filters=3),
    "long sequence": plain(dims=1, image=(5000,), taps=(31,), stride=(1,), before=(15,), after=(15,), dilation=(1,)),
    "depthwise": plain(groups=64, group_channels=1, group_filters=1),
    "depthwise with two filters a channel": plain(groups=12, group_channels=1, group_filters=2),
    "wide image": plain(image=(4, 200), group_channels=3, group_filters=5),
    "winograd with a ragged edge": plain(image=(7, 9), group_channels=33, group_filters=65),
}


@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.parametrize("entry", implementations("conv"))
def test_every_kernel_in_corner_cases(entry: Implementation, name: str) -> None:
    for layout in ("contiguous", "channels_last"):
        p = CORNERS[name]
        check(entry, Problem(**{**p.__dict__, "x_view": layout, "w_view": layout, "gy_view": layout}))


@pytest.mark.parametrize("entry", implementations("conv"))
def test_nan_and_infinity_reach_exactly_the_outputs_that_see_them(entry: Implementation) -> None:
    """A zero weight or a padded row must not hide a NaN that a window covers, nor one spread to other windows.

    Not for Winograd: its tiles mix the pixels of a window with their neighbours.
    """
    if entry.is_winograd:
        pytest.skip("Winograd transforms tiles: a NaN reaches its whole tile")
    p = plain(image=(8, 8), group_channels=3, group_filters=4) if kind_for(entry.kernel) == "any" else plain(
        groups=16, group_channels=1, group_filters=1
    )  # fmt: skip
    for value in (math.nan, math.inf):
        x, w, b, gy = p.tensors(entry.device)
        x[0, 1, 4, 4], gy[1, 2, 3, 3] = value, value
        try:
            with entry.pinned():
                found = our_result(entry.operation, p, x, w, b, gy)
        except RuntimeError as error:
            if is_beyond_this_machine(error) or is_refusal(error):
                pytest.skip(str(error))
            raise
        wide = [None if t is None else t.double().cpu() for t in (x, w, b, gy)]
        exact = torch_result(entry.operation, p, *wide)
        assert torch.equal(found.isfinite().cpu(), exact.isfinite())


@pytest.mark.parametrize("entry", implementations("conv"))
def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(entry: Implementation) -> None:
    p = plain(N=0)
    x, w, b, gy = p.tensors(entry.device)
    try:
        with entry.pinned():
            found = our_result(entry.operation, p, x, w, b, gy)
    except RuntimeError as error:
        if is_beyond_this_machine(error) or is_refusal(error):
            pytest.skip(str(error))
        raise
    expected = torch_result(entry.operation, p, x, w, b, gy)
    assert found.shape == expected.shape
    assert torch.equal(found, torch.zeros_like(expected))


# --- the public functions ---------------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> tuple[int, tuple, dict]:
    """Arguments of conv1d / conv2d: (dims, tensors, options)."""
    dims = draw(st.sampled_from((1, 2)))
    groups = draw(st.sampled_from((1, 2, 4)))
    channels, filters = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4))

    def per_dim(strategy: st.SearchStrategy[int]) -> int | tuple[int, ...]:
        one = draw(strategy)
        return draw(st.sampled_from((one, (one,), tuple(draw(strategy) for _ in range(dims)))))

    taps = tuple(draw(st.integers(1, 4)) for _ in range(dims))
    padding = draw(st.sampled_from(("same", "valid", "number")))
    options = {
        "stride": 1 if padding == "same" else per_dim(st.integers(1, 3)),
        "padding": padding if padding != "number" else per_dim(st.integers(0, 3)),
        "dilation": per_dim(st.integers(1, 2)),
        "groups": groups,
    }
    batch = draw(st.sampled_from(((), (1,), (3,))))
    size = tuple(draw(st.integers(8, 14)) for _ in range(dims))
    dtype, seed = draw(dtypes), draw(seeds)
    x = normal((*batch, channels, *size), seed, dtype)
    w = normal((filters, channels // groups, *taps), seed + 1, dtype)
    b = normal((filters,), seed + 2, dtype) if draw(st.booleans()) else None
    if batch:
        x = view_as(x, draw(views))
    return dims, (x, w, b), options


def test_functions_agree_with_torch_forward_and_backward(device: str) -> None:
    @settings(max_examples=2 * EXAMPLES)
    @given(calls())
    def on_random_calls(call: tuple[int, tuple, dict]) -> None:
        dims, tensors, options = call
        ours, theirs = (F.conv1d, torch.conv1d) if dims == 1 else (F.conv2d, torch.conv2d)

        def run(function, tensors: list[Tensor | None]) -> list[Tensor]:
            leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
            y = function(*leaves, **options)
            gy = normal(tuple(y.shape), 9, torch.bfloat16).to(y)  # exact in every dtype
            return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], gy)]

        tensors = [None if t is None else t.to(device) for t in tensors]
        wide = [None if t is None else t.double().cpu() for t in tensors]
        found, reference, exact = run(ours, tensors), run(theirs, tensors), run(theirs, wide)
        magnitude = run(theirs, [None if t is None else t.abs() for t in wide])
        for number, (a, b, c, m) in enumerate(zip(found, reference, exact, magnitude, strict=True)):
            assert a.dtype == b.dtype
            scale = m if number == 0 else m.abs() + largest(c)
            assert error_of(a, c) <= allowed_error(b, c, scale, 2 if number == 0 else 3)
            assert torch.equal(a, a)  # no NaN

    on_random_calls()


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_come_in_the_memory_format_of_the_input(device: str, dtype: torch.dtype) -> None:
    x = normal((2, 4, 6, 5), 0, dtype).to(device)
    w = normal((8, 4, 3, 3), 1, dtype).to(device)
    assert F.conv2d(x, w).is_contiguous()
    last = x.contiguous(memory_format=torch.channels_last)
    assert F.conv2d(last, w).is_contiguous(memory_format=torch.channels_last)
    last.requires_grad_()
    F.conv2d(last, w).sum().backward()
    assert last.grad.is_contiguous(memory_format=torch.channels_last)


def test_tf32_follows_torchs_settings() -> None:
    from pyseqnet.functional.conv import _allows_tf32, _torch_allows_tf32

    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for precision, allowed in (("tf32", True), ("ieee", False)):
            torch.backends.cudnn.conv.fp32_precision = precision
            assert _torch_allows_tf32() is allowed
            traced = torch.compile(lambda x: x + 1 if _torch_allows_tf32() else x - 1, fullgraph=True, backend="eager")
            assert traced(torch.zeros(())).item() == (1 if allowed else -1)
            torch._dynamo.reset()
            assert not _allows_tf32(torch.zeros(1))  # a matter of CUDA
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_reference_functions_are_torchs() -> None:
    x, w, b = normal((2, 3, 8, 8), 0), normal((4, 3, 3, 3), 1), normal((4,), 2)
    assert torch.equal(F.conv2d_reference(x, w, b, 2, 1), torch.conv2d(x, w, b, 2, 1))
    x, w = x[:, :, 0], w[:, :, 0]
    assert torch.equal(F.conv1d_reference(x, w, b, 2, 1), torch.conv1d(x, w, b, 2, 1))


def test_same_padding_puts_the_odd_one_after() -> None:
    x, w = normal((1, 1, 5), 0), normal((1, 1, 4), 1)
    expected = torch.conv1d(torch.nn.functional.pad(x, (1, 2)), w)
    assert torch.allclose(F.conv1d(x, w, padding="same"), expected, rtol=1e-14)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(device: str) -> None:
    """Offsets do not fit 32 bits: only the far end of the tensors is compared, with all gradients."""
    if free_memory(device) < 14 << 30:
        pytest.skip("needs 14 GB of free memory")
    height, width, tail = 1 << 16, (1 << 15) + 8, 6
    x = torch.zeros((1, 1, height, width), dtype=torch.bfloat16, device=device)
    x[..., -tail:, :] = normal((1, 1, tail, width), 0, torch.bfloat16).to(device)
    w = normal((1, 1, 3, 3), 1, torch.bfloat16).to(device)
    geometry = (1, 1, 0, 0, 0, 0, 1, 1, 1)
    with threads(2):
        y = ops.conv_forward(x, w, None, *geometry)
        gw = ops.conv_backward(y, x, w, *geometry, False, True, False)[1]
    wide_x, wide_gy, wide_w = (t.double().cpu() for t in (x[..., -tail - 2 :, :], y[..., -tail:, :], w))
    del x
    like_x = y.new_empty(1).expand(1, 1, height, width)  # only its shape is read
    with threads(2):
        gx = ops.conv_backward(y, like_x, w, *geometry, True, False, False)[0]
    expected = torch.conv2d(wide_x, wide_w)
    assert error_of(y[..., -tail:, :], expected) <= 0.02 * largest(expected)
    assert y[..., :2, :].count_nonzero() == gx[..., :2, :].count_nonzero() == 0
    expected = torch.nn.grad.conv2d_weight(wide_x, w.shape, wide_gy)
    assert error_of(gw, expected) <= 0.02 * largest(expected)
    expected = torch.nn.grad.conv2d_input((1, 1, tail + 2, width), wide_w, wide_gy)[..., -tail:, :]
    assert error_of(gx[..., -tail:, :], expected) <= 0.02 * largest(expected)


# --- what a convolution is --------------------------------------------------------------------------------------

IMAGE = torch.tensor([[int(digit) for digit in row] for row in
                      ("100001", "010010", "001100", "100010", "010010", "001010")])  # fmt: skip
FILTERS = torch.tensor([[[1, -1, -1], [-1, 1, -1], [-1, -1, 1]], [[-1, 1, -1]] * 3])
FEATURE_MAPS = torch.tensor(
    [
        [[3, -1, -3, -1], [-3, 1, 0, -3], [-3, -3, 0, 1], [3, -2, -2, -1]],
        [[-1, -1, -1, -1], [-1, -1, -2, 1], [-1, -1, -2, 1], [-1, 0, -4, 3]],
    ]
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_worked_example(device: str, dtype: torch.dtype) -> None:
    """G1 (A6, A13): small integers, so every dtype is exact."""
    x, w = IMAGE[None, None].to(device, dtype), FILTERS[:, None].to(device, dtype)
    y = F.conv2d(x, w)
    assert torch.equal(y[0].cpu().long(), FEATURE_MAPS)
    strided = F.conv2d(x, w, stride=2)
    assert strided[0].tolist() == [[[3, -3], [-3, 0]], [[-1, -1], [-1, -2]]]
    pooled = F.max_pool2d(y, 2)
    assert pooled[0].tolist() == [[[3, 0], [3, 1]], [[-1, 1], [0, 3]]]


@pytest.mark.parametrize(
    ("size", "kernel", "padding", "stride", "expected"),
    [(6, 3, 0, 1, 4), (6, 3, 1, 1, 6), (6, 3, 0, 2, 2), (7, 3, 0, 2, 3), (8, 3, 1, 2, 4), (100, 3, 0, 3, 33),
     (19, 5, 2, 1, 19), (28, 5, 0, 1, 24)],
)  # fmt: skip
def test_golden_output_sizes(size: int, kernel: int, padding: int, stride: int, expected: int) -> None:
    """G2."""
    x, w = torch.zeros(1, 1, size, size), torch.zeros(1, 1, kernel, kernel)
    assert F.conv2d(x, w, None, stride, padding).shape == (1, 1, expected, expected)
    assert F.conv1d(x[:, :, 0], w[:, :, 0], None, stride, padding).shape == (1, 1, expected)


def test_output_sizes_on_a_grid() -> None:
    """A12: floor((c + 2p - d(k-1) - 1) / s) + 1; for d = 1 also ceil((c - k + 1 + 2p) / s)."""
    count = 0
    for c in range(1, 25):
        for k in range(1, 6):
            for p in range(4):
                for s in range(1, 5):
                    for d in (1, 2):
                        if c + 2 * p < d * (k - 1) + 1:
                            continue
                        expected = (c + 2 * p - d * (k - 1) - 1) // s + 1
                        if d == 1:
                            assert expected == math.ceil((c - k + 1 + 2 * p) / s)
                        meta = F.conv1d(
                            torch.empty(1, 1, c, device="meta"), torch.empty(1, 1, k, device="meta"), None, s, p, d
                        )
                        assert meta.shape == (1, 1, expected)
                        if count % 3 == 0:
                            y = F.conv1d(torch.zeros(1, 1, c), torch.zeros(1, 1, k), None, s, p, d)
                            assert y.shape == (1, 1, expected)
                        count += 1
    assert count > 3000


def test_receptive_field_of_one_neuron(device: str) -> None:
    """A3: the gradient of one output touches exactly R x S pixels of every channel."""
    x = normal((1, 3, 9, 9), 0, torch.float32).to(device).requires_grad_()
    F.conv2d(x, torch.ones(2, 3, 3, 5, device=device))[0, 1, 2, 3].backward()
    touched = torch.zeros(1, 3, 9, 9, dtype=torch.bool)
    touched[:, :, 2:5, 3:8] = True
    assert torch.equal((x.grad != 0).cpu(), touched)


def test_receptive_field_grows_with_depth() -> None:
    """A4: stacked 3x3 convolutions see 3, 5, 7, 9, 11 pixels."""
    w = torch.ones(1, 1, 3, 3)
    for layers, field in enumerate((3, 5, 7, 9, 11), start=1):
        x = torch.ones(1, 1, 15, 15, requires_grad=True)
        y = x
        for _ in range(layers):
            y = F.conv2d(y, w, padding=1)
        y[0, 0, 7, 7].backward()
        assert (x.grad != 0).sum() == field**2


@pytest.mark.parametrize(("kernel", "stride"), [((3, 3), 1), ((2, 5), 2), ((1, 1), 3)])
def test_translation_equivariance(device: str, kernel: tuple[int, int], stride: int) -> None:
    """A9: an input shifted by stride * m gives an output shifted by m. Integers: bit for bit, Winograd included."""
    x = torch.randint(-3, 4, (1, 4, 30, 30), device=device).float()
    w = torch.randint(-3, 4, (5, 4, *kernel), device=device).float()
    m = 2
    y, moved = F.conv2d(x, w, stride=stride), F.conv2d(x.roll((stride * m, stride * m), (2, 3)), w, stride=stride)
    if stride == 1:
        torch.testing.assert_close(moved[..., m:, m:], y[..., :-m, :-m], rtol=0, atol=1e-3)
    else:
        assert torch.equal(moved[..., m:, m:], y[..., :-m, :-m])


def test_three_ways_to_the_same_convolution(device: str) -> None:
    """A15: the sliding filter = im2col times a matrix = one large matrix with tied and zero weights (Toeplitz)."""
    x, w = normal((2, 3, 6, 7), 0).to(device), normal((4, 3, 3, 2), 1).to(device)
    slid = F.conv2d(x, w)
    columns = torch.nn.functional.unfold(x, (3, 2))
    by_columns = (w.flatten(1) @ columns).view_as(slid)
    basis = torch.eye(3 * 6 * 7, dtype=x.dtype, device=device).view(-1, 3, 6, 7)
    matrix = F.conv2d(basis, w).flatten(1)  # (C H W, K P Q)
    by_matrix = (x.flatten(1) @ matrix).view_as(slid)
    assert error_of(slid, by_columns.cpu()) <= 1e-12
    assert error_of(slid, by_matrix.cpu()) <= 1e-12
    non_zeros = (matrix != 0).sum().item()
    assert non_zeros == 4 * 4 * 6 * 3 * 3 * 2  # K P Q neurons of C R S weights each
