"""Torch's own module test database on recurrent layers and cells; tests/module_database.py does it for other layers.

Not a test file: test_recurrent_module_database.py runs it, alone. Our classes take the places of torch's before the
database is imported. Inputs and results are nested here (states, packed sequences), which is why these classes have a
file of their own. At the end every output is multiplied by PLANTED_FAULT and the checks of values must notice.

    python tests/recurrent/recurrent_module_database.py [--device cuda]
"""

from __future__ import annotations

import argparse
import copy
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

import pyseqnet.nn

torch.set_num_threads(1)
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # the database freezes these flags
warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")

PLANTED_FAULT = 1.001
LARGEST_INPUT = 9.0  # the database's values: terms of this size cancel in a sum
MOST_PARAMETERS = 8  # of a layer whose Jacobian is computed entry by entry
MOST_GRADCHECKS = 5  # of an entry's inputs
MOST_OTHERS = 20  # in the checks that do not compare with torch: RNN has 64 inputs
NAMES = ("GRU", "GRUCell", "LSTM", "LSTMCell", "RNN", "RNNCell")
TWINS = {getattr(pyseqnet.nn, name): getattr(torch.nn, name) for name in NAMES}
for _name in NAMES:
    setattr(torch.nn, _name, getattr(pyseqnet.nn, _name))
    setattr(torch.nn.modules, _name, getattr(pyseqnet.nn, _name))

from torch.nn.utils.rnn import PackedSequence  # noqa: E402
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db  # noqa: E402
from torch.testing._internal.common_utils import freeze_rng_state  # noqa: E402

ENTRIES = [info for info in module_db if info.module_cls in TWINS]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Tensor = torch.Tensor


class Faulty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        return x * factor

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def tensors(value: object) -> list[Tensor]:
    """The floating-point tensors of nested arguments or results."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    return [t for part in value for t in tensors(part)] if isinstance(value, (tuple, list)) else []


def rebuilt(value: object, change: Callable[[Tensor], Tensor]) -> object:
    """The same nesting with every floating-point tensor changed."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, PackedSequence):
        return PackedSequence(change(value.data), *value[1:])
    return type(value)(rebuilt(part, change) for part in value) if isinstance(value, (tuple, list)) else value


def plant(fault: float) -> None:
    for cls in TWINS:
        honest = cls.forward

        def forward(self, *arguments, _honest: Callable = honest, **options):
            return rebuilt(_honest(self, *arguments, **options), lambda t: Faulty.apply(t, fault))

        cls.forward = forward


def build(info, module_input, device: str, dtype: torch.dtype, cls: type | None = None) -> torch.nn.Module:
    with freeze_rng_state():
        torch.manual_seed(0)
        arguments = module_input.constructor_input
        module = (cls or info.module_cls)(*arguments.args, **arguments.kwargs)
    return module.to(device).to(dtype)


def inputs_of(info, device: str, dtype: torch.dtype, requires_grad: bool = False) -> Iterator:
    torch.manual_seed(1)
    options = {"with_packed_sequence": True} if info.name in ("nn.RNN", "nn.GRU") else {}
    found = info.module_inputs_func(
        info, device=device, dtype=dtype, requires_grad=requires_grad, training=True, **options
    )
    for module_input in found:
        if module_input.forward_input is not None:
            yield module_input


def some(module_inputs: Iterator, most: int) -> list:
    """About `most`, in odd steps: torch's lists are products of pairs of options, so every option is still met."""
    found = list(module_inputs)
    step = -(-len(found) // most)
    return found[:: step + (step + 1) % 2]


def call(module: torch.nn.Module, module_input):
    return module(*module_input.forward_input.args, **module_input.forward_input.kwargs)


def check_forward(info, device: str, dtype: torch.dtype) -> None:
    """The reference function of the entry, and torch's twin, in training and in evaluation."""
    for module_input in inputs_of(info, device, dtype):
        arguments = module_input.forward_input
        module = build(info, module_input, device, dtype)
        twin = build(info, module_input, device, dtype, TWINS[info.module_cls])
        packed = any(isinstance(a, PackedSequence) for a in arguments.args)
        for training in (True, False):
            result = call(module.train(training), module_input)
            if not packed and dtype in (torch.float32, torch.float64):
                expected = module_input.reference_fn(module, *arguments.args, **arguments.kwargs)
                torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
            expected = tensors(call(twin.train(training), module_input))
            widened = rebuilt(arguments.args, Tensor.double)
            exact = tensors(copy.deepcopy(twin).double()(*widened))
            assert_as_good(tensors(result), expected, exact, 2)


def assert_as_good(found: list[Tensor], torchs: list[Tensor], exact: list[Tensor], factor: float) -> None:
    """The error is at most `factor` times torch's in the same dtype, plus a few ulp."""
    for a, b, c in zip(found, torchs, exact, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        error, allowed = ((t.double() - c).abs().max().item() for t in (a, b))
        few = 8 * torch.finfo(a.dtype).eps * max(LARGEST_INPUT, c.abs().max().item())
        assert error <= factor * allowed + few, f"{error} > {factor} * {allowed} + {few}"


def gradients(module: torch.nn.Module, module_input, inputs: list[Tensor]) -> list[Tensor]:
    return gradients_of(tensors(call(module, module_input)), module, inputs)


def gradients_of(results: list[Tensor], module: torch.nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    ramps = [torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype) for y in results]
    return list(torch.autograd.grad(results, [*inputs, *module.parameters()], ramps))


def check_gradients(info, device: str, dtype: torch.dtype) -> None:
    """Of inputs, states and parameters, beside torch's twin."""
    for module_input in some(inputs_of(info, device, dtype, requires_grad=True), 2 * MOST_OTHERS):
        inputs = tensors(module_input.forward_input.args)
        ours = gradients(build(info, module_input, device, dtype), module_input, inputs)
        twin = build(info, module_input, device, dtype, TWINS[info.module_cls])
        widened = rebuilt(module_input.forward_input.args, lambda t: t.detach().double().requires_grad_())
        wide = copy.deepcopy(twin).double()
        exact = gradients_of(tensors(wide(*widened)), wide, tensors(widened))
        assert_as_good(ours, gradients(twin, module_input, inputs), exact, 3)


def check_gradcheck(info, device: str, dtype: torch.dtype, order: int = 1) -> None:
    if dtype != torch.float64:
        return
    check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    # a planted fault is smaller than the usual tolerance; torch's matrix product varies on a GPU
    options = {"rtol": 1e-4} if order == 1 else {"nondet_tol": 1e-12 if device == "cuda" else 0.0}
    for module_input in some(inputs_of(info, device, dtype, requires_grad=True), MOST_GRADCHECKS):
        module = build(info, module_input, device, dtype)
        names = [name for name, _ in module.named_parameters()]
        inputs = tensors(module_input.forward_input.args)

        def function(*values: Tensor, module=module, names=names, module_input=module_input):
            count = len(values) - len(names)
            given = iter(values[:count])
            arguments = rebuilt(module_input.forward_input.args, lambda _: next(given))
            parameters = dict(zip(names, values[count:], strict=True))
            return tuple(tensors(torch.func.functional_call(module, parameters, arguments)))

        fast = order == 2 or len(names) > MOST_PARAMETERS  # a random projection, not each entry of the Jacobian
        assert check(function, (*inputs, *module.parameters()), fast_mode=fast, **options)


def check_gradgradcheck(info, device: str, dtype: torch.dtype) -> None:
    check_gradcheck(info, device, dtype, order=2)


def check_pickle(info, device: str, dtype: torch.dtype) -> None:
    for module_input in some(inputs_of(info, device, dtype), MOST_OTHERS):
        module = build(info, module_input, device, dtype)
        expected = tensors(call(module, module_input))
        for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
            torch.testing.assert_close(tensors(call(other, module_input)), expected, rtol=0, atol=0)


def check_non_contiguous(info, device: str, dtype: torch.dtype) -> None:
    """Inputs, states and parameters with strides, as torch's test makes them."""
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5)

    def spread(t: Tensor) -> Tensor:
        return torch.repeat_interleave(t.detach(), 2, dim=-1)[..., ::2].detach()

    for module_input in some(inputs_of(info, device, dtype, requires_grad=True), MOST_OTHERS):
        module = build(info, module_input, device, dtype)
        given = module_input.forward_input
        expected = gradients(module, module_input, tensors(given.args))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.data = spread(parameter.data)
        given.args = rebuilt(given.args, lambda t: spread(t).requires_grad_())
        for a, b in zip(gradients(module, module_input, tensors(given.args)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def check_error_inputs(info, device: str, dtype: torch.dtype) -> None:
    if dtype != torch.float32:
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
    for module_input in some(inputs_of(info, device, dtype), MOST_OTHERS):
        arguments = module_input.constructor_input
        module = info.module_cls(*arguments.args, **{**arguments.kwargs, "dtype": dtype, "device": device})
        assert all(p.dtype == dtype and p.device.type == device for p in module.parameters())
        assert {t.dtype for t in tensors(call(module, module_input))} == {dtype}


CHECKS = (
    check_forward, check_gradients, check_gradcheck, check_gradgradcheck, check_pickle, check_non_contiguous,
    check_error_inputs, check_factory_arguments,
)  # fmt: skip


def failures_of(info, check: Callable, device: str) -> Iterator[tuple[torch.dtype, str]]:
    for dtype in DTYPES:
        try:
            check(info, device, dtype)
        except Exception:  # noqa: PERF203 - every dtype is reported
            yield dtype, traceback.format_exc(limit=-3)


def main() -> int:
    parser = argparse.ArgumentParser(description="torch's module test database on pyseqnet's recurrent layers")
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    assert {info.module_cls for info in ENTRIES} == set(TWINS), "the database lacks an entry"
    failed = 0
    for info in ENTRIES:
        for check in CHECKS:
            for dtype, text in failures_of(info, check, device):
                failed += 1
                print(f"FAILED {info.name} {check.__name__} {dtype}\n{text}")
    print(f"{len(ENTRIES) * len(CHECKS) * len(DTYPES) - failed} passed, {failed} failed")

    plant(PLANTED_FAULT)
    for info in ENTRIES:
        for check in (check_forward, check_gradcheck):
            if not list(failures_of(info, check, device)):
                failed += 1
                print(f"MISSED {info.name} {check.__name__} does not notice outputs times {PLANTED_FAULT}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
