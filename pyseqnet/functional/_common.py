"""What every family's functions share: reading arguments, the guard around autograd, errors in torch's words."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def integer(value: Any) -> int:
    """What torch takes for an integer, as one: numpy's and zero-dimensional tensors too, bool and float not."""
    if isinstance(value, bool):
        raise TypeError("expected an integer, got a bool")
    if isinstance(value, (int, torch.SymInt)):
        return value  # type: ignore[return-value]
    return operator.index(value)


def per_dimension(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """An int or a sequence of one or ``dims`` ints, as ``dims`` ints; ValueError or TypeError for anything else."""
    if type(value) is int:
        return (value,) * dims
    # what layers pass; dims is 1 or 2, so the first and the last are all
    if type(value) is tuple and len(value) == dims and type(value[0]) is int and type(value[-1]) is int:
        return value
    if not isinstance(value, (tuple, list)):
        return (integer(value),) * dims
    values = tuple(integer(item) for item in value)
    if len(values) == 1:
        return values * dims
    if len(values) != dims:
        raise ValueError(f"expected one or {dims} integers, got {values}")
    return values


def needs_autograd(input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> bool:
    """Whether a call must be recorded: some input wants a gradient, or forward-mode AD is at work.

    Calling the raw operation directly otherwise saves about 4 us; with forward-mode AD it would drop the tangents,
    while the autograd.Function raises.
    """
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    )


def creates_graph() -> bool:
    """In a backward: whether it must itself be differentiable (create_graph). Compilers trace without it."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def aliases(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Views of what a backward saved, for its double backward to differentiate with respect to.

    One input may have been computed from another (a weight used twice). Asked for gradients with respect to the saved
    tensors themselves, torch would follow that path as well, which belongs to the caller's graph.
    """
    return tuple(None if tensor is None else tensor.view_as(tensor) for tensor in tensors)


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants on the input's device, None where it is off."""
    device = input.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def autocast_cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """torch's policy for convolutions and matrix products: floating-point tensors are cast, float64 is left alone."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What kernels keep sums and states in: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def same_device(name: str, *tensors: Tensor | None) -> None:
    """For shape functions: torch calls them for a meta tensor beside a real one, where no kernel may run."""
    devices = sorted({str(t.device) for t in tensors if t is not None})
    if len(devices) > 1:
        raise RuntimeError(f"{name}: expected all tensors on the same device, found {' and '.join(devices)}")


def explain(error: Exception, name: str, tensors: Sequence[Any], torch_call: Callable[[], object]) -> NoReturn:
    """Raise for arguments that were refused, in torch's words where torch refuses them as well.

    Only called after a refusal, so an accepted call pays nothing for the care taken here.
    """
    with torch.no_grad():
        torch_call()
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.dtype not in SUPPORTED_DTYPES:
            wanted = ", ".join(str(d).removeprefix("torch.") for d in SUPPORTED_DTYPES)
            raise TypeError(f"pyseqnet {name}: expected one of {wanted}; got {tensor.dtype}") from None
    if isinstance(error, NotImplementedError) and "Could not run 'pyseqnet::" in str(error):
        devices = sorted({str(t.device) for t in tensors if isinstance(t, Tensor)})
        raise NotImplementedError(
            f"pyseqnet {name}: no kernels for {', '.join(devices)} in this build; see pyseqnet.build_info()"
        ) from error
    raise error
