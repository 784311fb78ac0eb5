"""Bad input is refused in words, as torch refuses it where torch does; nothing can crash the interpreter.

A refusal is a Python exception of a usual class whose text names no C++ file. What could end the process, raw
operations with hostile arguments, runs in a process of its own.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from support import needs_cuda, run_python

import pyseqnet.functional as F
from pyseqnet import _C

ops = torch.ops.pyseqnet
REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, OverflowError)
HUGE = (2**31, 2**40, 2**62, 2**63 - 1)
TWINS = {
    "conv1d": (F.conv1d, torch.conv1d),
    "conv2d": (F.conv2d, torch.conv2d),
    "max_pool1d": (F.max_pool1d, torch.nn.functional.max_pool1d),
    "max_pool2d": (F.max_pool2d, torch.nn.functional.max_pool2d),
}


def outcome(function, arguments: tuple, options: dict) -> torch.Tensor | Exception:
    try:
        return function(*arguments, **options)
    except Exception as error:
        return error


def check_text(error: Exception) -> None:
    text = str(error)
    assert text
    assert not re.search(r"csrc/|kernels/|pyseqnet/functional|shim|API call failed", text), text


def opening(error: Exception) -> str:
    """What an error says first: torch goes on with the argument types that it was called with, or with C++ frames."""
    return str(error).splitlines()[0].split(" - got (")[0]


def assert_refused_as_torch_does(name: str, *arguments: object, **options: object) -> None:
    """Torch refuses: we raise its class and its message. Torch accepts: so do we, with the same result."""
    ours, theirs = TWINS[name]
    found, expected = outcome(ours, arguments, options), outcome(theirs, arguments, options)
    if isinstance(expected, Exception):
        assert isinstance(found, Exception), f"torch raises {expected!r}"
        assert type(found) is type(expected), f"{found!r} instead of {expected!r}"
        assert opening(found) == opening(expected)
    elif isinstance(found, Exception):
        raise found
    else:
        torch.testing.assert_close(found, expected)


def image(*shape: int, dtype: torch.dtype = torch.float32, **options: object) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, **options)


BAD_CONV = {
    "rank of the input": ((image(4, 4), image(2, 1, 3, 3)), {}),
    "rank of the input, too large": ((image(1, 1, 1, 4, 4), image(2, 1, 3, 3)), {}),
    "scalar input": ((torch.tensor(1.0), image(2, 1, 3, 3)), {}),
    "rank of the weight": ((image(1, 1, 4, 4), image(2, 1, 3)), {}),
    "scalar weight": ((image(1, 1, 4, 4), torch.tensor(1.0)), {}),
    "rank of the bias": ((image(1, 1, 4, 4), image(2, 1, 3, 3), image(2, 1)), {}),
    "length of the bias": ((image(1, 1, 4, 4), image(2, 1, 3, 3), image(3)), {}),
    "channels": ((image(1, 3, 4, 4), image(2, 1, 3, 3)), {}),
    "channels of a group": ((image(1, 4, 4, 4), image(2, 4, 3, 3)), {"groups": 2}),
    "filters do not divide by groups": ((image(1, 4, 4, 4), image(3, 2, 3, 3)), {"groups": 2}),
    "kernel larger than the image": ((image(1, 1, 2, 2), image(2, 1, 3, 3)), {}),
    "dilated kernel larger than the image": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"dilation": 2}),
    "no groups": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"groups": 0}),
    "negative groups": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"groups": -1}),
    "no stride": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"stride": 0}),
    "negative stride": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"stride": (1, -1)}),
    "negative padding": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"padding": -1}),
    "no dilation": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"dilation": 0}),
    "negative dilation": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"dilation": -2}),
    "three strides": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"stride": (1, 1, 1)}),
    "no strides": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"stride": ()}),
    "no paddings": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"padding": ()}),
    "three paddings": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"padding": (1, 1, 1)}),
    "three dilations": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"dilation": (1, 1, 1)}),
    "stride in words": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"stride": "two"}),
    "fractional stride": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"stride": 1.5}),
    "fractional strides": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"stride": (1.5, 1)}),
    "stride None": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"stride": None}),
    "padding None": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"padding": None}),
    "groups None": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"groups": None}),
    "groups in a tuple": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"groups": (1,)}),
    "unknown padding": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"padding": "reflect"}),
    "'same' with a stride": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"padding": "same", "stride": 2}),
    "input None": ((None, image(2, 1, 3, 3)), {}),
    "weight None": ((image(1, 1, 4, 4), None), {}),
    "input an array": ((np.ones((1, 1, 4, 4), np.float32), image(2, 1, 3, 3)), {}),
    "weight an array": ((image(1, 1, 4, 4), np.ones((2, 1, 3, 3), np.float32)), {}),
    "bias an array": ((image(1, 1, 4, 4), image(2, 1, 3, 3), np.ones(2, np.float32)), {}),
    "input a list": (([[[[1.0]]]], image(2, 1, 1, 1)), {}),
    "input a number": ((1.0, image(2, 1, 3, 3)), {}),
    "input a string": (("image", image(2, 1, 3, 3)), {}),
    "dtypes of input and weight": ((image(1, 1, 4, 4), image(2, 1, 3, 3, dtype=torch.float64)), {}),
    "dtypes of input and bias": ((image(1, 1, 4, 4), image(2, 1, 3, 3), image(2, dtype=torch.float64)), {}),
    "dtypes bfloat16 and float32": ((image(1, 1, 4, 4, dtype=torch.bfloat16), image(2, 1, 3, 3)), {}),
    "no filters": ((image(1, 1, 4, 4), image(0, 1, 3, 3)), {}),
    "an empty kernel": ((image(1, 1, 4, 4), image(2, 1, 0, 3)), {}),
    "an empty image": ((image(1, 1, 0, 4), image(2, 1, 3, 3)), {}),
    "an empty image, padded": ((image(1, 1, 0, 4), image(2, 1, 3, 3)), {"padding": 2}),
    "an empty batch": ((image(0, 1, 4, 4), image(2, 1, 3, 3)), {}),
    "True as a stride": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"stride": True}),
    "a numpy integer as a stride": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"stride": np.int64(2)}),
    "a list of strides": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"stride": [2, 2]}),
    "a tensor as a stride": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"stride": torch.tensor(2)}),
    "a torch.Size as padding": ((image(1, 1, 4, 4), image(2, 1, 3, 3)), {"padding": torch.Size([1, 1])}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONV)
def test_conv2d_refuses_as_torch_does(case: str) -> None:
    arguments, options = BAD_CONV[case]
    assert_refused_as_torch_does("conv2d", *arguments, **options)


BAD_CONV1D = {
    "rank of the input": ((image(4), image(2, 1, 3)), {}),
    "an image": ((image(1, 1, 4, 4), image(2, 1, 3)), {}),
    "rank of the weight": ((image(1, 1, 4), image(2, 1, 3, 3)), {}),
    "channels": ((image(1, 3, 4), image(2, 1, 3)), {}),
    "two strides": ((image(1, 1, 4), image(2, 1, 3)), {"stride": (1, 1)}),
    "kernel larger than the sequence": ((image(1, 1, 2), image(2, 1, 3)), {}),
    "negative padding": ((image(1, 1, 4), image(2, 1, 3)), {"padding": -1}),
    "unbatched with wrong channels": ((image(2, 4), image(2, 1, 3)), {}),
}


@pytest.mark.parametrize("case", BAD_CONV1D)
def test_conv1d_refuses_as_torch_does(case: str) -> None:
    arguments, options = BAD_CONV1D[case]
    assert_refused_as_torch_does("conv1d", *arguments, **options)


BAD_POOL = {
    "rank of the input": ((image(4, 4), 2), {}),
    "rank of the input, too large": ((image(1, 1, 1, 4, 4), 2), {}),
    "no window": ((image(1, 1, 4, 4), 0), {}),
    "a negative window": ((image(1, 1, 4, 4), -2), {}),
    "no stride": ((image(1, 1, 4, 4), 2, 0), {}),
    "a negative stride": ((image(1, 1, 4, 4), 2, -1), {}),
    "padding beyond half the window": ((image(1, 1, 4, 4), 2, 2, 2), {}),
    "negative padding": ((image(1, 1, 4, 4), 2, 2, -1), {}),
    "no dilation": ((image(1, 1, 4, 4), 2), {"dilation": 0}),
    "a negative dilation": ((image(1, 1, 4, 4), 2), {"dilation": -1}),
    "window larger than the image": ((image(1, 1, 4, 4), 5), {}),
    "three window extents": ((image(1, 1, 4, 4), (2, 2, 2)), {}),
    "three strides": ((image(1, 1, 4, 4), 2, (1, 1, 1)), {}),
    "no window extents": ((image(1, 1, 4, 4), ()), {}),
    "no strides: as the window": ((image(1, 1, 4, 4), 2, ()), {}),
    "window in words": ((image(1, 1, 4, 4), "two"), {}),
    "a fractional window": ((image(1, 1, 4, 4), 2.5), {}),
    "window None": ((image(1, 1, 4, 4), None), {}),
    "input None": ((None, 2), {}),
    "input an array": ((np.ones((1, 1, 4, 4), np.float32), 2), {}),
    "input a list": (([[[[1.0]]]], 1), {}),
    "an empty image": ((image(1, 1, 0, 4), 2), {}),
    "no channels": ((image(1, 0, 4, 4), 2), {}),
    "an empty batch": ((image(0, 1, 4, 4), 2), {}),
    "ceil_mode in words": ((image(1, 1, 4, 4), 2), {"ceil_mode": "yes"}),
    "ceil_mode None": ((image(1, 1, 4, 4), 2), {"ceil_mode": None}),
    "a numpy integer as a window": ((image(1, 1, 4, 4), np.int64(2)), {}),
    "a list as a window": ((image(1, 1, 4, 4), [2, 2]), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_POOL)
def test_max_pool2d_refuses_as_torch_does(case: str) -> None:
    arguments, options = BAD_POOL[case]
    assert_refused_as_torch_does("max_pool2d", *arguments, **options)


BAD_POOL1D = {
    "rank of the input": ((image(4), 2), {}),
    "an image": ((image(1, 1, 4, 4), 2), {}),
    "two window extents": ((image(1, 1, 4), (2, 2)), {}),
    "padding beyond half the window": ((image(1, 1, 4), 2, 2, 2), {}),
    "no window": ((image(1, 1, 4), 0), {}),
    "window larger than the sequence": ((image(1, 1, 4), 5), {}),
    "an empty sequence": ((image(1, 1, 0), 2), {}),
    "an empty batch": ((image(0, 1, 4), 2), {}),
    "no channels": ((image(1, 0, 4), 2), {}),
}


@pytest.mark.parametrize("case", BAD_POOL1D)
def test_max_pool1d_refuses_as_torch_does(case: str) -> None:
    arguments, options = BAD_POOL1D[case]
    assert_refused_as_torch_does("max_pool1d", *arguments, **options)


@pytest.mark.parametrize("name", TWINS)
def test_missing_and_unknown_arguments_are_named(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        TWINS[name][0]()
    with pytest.raises(TypeError, match="colour"):
        TWINS[name][0](image(1, 1, 4, 4), 2, colour="red")


def test_no_channels_make_an_empty_sum(device: str) -> None:
    """Torch forgets the filters here and gives (1, 0, 2, 2)."""
    x, w = image(1, 0, 4, 4, device=device), image(2, 0, 3, 3, device=device)
    b = torch.tensor([3.0, 4.0], device=device)
    assert torch.equal(F.conv2d(x, w), torch.zeros(1, 2, 2, 2, device=device))
    assert torch.equal(F.conv2d(x, w, b), b.view(1, 2, 1, 1).expand(1, 2, 2, 2))


OTHER_DTYPES = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
def test_other_dtypes_are_refused_by_name(dtype: torch.dtype) -> None:
    """Torch takes some of them: then ours is a TypeError with the dtype's name, else the error is torch's."""
    x, w = torch.zeros(1, 1, 6, 6).to(dtype), torch.zeros(2, 1, 3, 3).to(dtype)
    calls = {
        "conv2d": (x, w), "conv1d": (x[:, :, 0], w[:, :, 0]), "max_pool2d": (x, 2), "max_pool1d": (x[:, :, 0], 2),
    }  # fmt: skip
    for name, arguments in calls.items():
        ours, theirs = TWINS[name]
        found, expected = outcome(ours, arguments, {}), outcome(theirs, arguments, {})
        assert isinstance(found, REFUSALS)
        if isinstance(expected, Exception):
            assert type(found) is type(expected)
        else:
            assert isinstance(found, TypeError)
            assert str(dtype) in str(found)


@pytest.mark.parametrize("name", TWINS)
def test_other_kinds_of_tensors_are_refused_or_work(name: str) -> None:
    dims = int(name[-2])
    x = torch.randn(1, 2, *(6, 6)[:dims])
    rest = (torch.randn(2, 2, *(3, 3)[:dims]),) if "conv" in name else (2,)
    ours, _ = TWINS[name]
    expected = ours(x, *rest)
    kinds = {
        "sparse": x.to_sparse(),
        "mkldnn": x.to_mkldnn() if torch.backends.mkldnn.is_available() else x,
        "negative": torch.view_as_complex(torch.stack((x, -x), -1)).conj().imag,
        "parameter": torch.nn.Parameter(x),
        "zero": torch._efficientzerotensor(x.shape),
        "quantized": torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "meta": x.to("meta"),
    }
    for kind, tensor in kinds.items():
        found = outcome(ours, (tensor, *rest), {})
        if isinstance(found, Exception):
            assert isinstance(found, REFUSALS), f"{kind}: {found!r}"
            if str(found).startswith("pyseqnet"):  # the rest is torch's own refusal, in its own words
                check_text(found)
        elif kind in ("negative", "parameter"):
            torch.testing.assert_close(found, expected, msg=kind)
        else:
            assert found.shape == expected.shape


def test_devices_must_agree() -> None:
    """A meta tensor has no data: what it meets must not be computed from whatever lies in memory."""
    x, w, b = torch.zeros(1, 1, 4, 4), torch.zeros(2, 1, 3, 3), torch.zeros(2)
    for arguments in ((x.to("meta"), w), (x, w.to("meta")), (x, w, b.to("meta"))):
        with pytest.raises(REFUSALS):
            F.conv2d(*arguments)
    y, arg = ops.max_pool_forward(x, 2, 2, 2, 2, 0, 0, 1, 1, False, True)
    for arguments in ((y.to("meta"), arg), (y, arg.to("meta"))):
        with pytest.raises(REFUSALS):
            ops.max_pool_backward(*arguments, 4, 4, 2, 2, 2, 2, 0, 0, 1, 1, False)


@pytest.mark.cuda
@needs_cuda
def test_cpu_and_cuda_do_not_mix() -> None:
    x, w = torch.zeros(1, 1, 4, 4), torch.zeros(2, 1, 3, 3)
    for arguments in ((x.cuda(), w), (x, w.cuda()), (x.cuda(), w.cuda(), torch.zeros(2))):
        with pytest.raises((RuntimeError, ValueError)):
            F.conv2d(*arguments)
    y, arg = ops.max_pool_forward(x.cuda(), 2, 2, 2, 2, 0, 0, 1, 1, False, True)
    for arguments in ((y.cpu(), arg), (y, arg.cpu())):
        with pytest.raises((RuntimeError, ValueError)):
            ops.max_pool_backward(*arguments, 4, 4, 2, 2, 2, 2, 0, 0, 1, 1, False)


def test_refusals_inside_autograd_are_the_same() -> None:
    x, w = torch.zeros(1, 3, 4, 4, requires_grad=True), torch.zeros(2, 1, 3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="expected input"):
        F.conv2d(x, w)
    with pytest.raises(RuntimeError, match="pad should be"):
        F.max_pool2d(x, 2, padding=2)


# --- hostile arguments of raw operations, in processes of their own ----------------------------------------------

PREAMBLE = """
import itertools, re, torch, pyseqnet
ops = torch.ops.pyseqnet
REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, OverflowError, MemoryError,
            AttributeError)  # of a shape function that got None
count = accepted = 0
def attempt(operation, *arguments):
    global count, accepted
    count += 1
    try:
        operation(*arguments)
        accepted += 1
    except REFUSALS as error:
        text = str(error)  # torch's own refusals list where every kernel was registered
        assert not re.search(r"csrc/|kernels/|API call failed", text) or "[kernel]" in text, text
"""
EPILOGUE = "\nassert count > 20, count\nprint('survived', count)\n"


def survives(code: str) -> None:
    result = run_python(PREAMBLE + code + EPILOGUE)
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stderr[-3000:]}"
    assert "survived" in result.stdout


def test_huge_and_negative_geometry_of_convolution() -> None:
    survives("""
x, w = torch.ones(1, 2, 5, 6), torch.ones(4, 1, 3, 2)
gy = torch.ones(1, 4, 3, 5)
plain = (1, 1, 0, 0, 0, 0, 1, 1, 2)
values = (-2**63, -2**40, -1, 0, 2**20, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
for position, value in itertools.product(range(9), values):
    if position in (2, 3, 4, 5) and value == 2**20:
        continue  # a legal padding, and 4 TB of it on two sides
    geometry = (*plain[:position], value, *plain[position + 1:])
    attempt(ops.conv_forward, x, w, None, *geometry)
    attempt(ops.conv_backward, gy, x, w, *geometry, True, True, True)
for a, b in itertools.product((2**31, 2**40, 2**62, 2**63 - 1), repeat=2):
    # padding that a stride or a dilation of the same size meets
    attempt(ops.conv_forward, x, w, None, a, a, b, b, b, b, 1, 1, 2)
    attempt(ops.conv_forward, x, w, None, 1, 1, a, 0, a, 0, b, 1, 2)
    attempt(ops.conv_forward, x, w, None, a, a, b, b, b, b, b, b, 2)
    attempt(ops.conv_forward, x, w, None, 1, 1, 0, 0, 0, 0, a, b, 2)
""")


def test_huge_and_negative_geometry_of_pooling() -> None:
    survives("""
x = torch.ones(1, 2, 5, 6)
y, arg = ops.max_pool_forward(x, 2, 2, 1, 1, 0, 0, 1, 1, False, True)
plain = (2, 2, 1, 1, 0, 0, 1, 1)
values = (-2**63, -2**40, -1, 0, 2**20, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
for position, value, ceil_mode in itertools.product(range(8), values, (False, True)):
    geometry = (*plain[:position], value, *plain[position + 1:], ceil_mode)
    attempt(ops.max_pool_forward, x, *geometry, True)
    attempt(ops.max_pool_backward, y, arg, 5, 6, *geometry)
    attempt(ops.max_pool_indices, arg, 5, 6, *geometry)
large = (2**20, 2**31, 2**40, 2**61, 2**62, 2**63 - 1)
for a, b, ceil_mode in itertools.product(large[1:], large, (False, True)):
    for geometry in ((a, a, b, b, a // 2, a // 2, 1, 1), (2, 2, a, a, 1, 1, b, b), (3, 3, a, a, 1, 1, 1, 1),
                     (a, b, 1, 1, a // 2, b // 2, 1, 1), (a, 1, b, 1, a // 2, 0, 1, 1)):
        attempt(ops.max_pool_forward, x, *geometry, ceil_mode, True)
        attempt(ops.max_pool_backward, y, arg, 5, 6, *geometry, ceil_mode)
for height, width in itertools.product((-2**63, -1, 0, 1, 2**31, 2**62, 2**63 - 1), repeat=2):
    attempt(ops.max_pool_backward, y, arg, height, width, *plain, False)
    attempt(ops.max_pool_indices, arg, height, width, *plain, False)
""")


def test_tensors_that_claim_to_be_huge() -> None:
    """Expanded scalars: as large as one likes, in four bytes."""
    survives("""
one = torch.ones(1)
sizes = (2**31, 2**40, 2**59)
for n in sizes:
    for shape in ((n, 1, 3, 3), (1, n, 3, 3), (1, 1, n, 3), (1, 1, 3, n)):
        attempt(ops.max_pool_forward, one.expand(shape), 2, 2, 2, 2, 0, 0, 1, 1, False, True)
        attempt(ops.max_pool_forward, one.expand(shape), 2, 2, n, n, 0, 0, 1, 1, False, True)
        attempt(ops.conv_forward, one.expand(shape), torch.ones(1, 1, 2, 2), None, 1, 1, 0, 0, 0, 0, 1, 1, 1)
        attempt(ops.conv_forward, one.expand(shape), torch.ones(1, 1, 2, 2), None, n, n, 0, 0, 0, 0, 1, 1, 1)
        attempt(ops.conv_forward, torch.ones(1, 1, 3, 3), one.expand(shape), None, 1, 1, 0, 0, 0, 0, 1, 1, 1)
        attempt(ops.conv_backward, one.expand(shape), torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2),
                1, 1, 0, 0, 0, 0, 1, 1, 1, True, True, True)
        attempt(ops.max_pool_indices, torch.zeros(1, dtype=torch.uint8).expand(shape), 4, 4,
                2, 2, 2, 2, 0, 0, 1, 1, False)
""")


@pytest.mark.parametrize("kernel", [*_C.dispatch_tables()["max_pool_backward"]["cpu"]])
def test_a_forged_argmax_cannot_write_outside(kernel: str) -> None:
    """Taps that the window does not have, or that lie in the padding or beyond the image."""
    survives(f"""
import os
os.environ["PYSEQNET_FORCE"] = "max_pool_backward:{kernel},max_pool_indices:{kernel}"
cases = (
    ((64, 64), (2, 2, 2, 2, 0, 0, 1, 1, False)), ((64, 64), (3, 3, 2, 2, 1, 1, 1, 1, False)),
    ((31, 33), (5, 5, 3, 3, 2, 2, 1, 1, True)), ((40, 40), (20, 20, 1, 1, 10, 10, 1, 1, False)),
    ((31, 33), (4, 2, 3, 1, 2, 1, 2, 3, True)),
)
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for last in (False, True):
        for size, geometry in cases:
            x = torch.ones(2, 18, *size, dtype=dtype)
            if last:
                x = x.contiguous(memory_format=torch.channels_last)
            y, arg = ops.max_pool_forward(x, *geometry, True)
            values = (0, 3, 9, 255) if arg.dtype == torch.uint8 else (0, -1, 2**31 - 1, -2**31, 399, 400, 2**20)
            for value in values:
                forged = torch.full_like(arg, value)
                attempt(ops.max_pool_backward, y, forged, *size, *geometry)
                attempt(ops.max_pool_indices, forged, *size, *geometry)
""")


def test_wrong_kinds_of_arguments_to_raw_operations() -> None:
    survives("""
x, w = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3)
plain = (1, 1, 0, 0, 0, 0, 1, 1, 1)
odd = (None, 1, 1.5, "x", [1], torch.tensor(1.0), torch.ones(0), torch.ones(2), torch.ones(1, 1, 4),
       torch.ones(1, 1, 4, 4, dtype=torch.int32), torch.ones(1, 1, 4, 4, dtype=torch.complex64),
       torch.ones(1, 1, 4, 4, device="meta"), torch.ones(1, 1, 4, 4).to_sparse(), torch.ones(1, 1, 1, 4, 4),
       torch.ones(0, 0, 0, 0), torch.ones(1, 1, 4, 4, dtype=torch.bfloat16))
for a, b in itertools.product((x, *odd), (w, *odd)):
    attempt(ops.conv_forward, a, b, None, *plain)
    attempt(ops.conv_forward, x, b, a, *plain)
    attempt(ops.conv_backward, a, x, b, *plain, True, True, True)
    attempt(ops.conv_backward, a, b, w, *plain, True, True, True)
pool = (2, 2, 2, 2, 0, 0, 1, 1, False)
for a, b in itertools.product(odd, odd):
    attempt(ops.max_pool_forward, a, *pool, True)
    attempt(ops.max_pool_backward, a, b, 4, 4, *pool)
    attempt(ops.max_pool_indices, b, 4, 4, *pool)
    attempt(ops.max_pool_backward, a, torch.zeros(1, 1, 2, 2, dtype=torch.uint8), 4, 4, *pool)
for number in range(9):
    for value in odd[:9]:
        attempt(ops.conv_forward, x, w, None, *plain[:number], value, *plain[number + 1:])
        attempt(ops.max_pool_forward, x, *pool[:number], value, *pool[number + 1:], True)
attempt(ops.conv_forward)
attempt(ops.conv_forward, x)
""")


def test_huge_arguments_of_public_functions() -> None:
    """A step that is never taken may be as large as it likes; the rest is refused, not tried."""
    x, w = torch.ones(1, 1, 5, 6), torch.ones(1, 1, 3, 2)
    for value in HUGE:
        assert F.conv2d(x, w, stride=value).tolist() == [[[[6]]]]
        assert F.max_pool2d(x, 2, stride=value).tolist() == [[[[1]]]]
        assert F.max_pool2d(x, 2, stride=value, ceil_mode=True).tolist() == [[[[1]]]]
        assert torch.equal(F.conv2d(x, w[..., :1, :1], dilation=value), x)
        for options in ({"padding": value}, {"dilation": value}, {"groups": value}):
            with pytest.raises(REFUSALS):
                F.conv2d(x, w, **options)
        for options in ({"kernel_size": value}, {"kernel_size": 2, "dilation": value}):
            with pytest.raises(REFUSALS):
                F.max_pool2d(x, **options)
    for value in (2**63, -(2**63) - 1, 10**30):
        for options in ({"stride": value}, {"padding": value}, {"dilation": value}, {"groups": value}):
            with pytest.raises(REFUSALS):
                F.conv2d(x, w, **options)
        with pytest.raises(REFUSALS):
            F.max_pool2d(x, value)


def test_running_out_of_memory_is_an_error_in_words() -> None:
    result = run_python(
        "import resource, torch, pyseqnet.functional as F\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "try:\n"
        "    F.conv2d(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 3), padding=1 << 16)\n"
        "except (RuntimeError, MemoryError) as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    assert result.returncode == 0, result.stderr
    assert "memory" in result.stdout
    assert "csrc" not in result.stdout
