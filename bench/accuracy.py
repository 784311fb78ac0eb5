"""How far a result is off, against the same computation in float64, beside how far torch is off."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.case import Case, Function, Inputs, Tolerance

Results = dict[str, Tensor]  # "output" and, by input, the gradients


def results_of(function: Function, inputs: Inputs, gradients: tuple[str, ...], seed: int = 1) -> Results:
    leaves = {name: tensor.detach().requires_grad_(name in gradients) for name, tensor in inputs.items()}
    output = function(**leaves)
    results = {"output": output.detach()}
    if gradients:
        # drawn in the output's logical order, so that every layout gets the same gradient
        gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
        gradient = gradient.to(torch.bfloat16).to(output)  # exact in every dtype
        found = torch.autograd.grad(output, [leaves[name] for name in gradients], gradient)
        results.update(zip(gradients, found, strict=True))
    return results


@dataclass(frozen=True)
class Error:
    maximum: float  # both relative to the largest magnitude of the exact result
    rms: float


def error_of(result: Tensor, exact: Tensor) -> Error:
    if result.shape != exact.shape:
        return Error(float("inf"), float("inf"))
    if exact.numel() == 0:
        return Error(0.0, 0.0)
    difference = result.double() - exact
    scale = exact.abs().max().clamp_min(1e-30)
    return Error((difference.abs().max() / scale).item(), (difference.square().mean().sqrt() / scale).item())


@dataclass(frozen=True)
class Judgement:
    error: float  # the largest of all tensors
    torch_error: float
    fault: str  # empty: the result is right


def _fault(name: str, ours: Tensor, theirs: Tensor, exact: Tensor, tolerance: Tolerance) -> str:
    if name == "output" and tolerance.exact_forward:
        same = torch.equal(ours, theirs)
        return "" if same else "output differs from torch's, must be equal"
    error, reference = error_of(ours, exact), error_of(theirs, exact)
    factor = tolerance.forward_factor if name == "output" else tolerance.gradient_factor
    bound = factor * reference.maximum + tolerance.ulps * torch.finfo(theirs.dtype).eps
    # `not <=` rather than `>`: a NaN is a fault
    if error.maximum <= bound:
        return ""
    if tolerance.rms is not None and tolerance.maximum is not None:
        if error.rms <= tolerance.rms and error.maximum <= tolerance.maximum:
            return ""
        bound = max(bound, tolerance.maximum)
    what = name if name == "output" else f"gradient of {name}"
    return f"{what} is off by {error.maximum:.1e} (rms {error.rms:.1e}), allowed {bound:.1e}"


def judge(case: Case, inputs: Inputs, mode: str) -> Judgement:
    gradients = case.gradients if mode == "fwdbwd" else ()
    exact = results_of(case.torch, {name: t.double() for name, t in inputs.items()}, gradients)
    theirs = results_of(case.torch, inputs, gradients)
    ours = results_of(case.ours, inputs, gradients)
    tolerance = case.tolerance(theirs["output"].dtype)
    faults = [_fault(name, ours[name], theirs[name], exact[name], tolerance) for name in exact]
    return Judgement(
        error=max(error_of(ours[name], exact[name]).maximum for name in exact),
        torch_error=max(error_of(theirs[name], exact[name]).maximum for name in exact),
        fault="; ".join(fault for fault in faults if fault),
    )
