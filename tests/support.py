"""What the tests share: pinning a kernel, views with unusual strides, and the yardstick for errors."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import pyseqnet
from pyseqnet import _C

ROOT = Path(__file__).resolve().parent.parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HAS_CUDA = torch.cuda.is_available() and bool(pyseqnet.build_info()["cuda"])
NO_CUDA = (
    "no CUDA device"
    if not torch.cuda.is_available()
    else "this build of pyseqnet holds no CUDA kernels (PYSEQNET_CUDA=0, or no nvcc when it was built)"
)
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason=NO_CUDA)
DEVICES = ("cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_cuda]))


# --- pinning ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def environment(**variables: str | None) -> Iterator[None]:
    """Sets (None: removes) environment variables; the kernels read theirs on every call."""
    before = {name: os.environ.get(name) for name in variables}

    def put(values: dict[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(variables)
    try:
        yield
    finally:
        put(before)


def forced(operation: str, kernel: str) -> contextlib.AbstractContextManager[None]:
    """Pins the kernel of one operation (or of a family)."""
    return environment(PYSEQNET_FORCE=f"{operation}:{kernel}")


@dataclass(frozen=True)
class Implementation:
    """One entry of a dispatch table."""

    operation: str
    device: str
    kernel: str

    def pinned(self) -> contextlib.AbstractContextManager[None]:
        return forced(self.operation, self.kernel)

    @property
    def is_winograd(self) -> bool:
        return "winograd" in self.kernel

    def __str__(self) -> str:
        return f"{self.operation}-{self.device}-{self.kernel}"


def implementations(family: str) -> list:
    """Every entry of the family's tables as a pytest parameter."""
    found = []
    for operation, tables in _C.dispatch_tables().items():
        # the fused block's operations begin with the name of the convolution's family as well
        if not operation.startswith(family + "_") or (family == "conv" and operation.startswith("conv_relu_pool_")):
            continue
        for device, names in tables.items():
            for name in names:
                entry = Implementation(operation, device, name)
                marks = [pytest.mark.cuda, needs_cuda] if device == "cuda" else []
                found.append(pytest.param(entry, marks=marks, id=str(entry)))
    return found


def is_refusal(error: RuntimeError) -> bool:
    """Whether a pinned kernel said that the problem is not for it."""
    return "no kernel takes" in str(error)


def is_beyond_this_machine(error: RuntimeError) -> bool:
    """Whether a pinned kernel needs another processor or GPU."""
    return any(
        reason in str(error)
        for reason in ("lacks the instruction set", "compute capability is too low", "of another generation")
    )


def free_memory(device: str) -> int:
    """Bytes that a large tensor may take."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors, outputs and workspaces alike, start as NaN (integers: their largest value)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_python(code: str, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter on `code`, with this checkout (or whatever pyseqnet is imported here) on its path."""
    home = str(Path(_C.__file__).parent.parent)
    path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, **variables}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, env=env)


# --- data -------------------------------------------------------------------------------------------------------

VIEWS = ("contiguous", "channels_last", "narrowed", "transposed", "offset", "step", "expanded")


def view_as(tensor: Tensor, kind: str) -> Tensor:
    """The same values (for "expanded": the first element of the batch, repeated) with other strides.

    What lies between the elements of a view is NaN, so that a kernel that reads beside them shows it.
    """
    if tensor.numel() == 0 and kind not in ("contiguous", "channels_last"):
        return tensor
    if kind == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor.contiguous()
    if kind == "narrowed":
        larger = tensor.new_full([size + 2 for size in tensor.shape], math.nan)
        inner = larger
        for dim, size in enumerate(tensor.shape):
            inner = inner.narrow(dim, 1, size)
        return inner.copy_(tensor)
    if kind == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "offset":  # not aligned to a vector
        flat = tensor.new_full([tensor.numel() + 1], math.nan)
        return flat[1:].view(tensor.shape).copy_(tensor)
    if kind == "step":
        wider = tensor.new_full([*tensor.shape[:-1], 2 * tensor.shape[-1]], math.nan)
        return wider[..., ::2].copy_(tensor)
    if kind == "expanded":
        return tensor[:1].expand(tensor.shape)
    return tensor.contiguous()


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


seeds = st.integers(0, 2**16)
views = st.sampled_from(VIEWS)
dtypes = st.sampled_from(DTYPES)


# --- errors -----------------------------------------------------------------------------------------------------


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def error_of(result: Tensor, exact: Tensor) -> float:
    """The largest absolute error; infinite for another shape or a NaN."""
    if result.shape != exact.shape:
        return math.inf
    error = largest(result.double().cpu() - exact.double().cpu())
    return math.inf if math.isnan(error) else error


ULPS = 4


def allowed_error(torch_result: Tensor, exact: Tensor, magnitude: Tensor, factor: float) -> float:
    """The bound of DESIGN section 5: `factor` times torch's own error in this dtype, plus a few ulp.

    The ulps are those of the result in its own dtype, and of the sum of the absolute terms (`magnitude`) in the dtype
    of the accumulation: where positive and negative terms cancel, torch is right now and then by luck.
    """
    dtype = torch_result.dtype
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    smallest = (
        torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    )  # subnormal float16 has no relative precision
    return (
        factor * error_of(torch_result, exact)
        + ULPS * torch.finfo(dtype).eps * largest(exact)
        + ULPS * torch.finfo(accumulation).eps * largest(magnitude)
        + smallest
    )


WINOGRAD_RMS, WINOGRAD_MAXIMUM = 2e-6, 5e-6  # of the largest magnitude


def winograd_bound_holds(result: Tensor, exact: Tensor, scale: float) -> bool:
    difference = result.double() - exact
    rms = difference.square().mean().sqrt().item()
    return rms <= WINOGRAD_RMS * scale and largest(difference) <= WINOGRAD_MAXIMUM * scale
