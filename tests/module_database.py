"""Torch's own module test database, run on our classes. Not a test file: test_module_database.py runs it, alone.

Our classes take the places of torch's before the database is imported, so every entry, input and check below is
torch's own, adapted from the loops of torch's test/test_modules.py. Since those compare a module with itself here and
there, outputs and gradients are also compared with torch's twin. At the end every output is multiplied by PLANTED_FAULT
and the checks of values must notice in every class: a test of the test.

    python tests/module_database.py [--device cuda]
"""

from __future__ import annotations

import argparse
import copy
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator

import pytest
import torch

import pyseqnet.nn

torch.set_num_threads(1)
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # the database freezes these flags

PLANTED_FAULT = 1.001
MOST_PARAMETERS = 6  # of a layer whose Jacobian is computed entry by entry
MOST_GRADCHECKS = {1: 12, 2: 6}  # of an entry's inputs, by order: the Transformer has 64
MOST_BUILDS = 16  # for pickles and the constructor's arguments
NAMES = (
    "CTCLoss", "Conv1d", "Conv2d", "LayerNorm", "MaxPool1d", "MaxPool2d", "MultiheadAttention", "Transformer",
    "TransformerDecoderLayer", "TransformerEncoder", "TransformerEncoderLayer",
)  # fmt: skip
TWINS = {getattr(pyseqnet.nn, name): getattr(torch.nn, name) for name in NAMES}
for _name in NAMES:
    setattr(torch.nn, _name, getattr(pyseqnet.nn, _name))
    setattr(torch.nn.modules, _name, getattr(pyseqnet.nn, _name))

from torch.testing._internal.common_modules import ModuleErrorEnum, module_db  # noqa: E402
from torch.testing._internal.common_utils import freeze_rng_state  # noqa: E402

ENTRIES = [info for info in module_db if info.module_cls in TWINS]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES_OF = {pyseqnet.nn.CTCLoss: DTYPES[:2]}  # torch's twin takes no others
Tensor = torch.Tensor


class Faulty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        return x * factor

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def plant(fault: float) -> None:
    for cls in TWINS:
        honest = cls.forward

        def forward(self, *arguments, _honest: Callable = honest, **options):
            y = _honest(self, *arguments, **options)
            return (Faulty.apply(y[0], fault), y[1]) if isinstance(y, tuple) else Faulty.apply(y, fault)

        cls.forward = forward


def build(info, module_input, device: str, dtype: torch.dtype, cls: type | None = None) -> torch.nn.Module:
    with freeze_rng_state():
        torch.manual_seed(0)
        arguments = module_input.constructor_input
        module = (cls or info.module_cls)(*arguments.args, **arguments.kwargs)
    return module.to(device).to(dtype)


def inputs_of(info, device: str, dtype: torch.dtype, requires_grad: bool = False) -> Iterator:
    torch.manual_seed(1)
    found = info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=requires_grad, training=True)
    for module_input in found:
        if module_input.forward_input is not None:
            yield module_input


def some(module_inputs: Iterator, most: int) -> list:
    """About `most`, in odd steps: torch's lists are products of pairs, so every option is still met."""
    found = list(module_inputs)
    step = -(-len(found) // most)
    return found[:: step + (step + 1) % 2]


def assert_close(info, found: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Values; of attention in short dtypes only that they are there. The database's heads have one or two features and
    inputs up to 9: under a softmax that sharp, a LayerNorm of four features and a ReLU, another order of rounding is
    another result. tests/nn/ compares those, over many inputs."""
    attends = "Attention" in info.name or "Transformer" in info.name
    if attends and found.dtype in (torch.bfloat16, torch.float16):
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        assert found.isfinite().all()
        return
    scale = max(1.0, expected.abs().max().item()) if attends and tolerance is not None else 1.0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance and tolerance * scale)


def differentiable(info, module_input) -> list[Tensor]:
    """Leaves for the floating-point ones of the positional arguments; of a loss the others are labels and lengths."""
    found = [x for x in module_input.forward_input.args if isinstance(x, Tensor) and x.is_floating_point()]
    return [x.detach().requires_grad_(x.requires_grad) for x in found] if info.name == "nn.CTCLoss" else found


def first(result: Tensor | tuple) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def positional(module_input, tensors: list[Tensor] | tuple[Tensor, ...]) -> list:
    """The entry's positional arguments, with `tensors` in the places of the floating-point ones."""
    rest = iter(tensors)
    return [
        next(rest) if isinstance(x, Tensor) and x.is_floating_point() else x for x in module_input.forward_input.args
    ]


def call(module: torch.nn.Module, module_input, tensors: list[Tensor] | None = None):
    arguments = module_input.forward_input
    return module(*(arguments.args if tensors is None else positional(module_input, tensors)), **arguments.kwargs)


def check_forward(info, device: str, dtype: torch.dtype) -> None:
    """The reference function of the entry, and torch's twin."""
    for module_input in inputs_of(info, device, dtype):
        module = build(info, module_input, device, dtype)
        result = call(module, module_input)
        if module_input.reference_fn is not None and dtype in (torch.float32, torch.float64):
            arguments = module_input.forward_input
            expected = module_input.reference_fn(module, *arguments.args, **arguments.kwargs)
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        twin = build(info, module_input, device, dtype, TWINS[info.module_cls])
        assert_close(info, first(result), first(call(twin, module_input)))


def check_gradients(info, device: str, dtype: torch.dtype) -> None:
    """Of inputs and parameters, beside torch's twin."""
    for module_input in inputs_of(info, device, dtype, requires_grad=True):
        tensors = differentiable(info, module_input)
        results = []
        for cls in (info.module_cls, TWINS[info.module_cls]):
            module = build(info, module_input, device, dtype, cls)
            y = first(call(module, module_input, tensors))
            gy = torch.linspace(-1, 1, y.numel(), device=device).view(y.shape).to(dtype)
            results.append(torch.autograd.grad(y, [*tensors, *module.parameters()], gy))
        tolerance = {torch.bfloat16: 4e-2, torch.float16: 1e-2}.get(dtype, 1e-4)
        for a, b in zip(*results, strict=True):
            assert_close(info, a, b, tolerance)


def check_gradcheck(info, device: str, dtype: torch.dtype, order: int = 1) -> None:
    if dtype != torch.float64:
        return
    check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    tolerance = {"rtol": 1e-4} if order == 1 else {}  # a planted fault is smaller than the usual tolerance
    for module_input in some(inputs_of(info, device, dtype, requires_grad=True), MOST_GRADCHECKS[order]):
        module = build(info, module_input, device, dtype)
        tensors = differentiable(info, module_input)
        names = [name for name, _ in module.named_parameters()]

        def function(*values: Tensor, module=module, names=names, module_input=module_input) -> Tensor:
            count = len(values) - len(names)
            parameters = dict(zip(names, values[count:], strict=True))
            options = module_input.forward_input.kwargs
            inputs = values[:count]
            if info.name == "nn.CTCLoss":  # whose gradient takes for granted that a log_softmax made its input
                inputs = tuple(x.log_softmax(-1) for x in inputs)
            arguments = tuple(positional(module_input, inputs))
            return first(torch.func.functional_call(module, parameters, arguments, options))

        # A random projection of the Jacobian instead of each of its entries.
        fast = len(names) > MOST_PARAMETERS or (order == 2 and info.name == "nn.CTCLoss")
        assert check(function, (*tensors, *module.parameters()), nondet_tol=0.0, fast_mode=fast, **tolerance)


def check_gradgradcheck(info, device: str, dtype: torch.dtype) -> None:
    check_gradcheck(info, device, dtype, order=2)


def check_pickle(info, device: str, dtype: torch.dtype) -> None:
    for module_input in some(inputs_of(info, device, dtype), MOST_BUILDS):
        module = build(info, module_input, device, dtype)
        expected = call(module, module_input)
        for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
            torch.testing.assert_close(call(other, module_input), expected, rtol=0, atol=0)


def check_non_contiguous(info, device: str, dtype: torch.dtype) -> None:
    """Inputs, parameters and arriving gradients with strides, as torch's test makes them."""
    for module_input in inputs_of(info, device, dtype, requires_grad=True):
        module = build(info, module_input, device, dtype)
        tensors = differentiable(info, module_input)
        y = first(call(module, module_input, tensors))
        gy = torch.randn_like(y)
        expected = [y.detach(), *torch.autograd.grad(y, [*tensors, *module.parameters()], gy)]

        def spread(t: Tensor) -> Tensor:
            return t if t.dim() == 0 else torch.repeat_interleave(t.detach(), 2, dim=-1)[..., ::2].detach()

        with torch.no_grad():
            for parameter in module.parameters():
                parameter.data = spread(parameter.data)
        strided = [spread(x).requires_grad_() for x in tensors]
        y = first(call(module, module_input, strided))
        found = [y.detach(), *torch.autograd.grad(y, [*strided, *module.parameters()], spread(gy))]
        tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
        for a, b in zip(found, expected, strict=True):
            assert_close(info, a, b, tolerance)


def check_memory_format(info, device: str, dtype: torch.dtype) -> None:
    """Every pairing of contiguous and channels-last input and module gives the same values, in torch's format."""
    formats = (torch.contiguous_format, torch.channels_last)
    for module_input in inputs_of(info, device, dtype):
        x = module_input.forward_input.args[0]
        if x.dim() != 4 or isinstance(build(info, module_input, device, dtype), torch.nn.LayerNorm):
            continue  # torch's LayerNorm has no channels-last form
        expected = first(call(build(info, module_input, device, dtype), module_input))
        for input_format in formats:
            for module_format in formats:
                module = build(info, module_input, device, dtype).to(memory_format=module_format)
                y = first(module(x.contiguous(memory_format=input_format)))
                torch.testing.assert_close(y, expected)
                if input_format == torch.channels_last:
                    assert y.is_contiguous(memory_format=torch.channels_last)


def check_error_inputs(info, device: str, dtype: torch.dtype) -> None:
    if info.module_error_inputs_func is None or dtype != torch.float32:
        return
    found = info.module_error_inputs_func(info, device=device, dtype=dtype, requires_grad=False, training=False)
    for error_input in found:
        module_input = error_input.module_error_input
        with pytest.raises(error_input.error_type, match=error_input.error_regex):  # noqa: PT012 - either line may
            module = build(info, module_input, device, dtype)
            if error_input.error_on == ModuleErrorEnum.FORWARD_ERROR:
                call(module, module_input)


def check_factory_arguments(info, device: str, dtype: torch.dtype) -> None:
    """dtype= and device= of the constructor."""
    for module_input in some(inputs_of(info, device, dtype), MOST_BUILDS):
        if not list(build(info, module_input, device, dtype).parameters()) or info.name == "nn.TransformerEncoder":
            return  # a stack of given layers takes neither
        arguments = module_input.constructor_input
        module = info.module_cls(*arguments.args, **{**arguments.kwargs, "dtype": dtype, "device": device})
        assert all(p.dtype == dtype and p.device.type == device for p in module.parameters())
        assert first(call(module, module_input)).dtype == dtype


CHECKS = (
    check_forward, check_gradients, check_gradcheck, check_gradgradcheck, check_pickle, check_non_contiguous,
    check_memory_format, check_error_inputs, check_factory_arguments,
)  # fmt: skip


def failures_of(info, check: Callable, device: str) -> Iterator[tuple[torch.dtype, str]]:
    for dtype in DTYPES_OF.get(info.module_cls, DTYPES):
        try:
            check(info, device, dtype)
        except Exception:  # noqa: PERF203 - every dtype is reported
            yield dtype, traceback.format_exc(limit=-3)


def main() -> int:
    parser = argparse.ArgumentParser(description="torch's module test database on pyseqnet's layers")
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    assert {info.module_cls for info in ENTRIES} == set(TWINS), "the database lacks an entry"
    failed = 0
    for info in ENTRIES:
        for check in CHECKS:
            for dtype, text in failures_of(info, check, device):
                failed += 1
                print(f"FAILED {info.name} {check.__name__} {dtype}\n{text}")
    tried = len(CHECKS) * sum(len(DTYPES_OF.get(info.module_cls, DTYPES)) for info in ENTRIES)
    print(f"{tried - failed} passed, {failed} failed")

    plant(PLANTED_FAULT)
    for info in ENTRIES:
        for check in (check_forward, check_gradcheck):
            if not list(failures_of(info, check, device)):
                failed += 1
                print(f"MISSED {info.name} {check.__name__} does not notice outputs times {PLANTED_FAULT}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
