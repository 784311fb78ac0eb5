"""What a benchmark case is.

A case is one operation on one set of shapes. It knows how to make its inputs, who computes it (ours, torch,
and what a user would pick), what it costs by formula (operations, bytes) and how far a result may be off.
Families list theirs in `bench/cases/<family>.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Function = Callable[..., Tensor]

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
MODES = ("fwd", "fwdbwd")


@dataclass(frozen=True)
class Cost:
    """What one pass must do at least: each tensor is moved once."""

    flops: float = 0.0
    elements: int = 0  # values moved, in the case's dtype
    extra_bytes: int = 0  # moved whatever the dtype is (argmax bytes)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.elements + other.elements, self.extra_bytes + other.extra_bytes)

    def bytes(self, dtype: torch.dtype) -> int:
        return self.elements * dtype.itemsize + self.extra_bytes


@dataclass(frozen=True)
class Tolerance:
    """How far ours may be from float64, each measured against the largest magnitude of the tensor.

    A result passes if its maximal error is at most `factor` times the error torch makes in the same dtype
    plus `ulps` units in the last place, or if it stays inside the fixed `rms` and `maximum` (the bound for
    Winograd convolution, which trades digits for multiplications).
    """

    forward_factor: float = 2.0
    gradient_factor: float = 3.0
    ulps: float = 4.0
    exact_forward: bool = False  # bit for bit torch's
    rms: float | None = None
    maximum: float | None = None


@dataclass(frozen=True)
class Rival:
    """Another way to compute the case. `prepare` runs outside the clock."""

    label: str
    function: Function
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs


@dataclass(frozen=True)
class Case:
    family: str
    name: str
    shapes: str  # in words, for the table
    make: Callable[[torch.Generator], Inputs]  # float32 on the CPU; a memory format is kept by later casts
    ours: Function  # called with the inputs by name
    torch: Function  # the same in plain torch: baseline "eager" and, compiled, "compile"
    forward: Cost
    backward: Cost
    gradients: tuple[str, ...]  # inputs that want one
    tolerance: Callable[[torch.dtype], Tolerance]
    user: Rival | None = None
    dtypes: tuple[str, ...] = ("f32",)
    devices: tuple[str, ...] = ("cpu", "cuda")
    memory: bool = False  # whether the peak is a result, too

    def cost(self, mode: str) -> Cost:
        return self.forward if mode == "fwd" else self.forward + self.backward

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        made = self.make(torch.Generator().manual_seed(seed))
        return {name: tensor.to(device=device, dtype=dtype) for name, tensor in made.items()}
