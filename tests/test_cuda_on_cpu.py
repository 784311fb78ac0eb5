"""CUDA kernels without a GPU: they run on the simulator (tests/cuda_on_cpu/README.md) against their oracles, are
compiled by nvcc where there is one, and keep the rules that make the first possible. Faults planted in copies of them
are caught."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "cuda_on_cpu"))
import kernel_report
import mutations

import build as simulator

CASES = sorted(simulator.HERE.glob("case_*.cpp"))
CONFORMANCE = sorted(simulator.HERE.glob("conformance/*.cpp"))
FAULTS = sorted(simulator.HERE.glob("faults/faults_*.cpp"))
CUDA_SOURCES = [path for path in sorted(simulator.KERNELS.rglob("*.cu")) if "__global__" in path.read_text()]
DEVICE_SOURCES = sorted([*simulator.KERNELS.rglob("*.cu"), *simulator.KERNELS.rglob("*.cuh")])
PTX_WRAPPERS = simulator.KERNELS / "common" / "ptx.cuh"

# Schedules, by first seed and number. The checker finds races whatever the schedule was, at five times the cost of
# values alone: so one schedule is checked, and others (seeds 4 to 6 run warps by changing priorities, in reverse and in
# order) judge values only, on other random problems.
CHECKED_SEEDS = ("1", "1")
UNCHECKED_SEEDS = ("4", "3")

needs_simulator = pytest.mark.skipif(simulator.missing() is not None, reason=simulator.missing() or "")
needs_nvcc = pytest.mark.skipif(simulator.nvcc() is None, reason="no nvcc on PATH, in CUDA_HOME or of nvidia-cuda-nvcc")


def without_comments(path: Path) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def kernels_in(path: Path) -> set[str]:
    """The names of the __global__ functions of a file."""
    pattern = r"__global__\s+void\s+(?:__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\("
    text = without_comments(path)
    names = set(re.findall(pattern, text))
    assert len(re.findall(r"\b__global__\b", text)) == len(re.findall(pattern, text)), f"{path}: unknown spelling"
    return names


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simulator") / "launched"


def start(program: Path, *options: str, checks: bool = True) -> subprocess.Popen[str]:
    environment = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=0"}
    environment.pop("CUSIM_NO_CHECKS", None)
    if not checks:
        environment["CUSIM_NO_CHECKS"] = "1"
    command = [str(program), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> None:
    said, _ = process.communicate()
    assert process.returncode == 0, f"{process.args}\n{said[-8000:]}"
    print(said[-400:])


@needs_simulator
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_kernels_agree_with_their_oracle(case: Path, launched: Path) -> None:
    program = simulator.build([case])[case]
    seed, count = CHECKED_SEEDS
    checked = start(program, "--seed", seed, "--seeds", count, "--launched", str(launched))
    seed, count = UNCHECKED_SEEDS
    unchecked = start(program, "--seed", seed, "--seeds", count, checks=False)
    finish(unchecked)
    finish(checked)


@needs_simulator
def test_every_kernel_was_launched(launched: Path) -> None:
    if not launched.exists():
        pytest.skip("no case ran: run the whole file")
    # Names as in `void pyseqnet::(anonymous namespace)::kernel<float, 1>(...)`.
    ran = set(re.findall(r"(\w+)(?:<[^\n]*?>)?\(", launched.read_text()))
    for path in DEVICE_SOURCES:
        idle = kernels_in(path) - ran
        assert not idle, f"{path.relative_to(simulator.ROOT)}: no case in tests/cuda_on_cpu/ launches {sorted(idle)}"


@needs_simulator
@pytest.mark.parametrize("program", CONFORMANCE, ids=lambda program: program.stem)
def test_wrappers_give_the_stored_results(program: Path) -> None:
    finish(start(simulator.build([program])[program]))


def test_every_wrapper_has_a_stored_result() -> None:
    wrappers = set(re.findall(r"PYSEQNET_DEVICE \w+\*? (\w+)\(", PTX_WRAPPERS.read_text()))
    # im2col and boxes of all dimensions are held against plain loops in faults_tma.cpp
    text = "".join(path.read_text() for path in [*CONFORMANCE, simulator.HERE / "faults" / "faults_tma.cpp"])
    tried = set(re.findall(r"ptx::(\w+)", text)) | {"smem_u32"}
    through_others = {"mma_m16n8k16_bf16", "mma_m16n8k16_f16", "fence_async_proxy_global", "tma_load_multicast"}
    assert not wrappers - tried - through_others


@needs_simulator
@pytest.mark.parametrize("program", FAULTS, ids=lambda program: program.stem)
def test_simulator_catches_planted_faults(program: Path) -> None:
    finish(start(simulator.build([program])[program]))


@pytest.mark.parametrize("path", DEVICE_SOURCES, ids=lambda path: str(path.relative_to(simulator.KERNELS)))
def test_kernel_files_keep_the_rules(path: Path) -> None:
    text = without_comments(path)
    forbidden = {
        r"<<<": "launch through launch()",
        r"\b(cub|thrust|cooperative_groups)\b": "the simulator has no such library",
        r"\b(torch|ATen|c10)\b": "kernels know nothing of torch",
        r"\b__shared__\b": "use PYSEQNET_SHARED or PYSEQNET_DYNAMIC_SHARED",
        r"\b__constant__\b": "pass parameters by value",
    }
    if path != PTX_WRAPPERS:
        forbidden[r"\basm\b"] = "PTX lives in common/ptx.cuh"
    if path.name == "launch.cuh":
        del forbidden[r"\b__shared__\b"]
    for pattern, instead in forbidden.items():
        assert not re.search(pattern, text), f"{path.name} contains {pattern}: {instead}"


@needs_simulator
@pytest.mark.parametrize("name", mutations.MUTATIONS)
def test_faults_in_copies_of_the_kernels_are_caught(name: str) -> None:
    assert not mutations.survivors(name)


# Hopper's own kernels are empty elsewhere. `make kernels` compiles everything for every architecture.
@needs_nvcc
@pytest.mark.parametrize("path", CUDA_SOURCES, ids=lambda path: str(path.relative_to(simulator.KERNELS)))
def test_device_code_does_not_spill(path: Path, tmp_path: Path) -> None:
    arch = "90a" if path.stem.endswith("_sm90a") else "80"
    kernels = kernel_report.examine(path, arch, kernel_report.instruments()["nvdisasm"], tmp_path)
    for kernel in kernels:
        print(f"{arch:7} {kernel.registers:>3} registers  {kernel.base}")
    assert not [f"{kernel.base}: {fault}" for kernel in kernels for fault in kernel.faults]
