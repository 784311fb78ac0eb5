"""The C++ tests of the kernels (tests/cpp), without torch and without CMake: each is a plain program that returns 0."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import ROOT

SOURCES = sorted((ROOT / "tests" / "cpp").glob("*.cpp"))
FOLDER = ROOT / "build" / "cpp_tests"
OBJECTS = ROOT / "build" / "objects" / str(sys.implementation.cache_tag)
CXX = shlex.split(os.environ.get("CXX", "g++"))
# As setup.py compiles kernels.
FLAGS = [
    "-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized",
    "-Ikernels",
]  # fmt: skip
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx512bf16": ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16"],
}
BF16_MARKER = "// ISA: +avx512bf16"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which(CXX[0]), reason=f"there is no C++ compiler {CXX[0]}"),
]


def isas(source: Path) -> list[str | None]:
    if not source.name.endswith("_cpu.cpp"):
        return [None]
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["portable"]
    wants_bf16 = BF16_MARKER in source.read_text()[:1000]
    return ["portable", "avx2", "avx512", *(["avx512bf16"] if wants_bf16 else [])]


def newest_input(depfile: Path) -> float:
    inputs = depfile.read_text().replace("\\\n", " ").split(":", 1)[-1].split()
    return max((ROOT / name).stat().st_mtime if (ROOT / name).exists() else float("inf") for name in inputs)


def compile_if_stale(source: Path, name: str, extra: list[str]) -> Path:
    target = FOLDER / f"{name}.o"
    depfile = target.with_suffix(".d")
    if target.exists() and depfile.exists() and newest_input(depfile) <= target.stat().st_mtime:
        return target
    command = [*CXX, *FLAGS, *extra, "-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(target)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        target.unlink(missing_ok=True)
        raise RuntimeError(f"{source} does not compile:\n{result.stderr}")
    return target


def kernel_object(source: Path, isa: str | None) -> Path:
    """setup.py's object where it is current, else one of ours.

    Tables (and what else is compiled once) of a build with CUDA name the CUDA kernels, which are not linked here.
    """
    name = source.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") + (f".{isa}" if isa else "")
    built, record = OBJECTS / f"{name}.o", OBJECTS / f"{name}.cmd"
    if built.exists() and record.exists() and (isa or "PYSEQNET_WITH_CUDA" not in record.read_text()):
        depfile = built.with_suffix(".d")
        if depfile.exists() and newest_input(depfile) <= built.stat().st_mtime:
            return built
    return compile_if_stale(source, name, [f"-DPYSEQNET_ISA={isa}", *ISA_FLAGS[isa]] if isa else [])


@pytest.fixture(scope="module")
def kernels() -> Path:
    """kernels/ as a static library."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    jobs = [(source, isa) for source in sorted((ROOT / "kernels").glob("*/*.cpp")) for isa in isas(source)]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 0)) or len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(lambda job: kernel_object(*job), jobs))
    library = FOLDER / "libpyseqnet_kernels.a"
    library.unlink(missing_ok=True)
    subprocess.run(["ar", "rcs", str(library), *map(str, objects)], check=True)
    return library


@pytest.mark.skipif(not SOURCES, reason="tests/cpp holds no programs")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_program_passes(source: Path, kernels: Path) -> None:
    test = compile_if_stale(source, f"tests.{source.stem}", ["-Itests/cpp"])
    program = FOLDER / source.stem
    subprocess.run([*CXX, str(test), str(kernels), "-lpthread", "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
