"""What every family's functions share: reading arguments, the guard around autograd, errors in torch's words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def per_dimension(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """An int or a sequence of one or ``dims`` ints, as ``dims`` ints; ValueError for anything else."""
    if isinstance(value, int):
        return (value,) * dims
    values = tuple(value)
    if len(values) == 1:
        return values * dims
    if len(values) != dims:
        raise ValueError(f"expected one or {dims} integers, got {values}")
    return values


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether a call must be recorded: some input wants a gradient, or forward-mode AD is at work.

    Calling the raw operation directly otherwise saves about 4 us; with forward-mode AD it would drop the tangents,
    while the autograd.Function raises.
    """
    if forward_ad._current_level >= 0:  # type: ignore[attr-defined]
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def creates_graph() -> bool:
    """In a backward: whether it must itself be differentiable (create_graph). Compilers trace without it."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def autocast_cast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The arguments in autocast's dtype where autocast is on and would cast them (torch's policy for convolutions)."""
    first = tensors[0]
    assert first is not None
    device = first.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


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
    if isinstance(error, NotImplementedError):
        devices = sorted({str(t.device) for t in tensors if isinstance(t, Tensor)})
        raise NotImplementedError(
            f"pyseqnet {name}: no kernels for {', '.join(devices)} in this build; see pyseqnet.build_info()"
        ) from error
    raise error
