"""CUDA kernels without a GPU: they run on the simulator (tests/cuda_on_cpu/README.md) against their oracles, are
compiled by nvcc where there is one, and keep the rules that make the first possible."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "cuda_on_cpu"))
import build as simulator

CASES = sorted(simulator.HERE.glob("case_*.cpp"))
FAULTS = sorted(simulator.HERE.glob("faults/faults_*.cpp"))
CUDA_SOURCES = [path for path in sorted(simulator.KERNELS.rglob("*.cu")) if "__global__" in path.read_text()]
DEVICE_SOURCES = sorted([*simulator.KERNELS.rglob("*.cu"), *simulator.KERNELS.rglob("*.cuh")])
PTX_WRAPPERS = simulator.KERNELS / "common" / "ptx.cuh"

# Schedules a check runs under; they go through four scheduling policies and both ends of asynchronous copies.
SEEDS = 4

needs_simulator = pytest.mark.skipif(simulator.missing() is not None, reason=simulator.missing() or "")
needs_nvcc = pytest.mark.skipif(simulator.nvcc() is None, reason="no nvcc on PATH or in CUDA_HOME")


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


def run(source: Path, *options: str) -> None:
    """Builds the program of a case, where it is not up to date, and runs it."""
    program = simulator.build([source])[source]
    environment = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=0"}
    environment.pop("CUSIM_NO_CHECKS", None)
    done = subprocess.run([program, *options], capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, f"{program.name} {' '.join(options)}\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
    print(done.stdout[-400:])


@needs_simulator
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_kernels_agree_with_their_oracle(case: Path, launched: Path) -> None:
    run(case, "--seeds", str(SEEDS), "--launched", str(launched))


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
@pytest.mark.parametrize("program", FAULTS, ids=lambda program: program.stem)
def test_simulator_catches_planted_faults(program: Path) -> None:
    run(program)


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


@needs_nvcc
@pytest.mark.parametrize("path", CUDA_SOURCES, ids=lambda path: str(path.relative_to(simulator.KERNELS)))
def test_device_code_does_not_spill(path: Path, tmp_path: Path) -> None:
    command = [
        simulator.nvcc(),
        "-std=c++20",
        "-O3",
        f"-I{simulator.KERNELS}",
        "-Xptxas",
        "-v",
        "--threads",
        "2",
    ]
    command += ["-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90a,code=sm_90a"]
    done = subprocess.run([*command, "-c", path, "-o", tmp_path / "out.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    said = subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True).stdout
    report = re.compile(
        r"Compiling entry function '(.*?)' for '(sm_\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores,"
        r" (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    spilled = []
    for name, arch, stack, stores, loads, registers in report.findall(said):
        short = re.sub(r"\(anonymous namespace\)::|pyseqnet::|\(.*", "", name.replace("(anonymous namespace)::", ""))
        print(f"{arch:7} {registers:>3} registers  {short}")
        if int(stores) or int(loads):
            spilled.append(f"{arch} {short}: {stores} bytes stored, {loads} loaded, stack frame {stack}")
    assert not spilled, "\n".join(spilled)
    assert "C7510" not in said, "wgmma is serialised"
