"""`make kernels`: the report finds what it is there to find."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "tests" / "cuda_on_cpu"))
import kernel_report

import build as simulator_build

pytestmark = pytest.mark.slow

LIVE_VALUES = 96
# Two blocks of 1024 threads leave 32 registers a thread: 96 values that are all alive must spill.
SPILLING = f"""
__global__ void __launch_bounds__(1024, 2) crowded(const float* in, float* out) {{
  float v[{LIVE_VALUES}];
#pragma unroll
  for (int i = 0; i < {LIVE_VALUES}; i++) v[i] = in[threadIdx.x + 1024 * i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < {LIVE_VALUES}; i++) out[threadIdx.x * {LIVE_VALUES} + i] = v[i] * v[({LIVE_VALUES} - 1) - i];
}}
"""
ROOMY = "__global__ void __launch_bounds__(128) roomy(float* x) { x[threadIdx.x] *= 2.0f; }"


@pytest.mark.skipif(not simulator_build.nvcc(), reason="there is no nvcc")
@pytest.mark.parametrize(("source", "spills"), [(SPILLING, True), (ROOMY, False)])
def test_a_spill_is_a_fault(source: str, spills: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "kernel.cu"
    file.write_text(source)
    monkeypatch.setattr(kernel_report, "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    (kernel,) = kernel_report.examine(file, "80", kernel_report.instruments()["nvdisasm"], tmp_path)
    assert bool(kernel.spilled) == spills
    assert bool(kernel.faults) == spills
    assert kernel.base == ("crowded" if spills else "roomy")
    assert kernel.threads == (1024 if spills else 128)
    assert kernel.warps() == 64


def test_a_serialised_wgmma_is_a_fault() -> None:
    text = (
        "ptxas info    : Compiling entry function 'k' for 'sm_90a'\n"
        "ptxas warning : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n"
        "ptxas info    : Used 40 registers, 2048 bytes smem\n"
    )
    kernel = kernel_report.parse_resources(text, "f.cu", "90a")["k"]
    assert (kernel.registers, kernel.shared) == (40, 2048)
    assert kernel.faults


def test_instructions_are_counted_by_function() -> None:
    listing = (
        ".text.first:\n"
        "        /*0000*/                   LDG.E.128 R4, [R2] ;\n"
        "        /*0010*/              @!P0 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4] ;\n"
        ".text.second:\n"
        "        /*0000*/                   FFMA R1, R2, R3, R4 ;\n"
    )
    counts = kernel_report.count_instructions(listing)
    found = {name: kernel_report.matching(counts["first"], pattern) for name, pattern in kernel_report.COUNTED.items()}
    assert found["LDG.128"] == found["LDG"] == found["HGMMA"] == 1
    assert found["FFMA"] == 0
    kernel = kernel_report.Kernel("f.cu", "90a", "_ZN8pyseqnet13implicit_gemmIfEEv", counts=counts["second"])
    kernel_report.judge(kernel, counted=True)
    assert any("LDS" in fault for fault in kernel.faults)  # EXPECTED names it, this listing has none


def test_the_tool_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator_build, "nvcc", lambda: None)
    monkeypatch.setattr(sys, "argv", ["kernel_report.py"])
    assert kernel_report.main() == 1
    shown = subprocess.run([sys.executable, str(ROOT / "tests" / "kernel_report.py"), "--help"], capture_output=True)
    assert b"registers" in shown.stdout
