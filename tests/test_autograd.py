"""Gradients in every way that torch asks for them, determinism, threads, autocast."""

from __future__ import annotations

import threading

import pytest
import torch
from support import DTYPES, normal, threads, view_as
from torch import Tensor
from torch.autograd import forward_ad

import pyseqnet.functional as F

ops = torch.ops.pyseqnet
CONV_GEOMETRY = (2, 1, 1, 2, 0, 2, 1, 2, 2)  # stride, padding (above, left, below, right), dilation, groups
POOL_GEOMETRY = (3, 2, 2, 1, 1, 1, 1, 1, False)  # window, stride, padding, dilation, ceil_mode


def conv_inputs(device: str, dims: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    size, taps = (5, 6)[:dims], (3, 2)[:dims]
    x, w, b = normal((2, 4, *size), 0, dtype), normal((6, 2, *taps), 1, dtype), normal((6,), 2, dtype)
    return [t.to(device).requires_grad_() for t in (x, w, b)]


FUNCTIONS = {
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, 2, 1, 2, 2), 1),
    "conv1d same": (lambda x, w, b: F.conv1d(x, w, b, padding="same", groups=2), 1),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, (2, 1), (1, 2), (1, 2), 2), 2),
    "conv2d same": (lambda x, w, b: F.conv2d(x, w, b, padding="same", groups=2), 2),
    "conv2d unbatched": (lambda x, w, b: F.conv2d(x[0], w, b, groups=2), 2),
    "max_pool1d": (lambda x, w, b: F.max_pool1d(x, 3, 2, 1), 1),
    "max_pool2d": (lambda x, w, b: F.max_pool2d(x, (3, 2), (2, 1), (1, 1)), 2),
    "max_pool2d overlapping, with indices": (lambda x, w, b: F.max_pool2d(x, 3, 1, 1, 1, True, True)[0], 2),
    "max_pool2d unbatched": (lambda x, w, b: F.max_pool2d(x[0], 2), 2),
}


def used(name: str, tensors: list[Tensor]) -> tuple:
    """(function of the inputs it really uses, those inputs)."""
    function, _ = FUNCTIONS[name]
    if name.startswith("conv"):
        return function, tensors
    return (lambda x: function(x, None, None)), tensors[:1]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(device: str, name: str) -> None:
    function, inputs = used(name, conv_inputs(device, FUNCTIONS[name][1]))
    torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradgradcheck(device: str, name: str) -> None:
    function, inputs = used(name, conv_inputs(device, FUNCTIONS[name][1]))
    # A double backward runs torch's own convolution, whose CUDA gradients vary in the last bits from run to run.
    nondeterminism = 1e-12 if device == "cuda" else 0.0
    torch.autograd.gradgradcheck(function, inputs, fast_mode=True, nondet_tol=nondeterminism)


@pytest.mark.parametrize("wanted", range(1, 8))
def test_any_subset_of_inputs_may_want_gradients(device: str, wanted: int) -> None:
    inputs = conv_inputs(device)
    for number, tensor in enumerate(inputs):
        tensor.requires_grad_(bool(wanted >> number & 1))
    twins = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    F.conv2d(*inputs, padding=1, groups=2).square().sum().backward()
    torch.conv2d(*twins, padding=1, groups=2).square().sum().backward()
    for ours, theirs in zip(inputs, twins, strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)


ARRIVALS = {
    "sum": lambda y: y.sum(),  # expanded: strides 0
    "mean of rows": lambda y: y.mean(-1).square().sum(),
    "narrowed": lambda y: y.new_zeros([s + 2 for s in y.shape])[1:-1, 1:-1, 1:-1, 1:-1].add(y).square().sum(),
    "a part": lambda y: y[:, 1:, ::2].square().sum(),
    "transposed": lambda y: (y.transpose(2, 3).contiguous() ** 2 * torch.arange(y.shape[2], device=y.device)).sum(),
    "permuted": lambda y: (y.permute(3, 1, 0, 2).contiguous() ** 3).sum(),
    "channels last": lambda y: (y.contiguous(memory_format=torch.channels_last) ** 2).sum(),
    "unused": lambda y: y.detach().sum() + 0 * y[0, 0, 0, 0],
}


@pytest.mark.parametrize("arrival", ARRIVALS)
@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "expanded"])
def test_gradients_arrive_with_any_strides(device: str, arrival: str, kind: str) -> None:
    def gradients(convolution, pool) -> list[Tensor]:
        x, w, b = conv_inputs(device)
        y = pool(convolution(view_as(x, kind), w, b, padding=1, groups=2), 2, 1)
        return torch.autograd.grad(ARRIVALS[arrival](y), (x, w, b))

    ours = gradients(F.conv2d, F.max_pool2d)
    theirs = gradients(torch.conv2d, torch.nn.functional.max_pool2d)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "narrowed", "transposed", "expanded"])
def test_backward_operations_take_gradients_with_any_strides(device: str, kind: str) -> None:
    x, w, _ = (t.detach() for t in conv_inputs(device))
    y = ops.conv_forward(x, w, None, *CONV_GEOMETRY)
    gy = view_as(normal(tuple(y.shape), 5).to(device), kind)
    plain = ops.conv_backward(gy.contiguous(), x, w, *CONV_GEOMETRY, True, True, True)
    for a, b in zip(ops.conv_backward(gy, x, w, *CONV_GEOMETRY, True, True, True), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def opcheck_cases(device: str):
    x, w, b = (t.detach() for t in conv_inputs(device, dtype=torch.float32))
    line, taps = x[:, :, 0].contiguous(), w[:, :, :, 0].contiguous()
    for kind in ("contiguous", "channels_last", "expanded", "transposed"):
        image = view_as(x, kind)
        yield ops.conv_forward, (image, view_as(w, kind) if kind != "expanded" else w, b, *CONV_GEOMETRY)
        y = ops.conv_forward(image, w, None, *CONV_GEOMETRY)
        gy = y.new_ones(()).expand(y.shape) if kind == "expanded" else view_as(y, kind)
        yield ops.conv_backward, (gy, image, w, *CONV_GEOMETRY, True, True, True)
        yield ops.max_pool_forward, (image, *POOL_GEOMETRY, True)
        y, arg = ops.max_pool_forward(image, *POOL_GEOMETRY, True)
        gy = y.new_ones(()).expand(y.shape) if kind == "expanded" else view_as(y, kind)
        yield ops.max_pool_backward, (gy, arg, 5, 6, *POOL_GEOMETRY)
        yield ops.max_pool_indices, (arg, 5, 6, *POOL_GEOMETRY)
    yield ops.conv_forward, (line, taps, None, 1, 2, 0, 1, 0, 1, 1, 1, 2)
    yield ops.conv_backward, (
        ops.conv_forward(line, taps, None, 1, 1, 0, 1, 0, 1, 1, 1, 2), line, taps, 1, 1, 0, 1, 0, 1, 1, 1, 2,
        True, False, True,
    )  # fmt: skip
    for with_arg in (True, False):
        yield ops.max_pool_forward, (line, 1, 3, 1, 2, 0, 1, 1, 1, True, with_arg)
    y, arg = ops.max_pool_forward(line, 1, 3, 1, 2, 0, 1, 1, 1, True, True)
    yield ops.max_pool_backward, (y, arg, 1, 6, 1, 3, 1, 2, 0, 1, 1, 1, True)
    large = normal((1, 1, 20, 20), 0, torch.float32).to(device)
    yield ops.max_pool_forward, (large, 17, 17, 1, 1, 0, 0, 1, 1, False, True)


def test_opcheck(device: str) -> None:
    for operation, arguments in opcheck_cases(device):
        torch.library.opcheck(operation.default, arguments)


def test_gradients_accumulate(device: str) -> None:
    x, w, b = conv_inputs(device)
    for _ in range(2):
        F.max_pool2d(F.conv2d(x, w, b, groups=2), 2).sum().backward()
    once = torch.autograd.grad(F.max_pool2d(F.conv2d(x, w, b, groups=2), 2).sum(), (x, w, b))
    for tensor, gradient in zip((x, w, b), once, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * gradient)


def test_gradient_penalty(device: str) -> None:
    """The norm of a gradient, differentiated: create_graph through convolution and pooling."""

    def penalty(convolution, pool) -> list[Tensor]:
        x, w, b = conv_inputs(device)
        loss = pool(convolution(x, w, b, padding=1, groups=2).tanh(), 2).square().sum()
        (gx,) = torch.autograd.grad(loss, x, create_graph=True)
        return list(torch.autograd.grad((gx.norm() - 1) ** 2, (x, w, b)))

    ours, theirs = penalty(F.conv2d, F.max_pool2d), penalty(torch.conv2d, torch.nn.functional.max_pool2d)
    for a, b in zip(ours, theirs, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_third_derivative(device: str) -> None:
    def third(convolution) -> Tensor:
        x, w, b = conv_inputs(device)
        y = convolution(x, w, b, groups=2).pow(4).sum()
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        (g,) = torch.autograd.grad(g.square().sum(), w, create_graph=True)
        return torch.autograd.grad(g.sum(), x)[0]

    torch.testing.assert_close(third(F.conv2d), third(torch.conv2d), rtol=1e-8, atol=1e-8)


def test_saved_tensors_notice_changes_in_place(device: str) -> None:
    x, w, b = conv_inputs(device)
    y = F.conv2d(x * 1, w, b, groups=2)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_twice_needs_the_graph_kept(device: str) -> None:
    y = F.max_pool2d(conv_inputs(device)[0], 2).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_views_made_under_no_grad_and_inference_mode(device: str) -> None:
    x, w, b = conv_inputs(device)
    expected = F.max_pool2d(F.conv2d(x, w, b, groups=2), 2).detach()
    with torch.no_grad():
        y = F.max_pool2d(F.conv2d(x, w, b, groups=2), 2)
        assert not y.requires_grad
        assert torch.equal(y, expected)
    with torch.inference_mode():
        y = F.max_pool2d(F.conv2d(x, w, b, groups=2), 2)
        assert y.is_inference()
        assert torch.equal(y, expected)


@pytest.mark.parametrize("name", ["conv2d", "max_pool2d"])
def test_forward_mode_is_refused_in_words(device: str, name: str) -> None:
    function, inputs = used(name, [t.detach() for t in conv_inputs(device)])
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, torch.ones_like(t)) for t in inputs]
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
            function(*duals)


@pytest.mark.parametrize("name", ["conv2d", "max_pool2d"])
def test_functional_grad_works_or_is_refused_in_words(device: str, name: str) -> None:
    function, inputs = used(name, [t.detach() for t in conv_inputs(device)])
    try:
        found = torch.func.grad(lambda x: function(x, *inputs[1:]).sum())(inputs[0])
    except RuntimeError as error:
        assert "functorch" in str(error) or "setup_context" in str(error)  # noqa: PT017
        return
    x = inputs[0].clone().requires_grad_()
    assert torch.equal(found, torch.autograd.grad(function(x, *inputs[1:]).sum(), x)[0])


@pytest.mark.parametrize("name", ["conv2d", "max_pool2d"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_works_or_is_refused_in_words(device: str, name: str) -> None:
    function, inputs = used(name, [t.detach() for t in conv_inputs(device)])
    stack = torch.stack([inputs[0], 2 * inputs[0]])
    try:
        found = torch.func.vmap(lambda x: function(x, *inputs[1:]))(stack)
    except RuntimeError as error:
        assert "vmap" in str(error) or "functorch" in str(error)  # noqa: PT017
        return
    torch.testing.assert_close(found, torch.stack([function(x, *inputs[1:]) for x in stack]))


# --- determinism ------------------------------------------------------------------------------------------------

DETERMINISTIC = {
    "conv2d": lambda x: F.conv2d(x, normal((40, 24, 3, 3), 1, x.dtype).to(x).requires_grad_(), padding=1),
    "conv2d large kernel": lambda x: F.conv2d(x, normal((8, 24, 5, 4), 1, x.dtype).to(x).requires_grad_(), stride=2),
    "depthwise": lambda x: F.conv2d(x, normal((24, 1, 3, 3), 1, x.dtype).to(x).requires_grad_(), padding=1, groups=24),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool2d scatter": lambda x: F.max_pool2d(x, 5, 1, 2),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_bitwise_equal_for_any_number_of_threads_and_run_to_run(device: str, name: str, dtype: torch.dtype) -> None:
    for kind in ("contiguous", "channels_last"):
        image = view_as(normal((3, 24, 21, 23), 0, dtype).to(device), kind)
        results = []
        for count in (1, 2, 3, 2, 1):
            with threads(count):
                x = image.clone().requires_grad_()
                y = DETERMINISTIC[name](x)
                y.backward(normal(tuple(y.shape), 3, dtype).to(y))
                results.append((y.detach(), x.grad))
        for y, gx in results[1:]:
            assert torch.equal(y, results[0][0])
            assert torch.equal(gx, results[0][1])


def test_several_python_threads_at_once(device: str) -> None:
    """Every call owns its workspace; torch's thread pool is shared."""
    x, w, b = (t.detach() for t in conv_inputs(device, dtype=torch.float32))
    images = [x + i for i in range(4)]

    def work(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        y = F.max_pool2d(F.conv2d(x, w, b, padding=1, groups=2), 2)
        y.square().sum().backward()
        return y.detach(), x.grad

    expected = [work(image) for image in images]
    faults: list[str] = []

    def repeat(number: int) -> None:
        for _ in range(50):
            y, gx = work(images[number])
            if not (torch.equal(y, expected[number][0]) and torch.equal(gx, expected[number][1])):
                faults.append(f"thread {number} got another result")

    with threads(2):
        workers = [threading.Thread(target=repeat, args=(number,)) for number in range(len(images))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not faults


# --- autocast ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_follows_torch(device: str, dtype: torch.dtype, low: torch.dtype) -> None:
    x, w, b = conv_inputs(device, dtype=dtype)
    with torch.autocast(device, dtype=low):
        ours, theirs = F.conv2d(x, w, b, groups=2), torch.conv2d(x, w, b, groups=2)
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
        assert F.max_pool2d(x, 2).dtype == torch.nn.functional.max_pool2d(x, 2).dtype
        ours.sum().backward()
    assert [t.grad.dtype for t in (x, w, b)] == [dtype] * 3


def test_autocast_brings_mixed_dtypes_together(device: str) -> None:
    x, w, b = conv_inputs(device, dtype=torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = F.conv2d(x.bfloat16(), w, b, groups=2)
        assert y.dtype == torch.bfloat16
    with torch.autocast(device, enabled=False):
        assert F.conv2d(x, w, b, groups=2).dtype == torch.float32


# --- inputs that depend on each other -----------------------------------------------------------------------------


def square(*shape: int) -> Tensor:
    return normal(shape, seed=7).requires_grad_()


TARGETS, TAGS = torch.tensor([[1, 2]]), torch.tensor([[0, 2, 1]])
SHARED = {  # each uses one tensor in two places, the second of which depends on the first
    "conv2d": (lambda F, w: F.conv2d(F.conv2d(w, w, padding=1), w, padding=1), (3, 3, 3, 3)),
    "conv2d_relu": (lambda F, w: F.conv2d_relu(F.conv2d_relu(w, w, padding=1), w, padding=1), (3, 3, 3, 3)),
    "scaled_dot_product_attention": (
        lambda F, x: F.scaled_dot_product_attention(F.scaled_dot_product_attention(x, x, x), x, x), (1, 2, 4, 3),
    ),
    "additive_attention": (
        lambda F, x: F.additive_attention(F.additive_attention(x, x, x, x[0, 0]), x, x, x[0, 0]), (1, 4, 3),
    ),
    "linear_attention": (lambda F, x: F.linear_attention(F.linear_attention(x, x, x), x, x), (1, 2, 4, 3)),
    "ctc_loss": (
        lambda F, x: F.ctc_loss(x * F.ctc_loss(x, TARGETS, [4], [2]), TARGETS, [4], [2], from_logits=True), (4, 1, 3),
    ),
    "crf_log_likelihood": (
        lambda F, x: F.crf_log_likelihood(x[None], TAGS, None, x[0], x[1] * F.crf_log_likelihood(
            x[None], TAGS, None, x[0], x[1], x), x), (3, 3),
    ),
    "lstm": (
        lambda F, w: F.lstm(F.lstm(w[None], None, [w.repeat(2, 1), w.repeat(2, 1)])[0], None, [w.repeat(2, 1)] * 2)[0],
        (6, 3),
    ),
}  # fmt: skip


class Plain:
    """The same functions in plain torch."""

    conv2d_relu = staticmethod(lambda x, w, padding: torch.relu(torch.nn.functional.conv2d(x, w, padding=padding)))

    def __getattr__(self, name: str) -> object:
        return getattr(F, f"{name}_reference")


@pytest.mark.parametrize("name", SHARED)
def test_double_backward_where_one_input_depends_on_another(name: str) -> None:
    function, shape = SHARED[name]
    found = []
    for where in (F, Plain()):
        w = square(*shape)
        (first,) = torch.autograd.grad(function(where, w).square().sum(), w, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), w)
        found += [first.detach(), second]
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[3])
