"""The fused block convolution + bias + ReLU (+ max-pooling): every kernel of its tables, then the functions."""

from __future__ import annotations

import doctest
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
from pyseqnet.functional import conv_relu_pool

EXAMPLES = 60
ops = torch.ops.pyseqnet
GRADIENTS = tuple(f"conv_relu_pool_{name}_gradient" for name in ("input", "weight", "bias"))


# --- problems ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Two dimensions, or (rows and columns of everything vertical being 1) one."""

    N: int
    image: tuple[int, int]
    groups: int
    group_channels: int
    group_filters: int
    taps: tuple[int, int]
    stride: tuple[int, int]
    before: tuple[int, int]  # padding
    after: tuple[int, int]
    dilation: tuple[int, int]
    pool: tuple[int, int]
    pool_stride: tuple[int, int]
    dtype: torch.dtype
    x_view: str
    w_view: str
    gy_view: str
    with_bias: bool
    seed: int

    @property
    def z_shape(self) -> tuple[int, ...]:
        sizes = zip(self.image, self.taps, self.before, self.after, self.dilation, self.stride, strict=True)
        extents = tuple((size + a + b - d * (k - 1) - 1) // s + 1 for size, k, a, b, d, s in sizes)
        return (self.N, self.groups * self.group_filters, *extents)

    @property
    def y_shape(self) -> tuple[int, ...]:
        extents = zip(self.z_shape[2:], self.pool, self.pool_stride, strict=True)
        return (*self.z_shape[:2], *((extent - k) // s + 1 for extent, k, s in extents))

    @property
    def pooled(self) -> bool:
        return self.pool + self.pool_stride != (1, 1, 1, 1)

    def geometry(self) -> tuple[int, ...]:
        return (*self.stride, *self.before, *self.after, *self.dilation, self.groups, *self.pool, *self.pool_stride)

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """x, w, bias, gy in the problem's dtype and with its strides."""
        K = self.groups * self.group_filters
        x = normal((self.N, self.groups * self.group_channels, *self.image), self.seed, self.dtype).to(device)
        w = normal((K, self.group_channels, *self.taps), self.seed + 1, self.dtype).to(device)
        b = normal((K,), self.seed + 2, self.dtype).to(device) if self.with_bias else None
        gy = normal(self.y_shape, self.seed + 3, self.dtype).to(device)
        return view_as(x, self.x_view), view_as(w, self.w_view), b, view_as(gy, self.gy_view)

    def random_saved(self, device: str) -> Tensor:
        """What a forward pass could have kept: any tap may have won, or none."""
        generator = torch.Generator().manual_seed(self.seed + 4)
        if not self.pooled:
            return normal(self.y_shape, self.seed + 4, self.dtype).to(device)
        window = math.prod(self.pool)
        arg = torch.randint(0, window + 1, self.y_shape, generator=generator)
        return arg.to(device=device, dtype=torch.uint8 if window <= 255 else torch.int32)


def convolve(p: Problem, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    pads = [amount for pair in zip(reversed(p.before), reversed(p.after), strict=True) for amount in pair]
    return torch.conv2d(torch.nn.functional.pad(x, pads), w, b, p.stride, 0, p.dilation, p.groups)


def separate_layers(p: Problem, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    y = torch.relu(convolve(p, x, w, b))
    return torch.nn.functional.max_pool2d(y, p.pool, p.pool_stride) if p.pooled else y


def gradient_of_z(p: Problem, gy: Tensor, saved: Tensor) -> Tensor:
    """By definition: each window hands its gradient to the pixel that won it."""
    if not p.pooled:
        return gy.masked_fill(saved <= 0, 0)
    N, K, P, Q = p.z_shape
    U, V = p.y_shape[2:]
    tap = saved.long()
    rows = torch.arange(U).view(-1, 1) * p.pool_stride[0] + tap // p.pool[1]
    columns = torch.arange(V) * p.pool_stride[1] + tap % p.pool[1]
    closed = tap == math.prod(p.pool)
    places = torch.where(closed, 0, rows * Q + columns)
    gz = gy.new_zeros(N, K, P * Q)
    gz.scatter_add_(2, places.flatten(2), gy.masked_fill(closed, 0).flatten(2))
    return gz.view(N, K, P, Q)


def torch_result(operation: str, p: Problem, x: Tensor, w: Tensor, b: Tensor | None, gz: Tensor) -> Tensor:
    x, w = x.detach().contiguous(), w.detach().contiguous()
    if operation == "conv_relu_pool_forward":
        return separate_layers(p, x, w, b)
    leaves = [x, w, w.new_zeros(w.shape[0])]
    wanted = leaves[GRADIENTS.index(operation)].requires_grad_()
    return torch.autograd.grad(convolve(p, *leaves), wanted, gz)[0]


def our_forward(p: Problem, x: Tensor, w: Tensor, b: Tensor | None, with_arg: bool = True) -> tuple[Tensor, Tensor]:
    with poisoned_memory(), threads(2):
        return ops.conv_relu_pool_forward(x, w, b, *p.geometry(), with_arg)


def our_gradient(operation: str, p: Problem, x: Tensor, w: Tensor, gy: Tensor, saved: Tensor) -> Tensor:
    with poisoned_memory(), threads(2):
        needs = [operation == name for name in GRADIENTS]
        found = ops.conv_relu_pool_backward(gy, saved, x, w, *p.geometry(), *needs)
        return found[GRADIENTS.index(operation)]


@st.composite
def problems(draw: st.DrawFn, kind: str = "any") -> Problem:
    """Small problems. Kinds: any; block, a layer as networks have it (stride 1, windows that do not overlap); many,
    such a layer with more input channels than half a vector; first, the first layer of a network.
    """
    if kind == "any":
        kind = draw(st.sampled_from(("general", "general", "block", "depthwise")))
    block, many, first = kind in ("block", "many", "first"), kind == "many", kind == "first"
    both = lambda strategy: (draw(strategy), draw(strategy))  # noqa: E731
    ones, small = (1, 1), st.integers(1, 3)
    if block:
        squares = ((3, 3), (3, 3), (5, 5))
        taps = draw(st.sampled_from(squares if many else (*squares, (1, 1), (2, 4))))
    else:
        taps = both(st.integers(1, 4))
    dilation, stride = (ones, ones) if block else (both(st.integers(1, 2)), both(small))
    before = tuple(k // 2 for k in taps) if block else both(st.integers(0, 3))
    after = before if block else both(st.integers(0, 3))
    if first:
        pool = (2, 2)
        pool_stride = draw(st.sampled_from((pool, pool, (2, 3), (3, 2))))
        dilation, stride = draw(st.sampled_from(((ones, ones), (ones, ones), ((2, 1), (1, 2)))))
    elif not many and draw(st.integers(0, 4)) == 0:
        pool = pool_stride = ones
    elif block:
        pool = draw(st.sampled_from(((2, 2), (2, 2), (2, 2), (3, 3), (1, 2), (4, 2))))
        pool_stride = pool
    else:
        pool, pool_stride = both(st.integers(1, 4)), both(st.integers(1, 4))
    # at least one window; some images end in the middle of a stride, of a window or of a vector
    image = tuple(
        max(1, d * (k - 1) + 1 - a - b + (window - 1) * s) + draw(st.integers(0, 20))
        for k, d, a, b, window, s in zip(taps, dilation, before, after, pool, stride, strict=True)
    )
    if kind == "depthwise":
        groups, group_channels, group_filters = draw(st.sampled_from((2, 7, 16, 17))), 1, 1
    else:
        groups = 1 if block else draw(st.sampled_from((1, 1, 2, 3)))
        channels = st.integers(9, 40) if many else st.one_of(st.integers(1, 4), st.integers(1, 36))
        channels = channels if block else st.integers(1, 12)
        channels = st.integers(1, 4) if first else channels
        group_channels, group_filters = draw(channels), draw(st.integers(1, 40 if block else 12))
    return Problem(
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
        pool=pool,
        pool_stride=pool_stride,
        dtype=draw(st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16)))
        if block
        else draw(dtypes),
        x_view=draw(views),
        w_view=draw(st.sampled_from(("contiguous", "channels_last", "narrowed", "transposed", "offset"))),
        gy_view=draw(views),
        with_bias=draw(st.booleans()),
        seed=draw(seeds),
    )


def kind_for(kernel: str) -> str:
    """Special kernels get the layers of networks, of which they take most."""
    if kernel.startswith("blocks"):
        return "many"
    if kernel.startswith("windows"):
        return "first"
    return "block" if kernel.startswith(("tile", "sparse")) else "any"


# --- every kernel -----------------------------------------------------------------------------------------------


def assert_close(entry: Implementation, found: Tensor, reference: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    assert found.dtype == reference.dtype
    forward = entry.operation == "conv_relu_pool_forward"
    error = error_of(found, exact)
    bound = allowed_error(reference, exact, magnitude, 2 if forward else 3)
    # composed kernels may run Winograd
    wider = found.dtype is torch.float32 and entry.kernel.startswith("composed") and not math.isinf(error)
    if wider and winograd_bound_holds(found.cpu(), exact, largest(exact)):
        return
    assert error <= bound, f"off by {error:.3g}, allowed {bound:.3g}"


def assert_winners(p: Problem, arg: Tensor, z: Tensor, tolerance: float) -> None:
    """The taps that arg names are the largest, or nothing is positive, up to the accuracy of the sums."""
    U, V = p.y_shape[2:]
    windows = z.unfold(2, p.pool[0], p.pool_stride[0])[:, :, :U].unfold(3, p.pool[1], p.pool_stride[1])[:, :, :, :V]
    windows = windows.flatten(4)
    padded = torch.cat([windows, torch.zeros_like(windows[..., :1])], -1)  # the last: closed, ReLU's 0
    won = padded.gather(-1, arg.long().cpu().unsqueeze(-1)).squeeze(-1)
    assert (padded.amax(-1) - won).max() <= tolerance


def check(entry: Implementation, p: Problem) -> bool:
    """Compares one kernel on one problem with torch; False if the kernel is not for it."""
    x, w, b, gy = p.tensors(entry.device)
    saved = p.random_saved(entry.device)
    forward = entry.operation == "conv_relu_pool_forward"
    arg = None
    try:
        with entry.pinned():
            if forward:
                found, arg = our_forward(p, x, w, b)
            else:
                found = our_gradient(entry.operation, p, x, w, gy, saved)
    except RuntimeError as error:
        if is_beyond_this_machine(error):
            pytest.skip(str(error))
        if not is_refusal(error):
            raise
        return False
    wide = [None if t is None else t.double().cpu() for t in (x, w, b)]
    wide_gz = gradient_of_z(p, gy.double().cpu(), saved.cpu())
    exact = torch_result(entry.operation, p, *wide, wide_gz)
    reference = torch_result(entry.operation, p, x, w, b, wide_gz.to(gy))
    # the sums of the absolute values of the terms
    magnitude = torch_result(entry.operation, p, *[None if t is None else t.abs() for t in wide], wide_gz.abs())
    assert_close(entry, found, reference, exact, magnitude)
    if arg is not None:
        assert arg.shape == (p.y_shape if p.pooled else (0,))
        if p.pooled and arg.numel():
            slack = 4 * torch.finfo(p.dtype).eps * largest(exact) + 4e-6 * largest(magnitude)
            assert_winners(p, arg, convolve(p, *wide), slack)
    return True


@pytest.mark.parametrize("entry", implementations("conv_relu_pool"))
def test_every_kernel_agrees_with_torch(entry: Implementation) -> None:
    accepted = 0

    @settings(max_examples=EXAMPLES)
    @given(problems(kind_for(entry.kernel)))
    def on_random_problems(p: Problem) -> None:
        nonlocal accepted
        accepted += check(entry, p)

    on_random_problems()
    assert accepted >= EXAMPLES // 10, f"{entry.kernel} accepted only {accepted} of {EXAMPLES} problems"


@settings(max_examples=EXAMPLES)
@given(problems("first"), st.integers(1, 7))
def test_gradients_that_are_computed_together_are_those_computed_alone(p: Problem, wanted: int) -> None:
    x, w, _, gy = p.tensors("cpu")
    saved = p.random_saved("cpu")
    needs = [bool(wanted >> i & 1) for i in range(3)]
    with poisoned_memory(), threads(2):
        together = ops.conv_relu_pool_backward(gy, saved, x, w, *p.geometry(), *needs)
    for need, operation, found in zip(needs, GRADIENTS, together, strict=True):
        alone = our_gradient(operation, p, x, w, gy, saved)
        assert torch.equal(found, alone) if need else found.numel() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("entry", implementations("conv_relu_pool"))
def test_infinite_gradients_stay_under_their_filter(entry: Implementation, value: float) -> None:
    if entry.operation != "conv_relu_pool_input_gradient":
        pytest.skip("the input gradient only")
    for p in (plain(), plain(taps=(5, 5), group_channels=1)):  # few channels: no Winograd, whose tiles spread it
        x, w, b, gy = p.tensors(entry.device)
        saved = p.random_saved(entry.device)
        gy[1, 3, 2, 3], saved[1, 3, 2, 3] = value, 1
        try:
            with entry.pinned():
                found = our_gradient(entry.operation, p, x, w, gy, saved)
        except RuntimeError as error:
            if not (is_beyond_this_machine(error) or is_refusal(error)):
                raise
            continue
        expected = torch_result(entry.operation, p, x, w, b, gradient_of_z(p, gy, saved))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def plain(dtype: torch.dtype = torch.float32, **changes: object) -> Problem:
    values: dict = {
        "N": 2, "image": (9, 11), "groups": 1, "group_channels": 3, "group_filters": 10, "taps": (3, 3),
        "stride": (1, 1), "before": (1, 1), "after": (1, 1), "dilation": (1, 1), "pool": (2, 2),
        "pool_stride": (2, 2), "dtype": dtype, "x_view": "contiguous", "w_view": "contiguous",
        "gy_view": "contiguous", "with_bias": True, "seed": 0,
    }  # fmt: skip
    return Problem(**{**values, **changes})


CORNERS = {
    "one window": plain(image=(2, 2), group_channels=1, group_filters=1),
    "one window of one pixel": plain(image=(1, 1), pool=(1, 1), pool_stride=(1, 1)),
    "an odd row, summed in pieces": plain(image=(5, 9), group_channels=5, taps=(5, 5), pool=(1, 1), pool_stride=(2, 2),
                                          before=(2, 2), after=(2, 2)),
    "every second pixel": plain(pool=(1, 1), pool_stride=(2, 2)),
    "windows that overlap": plain(pool=(3, 3), pool_stride=(2, 2)),
    "windows with gaps": plain(image=(13, 17), pool=(2, 2), pool_stride=(3, 4)),
    "window as large as the image": plain(pool=(9, 11), pool_stride=(9, 11)),
    "more than 255 taps": plain(image=(20, 20), pool=(17, 16), pool_stride=(1, 2), group_filters=3),
    "pool stride past the image": plain(pool=(2, 2), pool_stride=(50, 50)),
    "first layer": plain(image=(28, 28), group_channels=1, group_filters=32, taps=(5, 5), before=(2, 2), after=(2, 2)),
    "colour images": plain(image=(16, 32), group_channels=3, group_filters=64),
    "many channels": plain(image=(14, 14), group_channels=32, group_filters=64),
    "odd numbers": plain(image=(15, 7), group_channels=17, group_filters=33),
    "large kernel": plain(image=(20, 20), taps=(11, 11), before=(5, 5), after=(5, 5)),
    "one row": plain(image=(1, 300), taps=(1, 7), before=(0, 3), after=(0, 3), pool=(1, 3), pool_stride=(1, 3)),
    "strided": plain(image=(33, 31), taps=(7, 7), stride=(2, 2), before=(3, 3), after=(3, 3), pool=(3, 3),
                     pool_stride=(2, 2)),
    "wide image": plain(image=(4, 200), group_channels=2, group_filters=5),
    "wide image without pooling": plain(image=(4, 200), pool=(1, 1), pool_stride=(1, 1)),
    "more padding than image": plain(image=(2, 2), before=(9, 9), after=(9, 9)),
}  # fmt: skip


@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.parametrize("entry", implementations("conv_relu_pool"))
def test_every_kernel_in_corner_cases(entry: Implementation, name: str) -> None:
    for layout in ("contiguous", "channels_last"):
        p = CORNERS[name]
        check(entry, Problem(**{**p.__dict__, "x_view": layout, "w_view": layout, "gy_view": layout}))


@pytest.mark.parametrize("entry", implementations("conv_relu_pool"))
def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(entry: Implementation) -> None:
    p = plain(N=0)
    x, w, b, gy = p.tensors(entry.device)
    try:
        with entry.pinned():
            if entry.operation == "conv_relu_pool_forward":
                y, arg = our_forward(p, x, w, b)
                assert y.shape == arg.shape == p.y_shape
                return
            found = our_gradient(entry.operation, p, x, w, gy, p.random_saved(entry.device))
    except RuntimeError as error:
        if is_beyond_this_machine(error) or is_refusal(error):
            pytest.skip(str(error))
        raise
    assert torch.equal(found, torch.zeros_like(found))


# --- ties and NaN: the same as the separate layers, in every bit ------------------------------------------------------


def integers(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Small ones: sums are exact in every dtype and order, and there are many ties."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", [(1, 1), (2, 2), (3, 2), (3, 1)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_ties_and_zeros_are_decided_as_torch_does(device: str, dtype: torch.dtype, pool, channels: int) -> None:
    size, step = pool
    x, w = integers((2, channels, 13, 12), 0, dtype), integers((20, channels, 3, 3), 1, dtype)
    b = integers((20,), 2, dtype)
    results = []
    for function in (F.conv2d_relu_max_pool2d, F.conv2d_relu_max_pool2d_reference):
        for layout in (torch.contiguous_format, torch.channels_last):
            leaves = [t.to(device).requires_grad_() for t in (x.contiguous(memory_format=layout), w, b)]
            y = function(*leaves, padding=1, pool_size=size, pool_stride=step)
            gy = integers(tuple(y.shape), 3, dtype).to(device)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, gy)])
    for found in results[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[0], found, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pool", [(1, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("entry", implementations("conv_relu_pool"))
def test_nan_and_infinity_reach_the_outputs_that_see_them(entry: Implementation, pool, value: float) -> None:
    if entry.operation != "conv_relu_pool_forward":
        pytest.skip("forward only")
    p = plain(pool=pool[:1] * 2, pool_stride=pool[1:] * 2)
    x, w, b, _ = p.tensors(entry.device)
    x[0, 1, 4, 4] = value
    try:
        with entry.pinned():
            y, arg = our_forward(p, x, w, b)
    except RuntimeError as error:
        if is_beyond_this_machine(error) or is_refusal(error):
            pytest.skip(str(error))
        raise
    expected = separate_layers(p, x, w, b)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    if p.pooled and math.isnan(value):
        z = torch.relu(convolve(p, x, w, b))
        _, index = torch.nn.functional.max_pool2d(z, p.pool, p.pool_stride, return_indices=True)
        U, V = p.y_shape[2:]
        tap = arg.long()
        ours = (torch.arange(U, device=tap.device).view(-1, 1) * p.pool_stride[0] + tap // p.pool[1]) * z.shape[3]
        ours = ours + torch.arange(V, device=tap.device) * p.pool_stride[1] + tap % p.pool[1]
        assert torch.equal(ours[expected.isnan()], index[expected.isnan()])


def test_nan_gradients_flow_where_torchs_do(device: str) -> None:
    x, w = normal((1, 2, 8, 8), 0, torch.float32).to(device), normal((20, 2, 3, 3), 1, torch.float32).to(device)
    x[0, 0, 3, 3] = math.nan
    for pool in (1, 2):
        found = []
        for function in (F.conv2d_relu_max_pool2d, F.conv2d_relu_max_pool2d_reference):
            leaf = x.clone().requires_grad_()
            y = function(leaf, w, padding=1, pool_size=pool)
            found.append(torch.autograd.grad(y.nan_to_num().sum() + y.sum(), leaf)[0])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4, equal_nan=True)


# --- the functions ----------------------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, tuple, dict]:
    """Arguments of the three functions: (name, tensors, options)."""
    name = draw(st.sampled_from(("conv1d_relu", "conv2d_relu", "conv2d_relu_max_pool2d", "conv2d_relu_max_pool2d")))
    dims = 1 if "1d" in name else 2
    groups = draw(st.sampled_from((1, 1, 2)))
    channels, filters = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 18))

    def per_dim(strategy: st.SearchStrategy[int]) -> int | tuple[int, ...]:
        one = draw(strategy)
        return draw(st.sampled_from((one, (one,), tuple(draw(strategy) for _ in range(dims)))))

    taps = tuple(draw(st.integers(1, 4)) for _ in range(dims))
    padding = draw(st.sampled_from(("same", "valid", "number")))
    options: dict = {
        "stride": 1 if padding == "same" else per_dim(st.integers(1, 2)),
        "padding": padding if padding != "number" else per_dim(st.integers(0, 3)),
        "dilation": per_dim(st.integers(1, 2)),
        "groups": groups,
    }
    if "pool" in name:
        options["pool_size"] = per_dim(st.integers(1, 3))
        options["pool_stride"] = draw(st.sampled_from((None, 1, 2, 3)))
    batch = draw(st.sampled_from(((), (1,), (3,))))
    size = tuple(draw(st.integers(12, 18)) for _ in range(dims))
    seed = draw(seeds)
    x = normal((*batch, channels, *size), seed)
    w = normal((filters, channels // groups, *taps), seed + 1)
    b = normal((filters,), seed + 2) if draw(st.booleans()) else None
    return name, (view_as(x, draw(views)) if batch else x, w, b), options


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_agree_with_torch_forward_and_backward(device: str, dtype: torch.dtype) -> None:
    """In these dtypes sums that differ in their last bits hardly ever change a winner."""

    @settings(max_examples=EXAMPLES)
    @given(calls())
    def on_random_calls(call: tuple[str, tuple, dict]) -> None:
        name, tensors, options = call
        found = []
        for function in (getattr(F, name), getattr(F, name + "_reference")):
            leaves = [None if t is None else t.to(device, dtype).requires_grad_() for t in tensors]
            y = function(*leaves, **options)
            gy = normal(tuple(y.shape), 9, torch.bfloat16).to(y)
            found.append([y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], gy)])
        tolerance = 2e-4 if dtype is torch.float32 else 1e-11
        for a, b in zip(*found, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, largest(b)))

    on_random_calls()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_as_accurate_as_the_separate_layers(device: str, dtype: torch.dtype) -> None:
    x, w, b = normal((2, 3, 32, 32), 0, dtype), normal((32, 3, 5, 5), 1, dtype), normal((32,), 2, dtype)
    tensors = [t.to(device) for t in (x, w, b)]
    wide = [t.double() for t in (x, w, b)]
    exact = F.conv2d_relu_max_pool2d_reference(*wide, padding=2)
    found = F.conv2d_relu_max_pool2d(*tensors, padding=2)
    reference = F.conv2d_relu_max_pool2d_reference(*tensors, padding=2)
    assert found.dtype == dtype
    assert error_of(found, exact) <= allowed_error(reference, exact, exact, 2)


@pytest.mark.parametrize("function", ["conv1d_relu", "conv2d_relu", "conv2d_relu_max_pool2d"])
def test_gradcheck_and_double_backward(device: str, function: str) -> None:
    dims = 1 if "1d" in function else 2
    x = normal((2, 2, *(6, 7)[:dims]), 0).to(device).requires_grad_()
    w = normal((3, 2, *(3, 2)[:dims]), 1).to(device).requires_grad_()
    b = normal((3,), 2).to(device).requires_grad_()

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return getattr(F, function)(x, w, b, padding=1)

    torch.autograd.gradcheck(call, (x, w, b))
    torch.autograd.gradgradcheck(call, (x, w, b), nondet_tol=1e-12 if device == "cuda" else 0.0)


@pytest.mark.parametrize("wanted", range(1, 8))
def test_any_subset_of_inputs_may_want_gradients(device: str, wanted: int) -> None:
    for create_graph in (False, True):
        found = []
        for function in (F.conv2d_relu_max_pool2d, F.conv2d_relu_max_pool2d_reference):
            leaves = [normal(shape, i).to(device) for i, shape in enumerate(((2, 2, 6, 8), (4, 2, 3, 3), (4,)))]
            chosen = [t.requires_grad_() for i, t in enumerate(leaves) if wanted >> i & 1]
            y = function(*leaves, padding=1)
            found.append(torch.autograd.grad(y.square().sum(), chosen, create_graph=create_graph))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_neither_the_convolutions_output_nor_a_mask_is_kept(device: str) -> None:
    x = normal((2, 3, 16, 16), 0, torch.float32).to(device).requires_grad_()
    w = normal((8, 3, 3, 3), 1, torch.float32).to(device).requires_grad_()
    b = normal((8,), 2, torch.float32).to(device)
    given_tensors = {t.data_ptr() for t in (x, w, b)}

    def kept(function) -> int:
        size = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal size
            if t.data_ptr() not in given_tensors:
                size += t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            function()
        return size

    assert kept(lambda: F.conv2d_relu_max_pool2d(x, w, b, padding=1)) == 2 * 8 * 8 * 8  # a byte each
    assert kept(lambda: F.conv2d_relu(x, w, b, padding=1)) == 2 * 8 * 16 * 16 * 4  # its output, which lives anyway


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
def test_outputs_come_in_the_memory_format_of_the_input(device: str, kind: str) -> None:
    layout = torch.channels_last if kind == "channels_last" else torch.contiguous_format
    x = view_as(normal((2, 4, 6, 5), 0, torch.float32).to(device), kind).requires_grad_()
    w = normal((8, 4, 3, 3), 1, torch.float32).to(device)
    for function in (F.conv2d_relu, F.conv2d_relu_max_pool2d):
        y = function(x, w)
        assert y.is_contiguous(memory_format=layout)
        assert torch.autograd.grad(y.sum(), x)[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("arrival", ["expanded", "narrowed", "transposed", "channels_last"])
def test_gradients_arrive_with_any_strides(device: str, arrival: str) -> None:
    found = []
    for function in (F.conv2d_relu_max_pool2d, F.conv2d_relu_max_pool2d_reference):
        x = normal((3, 2, 8, 8), 0).to(device).requires_grad_()
        y = function(x, normal((4, 2, 3, 3), 1).to(device), padding=1)
        found.append(torch.autograd.grad(y, x, view_as(normal(tuple(y.shape), 2).to(device), arrival))[0])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels", [1, 3, 32])
def test_results_are_the_same_for_any_number_of_threads(channels: int) -> None:
    x, w = normal((3, channels, 20, 24), 0, torch.float32), normal((48, channels, 3, 3), 1, torch.float32)
    b = normal((48,), 2, torch.float32)
    results = []
    for count in (1, 2, 3, 1):
        with threads(count):
            leaves = [t.clone().requires_grad_() for t in (x, w, b)]
            y = F.conv2d_relu_max_pool2d(*leaves, padding=1)
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_sees_one_node(device: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    w, b = normal((6, 2, 3, 3), 1, torch.float32).to(device), normal((6,), 2, torch.float32).to(device)
    v = normal((5, 6, 3), 3, torch.float32).to(device)

    def net(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
        y = F.conv2d_relu_max_pool2d(x, w, b, padding=1, pool_size=(3, 2))
        return F.conv1d_relu(F.conv2d_relu(y, w[:, :, :1].mean(1, keepdim=True).expand(-1, 6, -1, -1)).mean(2), v)

    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (17, 22) if dynamic else (17,):
        found = []
        for function in (compiled, net):
            leaves = [t.clone().requires_grad_() for t in (torch.randn(2, 2, size, size + 3, device=device), w, b, v)]
            torch.manual_seed(size)
            leaves[0] = torch.randn(2, 2, size, size + 3, device=device, requires_grad=True)
            y = function(*leaves)
            found.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
        for a, b_ in zip(*found, strict=True):
            torch.testing.assert_close(a, b_, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(device: str, layout: str) -> None:
    for pool in ((2, 2, 2, 2), (1, 1, 1, 1)):
        p = plain(x_view=layout, w_view=layout, gy_view=layout, pool=pool[:2], pool_stride=pool[2:])
        x, w, b, gy = p.tensors(device)
        for with_arg in (False, True):
            torch.library.opcheck(ops.conv_relu_pool_forward.default, (x, w, b, *p.geometry(), with_arg))
        saved = view_as(p.random_saved(device), layout)
        for needs in ((True, True, True), (False, True, False)):
            torch.library.opcheck(ops.conv_relu_pool_backward.default, (gy, saved, x, w, *p.geometry(), *needs))


def test_autocast_casts_as_for_the_convolution(device: str) -> None:
    x, w = torch.randn(1, 2, 8, 8, device=device), torch.randn(4, 2, 3, 3, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert F.conv2d_relu_max_pool2d(x, w).dtype is torch.bfloat16
        assert F.conv2d_relu(x, w, torch.randn(4, device=device)).dtype is torch.bfloat16


# --- refusals ---------------------------------------------------------------------------------------------------

X, W = torch.zeros(1, 2, 6, 6), torch.zeros(4, 2, 3, 3)
BAD_CALLS = {
    "window larger than the output": ((X, W), {"pool_size": 5}),
    "pool size 0": ((X, W), {"pool_size": 0}),
    "negative pool size": ((X, W), {"pool_size": -2}),
    "three pool sizes": ((X, W), {"pool_size": (2, 2, 2)}),
    "pool stride 0": ((X, W), {"pool_stride": 0}),
    "pool size as text": ((X, W), {"pool_size": "2"}),
    "pool size as float": ((X, W), {"pool_size": 2.0}),
    "kernel larger than the image": ((X[..., :2, :2], W), {}),
    "wrong channels": ((X[:, :1], W), {}),
    "wrong groups": ((X, W), {"groups": 3}),
    "bias of the wrong length": ((X, W, torch.zeros(3)), {}),
    "other dtype": ((X.double(), W), {}),
    "stride 0": ((X, W), {"stride": 0}),
    "negative padding": ((X, W), {"padding": -1}),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_refusals_are_torchs(name: str) -> None:
    arguments, options = BAD_CALLS[name]
    with pytest.raises(Exception) as theirs:
        F.conv2d_relu_max_pool2d_reference(*arguments, **options)
    with pytest.raises(type(theirs.value)) as ours:
        F.conv2d_relu_max_pool2d(*arguments, **options)
    assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]


def test_other_dtypes_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"conv2d_relu: expected one of float32.*; got torch.int32"):
        F.conv2d_relu(X.int(), W.int())


def test_hostile_raw_calls_raise() -> None:
    geometry, pool = (1, 1, 0, 0, 0, 0, 1, 1, 1), (2, 2, 2, 2)
    huge = 1 << 62
    for bad in ((0, 2, 2, 2), (2, 2, 0, 1), (-1, 2, 2, 2), (5, 5, 1, 1), (huge, huge, 1, 1)):
        with pytest.raises((ValueError, RuntimeError)):
            ops.conv_relu_pool_forward(X, W, None, *geometry, *bad, True)
    y, arg = ops.conv_relu_pool_forward(X, W, None, *geometry, 2, 2, huge, huge, True)
    assert y.shape == arg.shape == (1, 4, 1, 1)
    gy = torch.zeros(1, 4, 2, 2)
    saved = torch.zeros(1, 4, 2, 2, dtype=torch.uint8)
    wrong = (
        (gy[:, :3], saved, X, W), (gy, saved[:, :3], X, W), (gy, saved.int(), X, W), (gy, saved.bool(), X, W),
        (gy.double(), saved, X, W), (gy[0], saved[0], X, W), (gy, gy, X, W), (gy, saved, X[:, :1], W),
    )  # fmt: skip
    for tensors in wrong:
        with pytest.raises((ValueError, RuntimeError)):
            ops.conv_relu_pool_backward(*tensors, *geometry, *pool, True, True, True)
    # taps that no forward wrote: no gradient, no harm
    nonsense = torch.full_like(saved, 255)
    for gradient in ops.conv_relu_pool_backward(gy + 1, nonsense, X + 1, W + 1, *geometry, *pool, True, True, True):
        assert not gradient.any()
    many = (16, 16, 1, 1)
    x, gy = torch.ones(1, 2, 20, 20), torch.ones(1, 4, 3, 3)
    for tap in (-1, -(1 << 30), 1 << 30):
        strange = torch.full((1, 4, 3, 3), tap, dtype=torch.int32)
        for gradient in ops.conv_relu_pool_backward(gy, strange, x, W + 1, *geometry, *many, True, True, False)[:2]:
            assert not gradient.any()


def test_examples() -> None:
    results = doctest.testmod(conv_relu_pool, extraglobs={"torch": torch, **vars(F)})
    assert results.attempted
    assert not results.failed
