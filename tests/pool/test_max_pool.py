"""Max-pooling: every kernel of the dispatch tables on random problems, then torch's rules one by one (A16-A18)."""

from __future__ import annotations

import contextlib
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
    forced,
    free_memory,
    implementations,
    is_beyond_this_machine,
    is_refusal,
    normal,
    poisoned_memory,
    seeds,
    threads,
    view_as,
    views,
)
from torch import Tensor

import pyseqnet.functional as F
from pyseqnet import _C

EXAMPLES = 150
ops = torch.ops.pyseqnet


@dataclass(frozen=True)
class Problem:
    N: int
    C: int
    image: tuple[int, ...]  # H W, or W
    window: tuple[int, ...]  # R S, or S
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool
    dtype: torch.dtype
    values: str
    x_view: str
    gy_view: str
    with_arg: bool
    seed: int

    @property
    def dims(self) -> int:
        return len(self.image)

    def input(self, device: str) -> Tensor:
        x = normal((self.N, self.C, *self.image), self.seed)
        if self.values == "ties":
            x = (2 * x).round()
        elif self.values == "special":  # few of each: a window may hold two NaNs, or nothing but -inf
            kinds = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0], dtype=torch.float64)
            chosen = torch.randint(0, 30, x.shape, generator=torch.Generator().manual_seed(self.seed))
            x = torch.where(chosen < len(kinds), kinds[chosen.clamp_max(len(kinds) - 1)], x)
        elif self.values == "-inf":
            x = torch.full_like(x, -math.inf)
        return view_as(x.to(device, self.dtype), self.x_view)

    def geometry(self) -> tuple[int, ...]:
        def both(values: tuple[int, ...], filler: int) -> tuple[int, ...]:
            return values if self.dims == 2 else (filler, *values)

        return (
            *both(self.window, 1), *both(self.stride, 1), *both(self.padding, 0), *both(self.dilation, 1),
            self.ceil_mode,
        )  # fmt: skip

    def height_and_width(self) -> tuple[int, ...]:
        return self.image if self.dims == 2 else (1, *self.image)


def torch_pool(p: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    """torch's values and indices, on the CPU in contiguous tensors: the definition."""
    pool = torch.nn.functional.max_pool1d if p.dims == 1 else torch.nn.functional.max_pool2d
    return pool(x.cpu().contiguous(), p.window, p.stride, p.padding, p.dilation, p.ceil_mode, return_indices=True)


def torch_gradient(p: Problem, indices: Tensor, gy: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Every window's gradient, added to the pixel that won it. A window without a pixel adds nothing."""
    pixels = math.prod(p.image)
    planes = (p.N, p.C, math.prod(indices.shape[2:]))
    at, gy = indices.reshape(planes), gy.cpu().to(dtype).reshape(planes)
    inside = (at >= 0) & (at < pixels)
    gx = torch.zeros(p.N, p.C, pixels, dtype=dtype)
    gx.scatter_add_(2, at.clamp(0, pixels - 1), torch.where(inside, gy, 0))
    return gx.view(p.N, p.C, *p.image)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    dims = draw(st.sampled_from((1, 2, 2)))
    kind = draw(st.sampled_from(("usual", "usual", "any", "any", "large window")))
    many = draw(st.booleans())  # channels, as a channels-last kernel has its lanes there

    def per_dim(strategy: st.SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(draw(strategy) for _ in range(dims))

    if kind == "large window":  # more than 256 taps do not fit a byte
        window = (draw(st.integers(250, 300)),) if dims == 1 else (draw(st.integers(15, 18)), draw(st.integers(15, 18)))
        stride, dilation = per_dim(st.integers(1, 40)), (1,) * dims
    elif kind == "usual":
        window, stride, dilation = per_dim(st.integers(1, 3)), per_dim(st.integers(1, 3)), (1,) * dims
    else:
        window, stride, dilation = per_dim(st.integers(1, 6)), per_dim(st.integers(1, 7)), per_dim(st.integers(1, 3))
    padding = tuple(draw(st.integers(0, size // 2)) for size in window)
    extra = 60 if dims == 1 else 20
    image = tuple(
        max(1, d * (k - 1) + 1 - 2 * a) + draw(st.integers(0, extra))
        for k, d, a in zip(window, dilation, padding, strict=True)
    )
    # A dilated window may step over a small image. What torch reads then is not defined: such problems are left out.
    image = tuple(max(size, d) for size, d in zip(image, dilation, strict=True))
    return Problem(
        N=draw(st.integers(1, 2)),
        C=draw(st.sampled_from((8, 16, 17, 33))) if many else draw(st.integers(1, 5)),
        image=image,
        window=window,
        stride=stride,
        padding=padding,
        dilation=dilation,
        ceil_mode=draw(st.booleans()),
        dtype=draw(dtypes),
        values=draw(st.sampled_from(("normal", "normal", "ties", "special", "-inf"))),
        x_view=draw(views),
        gy_view=draw(views),
        with_arg=draw(st.sampled_from((True, True, False))),
        seed=draw(seeds),
    )


def check_forward(p: Problem, x: Tensor, entry: Implementation, expected: tuple[Tensor, Tensor]) -> None:
    with entry.pinned(), poisoned_memory(), threads(2):
        y, arg = ops.max_pool_forward(x, *p.geometry(), p.with_arg)
    assert torch.equal(y.cpu().nan_to_num(nan=12345), expected[0].nan_to_num(nan=12345))
    wide = math.prod(p.window) > 256
    assert arg.dtype == (torch.int32 if wide else torch.uint8)
    if p.with_arg:
        indices = ops.max_pool_indices(arg, *p.height_and_width(), *p.geometry())
        assert torch.equal(indices.cpu(), expected[1])
    else:
        assert arg.numel() == 0


def check_indices(p: Problem, x: Tensor, entry: Implementation, expected: tuple[Tensor, Tensor]) -> None:
    _, arg = ops.max_pool_forward(x, *p.geometry(), True)
    with entry.pinned(), poisoned_memory(), threads(2):
        indices = ops.max_pool_indices(arg, *p.height_and_width(), *p.geometry())
    assert indices.dtype == torch.int64
    assert torch.equal(indices.cpu(), expected[1])


def check_backward(p: Problem, x: Tensor, entry: Implementation, expected: tuple[Tensor, Tensor]) -> None:
    _, arg = ops.max_pool_forward(x, *p.geometry(), True)
    gy = view_as(normal(tuple(expected[0].shape), p.seed + 1, p.dtype).to(entry.device), p.gy_view)
    with entry.pinned(), poisoned_memory(), threads(2):
        gx = ops.max_pool_backward(gy, arg, *p.height_and_width(), *p.geometry())
    assert gx.dtype == p.dtype
    exact = torch_gradient(p, expected[1], gy)
    accumulation = torch.float64 if p.dtype == torch.float64 else torch.float32
    reference = torch_gradient(p, expected[1], gy, accumulation).to(p.dtype)
    magnitude = torch_gradient(p, expected[1], gy.abs())
    assert error_of(gx, exact) <= allowed_error(reference, exact, magnitude, 3)


CHECKS = {"max_pool_forward": check_forward, "max_pool_indices": check_indices, "max_pool_backward": check_backward}


def check(entry: Implementation, p: Problem) -> bool:
    """Compares one kernel on one problem with torch; False if the kernel is not for it."""
    x = p.input(entry.device)
    try:
        CHECKS[entry.operation](p, x, entry, torch_pool(p, x))
    except RuntimeError as error:
        if is_beyond_this_machine(error):
            pytest.skip(str(error))
        if not is_refusal(error):
            raise
        return False
    return True


@pytest.mark.parametrize("entry", implementations("max_pool"))
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
    N=2, C=3, image=(9, 11), window=(2, 2), stride=(2, 2), padding=(0, 0), dilation=(1, 1), ceil_mode=False,
    dtype=torch.float32, values="normal", x_view="contiguous", gy_view="contiguous", with_arg=True, seed=0,
)  # fmt: skip
CORNERS = {
    "one element": replace(PLAIN, image=(1, 1), window=(1, 1), stride=(1, 1)),
    "one element padded": replace(PLAIN, image=(1, 1), stride=(1, 1), padding=(1, 1)),
    "empty batch": replace(PLAIN, N=0),
    "two by two": replace(PLAIN, image=(64, 64), C=19),
    "three by three, stride two, padded": replace(PLAIN, image=(57, 61), window=(3, 3), padding=(1, 1), C=16),
    "three by three, stride one": replace(PLAIN, image=(33, 35), window=(3, 3), stride=(1, 1), padding=(1, 1)),
    "ceil_mode": replace(PLAIN, image=(8, 10), window=(3, 3), ceil_mode=True),
    "one tap": replace(PLAIN, window=(1, 1), stride=(3, 2)),
    "256 taps": replace(PLAIN, image=(40, 40), window=(16, 16)),
    "257 taps": replace(PLAIN, image=(3, 600), window=(1, 257), stride=(1, 3)),
    "the whole image": replace(PLAIN, image=(50, 50), window=(50, 50), stride=(1, 1)),
    "stride past the image": replace(PLAIN, stride=(40, 40)),
    "one row": replace(PLAIN, image=(1, 1000), window=(1, 3), stride=(1, 2), padding=(0, 1)),
    "one column": replace(PLAIN, image=(1000, 1), window=(3, 1), stride=(2, 1), padding=(1, 0)),
    "many taps win one pixel": replace(PLAIN, image=(20, 20), window=(7, 7), stride=(1, 1), values="ties"),
    "only minus infinity": replace(PLAIN, values="-inf", window=(3, 3), padding=(1, 1)),
    "special values": replace(PLAIN, image=(30, 40), values="special", window=(3, 3), padding=(1, 1)),
    "a large plane": replace(PLAIN, image=(300, 301), C=2),
    "many channels": replace(PLAIN, C=200),
    "long sequence": replace(PLAIN, image=(9001,), window=(3,), stride=(2,), padding=(1,), dilation=(1,)),
    "long sequence, long window": replace(
        PLAIN, image=(9001,), window=(300,), stride=(7,), padding=(150,), dilation=(1,)
    ),
}


@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.parametrize("entry", implementations("max_pool"))
def test_every_kernel_in_corner_cases(entry: Implementation, name: str) -> None:
    for layout in ("contiguous", "channels_last"):
        for dtype in (torch.float32, torch.bfloat16):
            check(entry, replace(CORNERS[name], x_view=layout, gy_view=layout, dtype=dtype))


# --- the public functions ---------------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> tuple[int, Tensor, dict]:
    dims = draw(st.sampled_from((1, 2)))

    def per_dim(strategy: st.SearchStrategy[int]) -> int | tuple[int, ...]:
        one = draw(strategy)
        return draw(st.sampled_from((one, (one,), tuple(draw(strategy) for _ in range(dims)))))

    kernel_size = per_dim(st.integers(2, 4))
    options = {
        "kernel_size": kernel_size,
        "stride": draw(st.sampled_from((None, 1, 2, (2,), (3,) * dims))),
        "padding": per_dim(st.integers(0, 1)),
        "dilation": per_dim(st.integers(1, 2)),
        "ceil_mode": draw(st.booleans()),
    }
    shape = (*draw(st.sampled_from(((), (1,), (3,)))), draw(st.integers(1, 4)))
    size = tuple(draw(st.integers(8, 14)) for _ in range(dims))
    x = normal((*shape, *size), draw(seeds), draw(dtypes))
    return dims, view_as(x, draw(views)) if x.dim() == dims + 2 else x, options


def test_functions_agree_with_torch_forward_and_backward(device: str) -> None:
    @settings(max_examples=EXAMPLES)
    @given(calls())
    def on_random_calls(call: tuple[int, Tensor, dict]) -> None:
        dims, x, options = call
        ours, theirs = (
            (F.max_pool1d, torch.nn.functional.max_pool1d)
            if dims == 1
            else (F.max_pool2d, torch.nn.functional.max_pool2d)
        )

        def run(function, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = x.detach().requires_grad_()
            y, indices = function(x, **options, return_indices=True)
            gy = normal(tuple(y.shape), 9).round().to(y)  # whole numbers: every order of summation is exact
            return y.detach(), indices, torch.autograd.grad(y, x, gy)[0]

        found, expected = run(ours, x.to(device)), run(theirs, x.contiguous())
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a.cpu(), b)
        assert torch.equal(ours(x.to(device), **options).cpu(), expected[0])

    on_random_calls()


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_come_in_the_memory_format_of_the_input(device: str, dtype: torch.dtype) -> None:
    x = normal((2, 4, 6, 6), 0, dtype).to(device)
    assert F.max_pool2d(x, 2).is_contiguous()
    last = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y, indices = F.max_pool2d(last, 2, return_indices=True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert indices.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert last.grad.is_contiguous(memory_format=torch.channels_last)


def test_reference_functions_are_torchs() -> None:
    x = normal((2, 3, 8, 8), 0)
    assert torch.equal(F.max_pool2d_reference(x, 3, 2, 1), torch.nn.functional.max_pool2d(x, 3, 2, 1))
    assert torch.equal(F.max_pool1d_reference(x[0], 2), torch.nn.functional.max_pool1d(x[0], 2))


def test_indices_carry_no_gradient() -> None:
    x = normal((1, 1, 4), 0).requires_grad_()
    y, indices = F.max_pool1d(x, 2, return_indices=True)
    assert y.requires_grad
    assert not indices.requires_grad


# --- the rules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_pooling_of_consecutive_numbers(device: str, dtype: torch.dtype) -> None:
    """A18: 5x5 numbers, window 2: [[6, 8], [16, 18]]; with ceil_mode the last row and column make a third."""
    x = torch.arange(25, device=device).reshape(1, 1, 5, 5).to(dtype)
    assert F.max_pool2d(x, 2)[0, 0].tolist() == [[6, 8], [16, 18]]
    assert F.max_pool2d(x, 2, ceil_mode=True)[0, 0].tolist() == [[6, 8, 9], [16, 18, 19], [21, 23, 24]]


def test_subsampling(device: str) -> None:
    """A16: half the height and width, no parameters; a window of one tap with stride 2 is x[::2, ::2]."""
    x = normal((2, 3, 12, 10), 0).to(device)
    assert F.max_pool2d(x, 2).shape == (2, 3, 6, 5)
    assert torch.equal(F.max_pool2d(x, 1, 2), x[..., ::2, ::2])


def test_padding_never_wins(device: str) -> None:
    x = torch.full((1, 1, 3, 3), -5.0, device=device)
    assert torch.equal(F.max_pool2d(x, 3, 1, 1), x)
    y, indices = F.max_pool2d(torch.full_like(x, -math.inf), 3, 1, 1, return_indices=True)
    assert torch.equal(y, torch.full_like(x, -math.inf))
    assert indices[0, 0].tolist() == [[0, 0, 1], [0, 0, 1], [3, 3, 4]]


def test_nan_propagates_and_ties_go_to_the_first(device: str) -> None:
    x = torch.tensor([[1.0, math.nan, 3.0, math.nan, 2.0, 2.0]], device=device)
    y, indices = F.max_pool1d(x, 3, return_indices=True)
    assert y[0].isnan().tolist() == [True, True]
    assert indices.tolist() == [[1, 3]]
    tie = torch.tensor([[7.0, 7.0, 7.0]], device=device, requires_grad=True)
    F.max_pool1d(tie, 3).sum().backward()
    assert tie.grad.tolist() == [[1, 0, 0]]


def test_last_window_of_ceil_mode_starts_inside(device: str) -> None:
    for size in range(2, 15):
        for kernel in (2, 3, 4):
            for stride in (1, 2, 3, 5):
                for padding in range(kernel // 2 + 1):
                    x = torch.arange(size, dtype=torch.float32).reshape(1, 1, size)
                    if size + 2 * padding < kernel:
                        continue
                    expected = torch.nn.functional.max_pool1d(x, kernel, stride, padding, ceil_mode=True)
                    found = F.max_pool1d(x.to(device), kernel, stride, padding, ceil_mode=True)
                    assert torch.equal(found.cpu(), expected)


def fast_kernel(operation: str) -> str | None:
    """The CPU kernel that serves a bfloat16 sequence, unless it is the reference, which takes minutes here."""
    x = torch.zeros(1, 1, 8, dtype=torch.bfloat16)
    geometry = (1, 4, 1, 4, 0, 0, 1, 1, False)
    for name in _C.dispatch_tables()[operation]["cpu"]:
        with contextlib.suppress(RuntimeError), forced(operation, name):
            y, arg = ops.max_pool_forward(x, *geometry, True)
            ops.max_pool_backward(y, arg, 1, 8, *geometry)
            return None if name == "reference" else name
    return None


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(device: str) -> None:
    """Offsets do not fit 32 bits: only the far ends of the tensors are compared."""
    if device == "cpu" and not (fast_kernel("max_pool_forward") and fast_kernel("max_pool_backward")):
        pytest.skip("only the reference serves this machine; it takes minutes")
    if free_memory(device) < 12 << 30:
        pytest.skip("needs 12 GB of free memory")
    # Windows far apart: a second's work, on offsets that are as large as any.
    planes, length, step = 2049, 1 << 20, 4096
    x = torch.zeros((1, planes, length), dtype=torch.bfloat16, device=device)
    x[:, -1:] = normal((1, 1, length), 0, torch.bfloat16)
    geometry = (1, 4, 1, step, 0, 0, 1, 1, False)
    with threads(2):
        y, arg = ops.max_pool_forward(x, *geometry, True)
    expected, indices = torch.nn.functional.max_pool1d(x[:, -1:].cpu(), 4, step, return_indices=True)
    assert torch.equal(y[:, -1:].cpu(), expected)
    assert torch.equal(arg[:, -1:].cpu().long(), indices % step)
    del x
    with threads(2):
        gx = ops.max_pool_backward(y, arg, 1, length, *geometry)
    assert torch.equal(gx[0, -1].cpu().view(-1, step).sum(-1), expected.flatten())
    assert gx[:, :2].count_nonzero() == 0
