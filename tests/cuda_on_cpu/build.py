"""Builds the simulator and its cases, incrementally, in build/cuda_on_cpu/.

    python tests/cuda_on_cpu/build.py case_max_pool      prints the path of the program

Kernels are compiled with -fsanitize=thread but without its library: the simulator itself is what the inserted
calls reach (sim/hooks.cpp). -O2 matters: at -O1 GCC leaves stores of class types uninstrumented.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "kernels"
BUILD = ROOT / "build" / "cuda_on_cpu"
JOBS = 2

# -g1 is what reports need: lines, and who was inlined where. Of -fsanitize=undefined, what kernels get wrong: the whole
# takes half as long again to compile.
PLAIN = ["-std=c++20", "-O2", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter"]
UNDEFINED = "alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
CHECKED = [*PLAIN, f"-fsanitize=thread,{UNDEFINED}"]


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def packaged(pattern: str) -> list[Path]:
    """Files of PyPI's CUDA packages (site-packages/nvidia/cu13), the newest release first."""
    return sorted(Path(sysconfig.get_paths()["purelib"]).glob(f"nvidia/cu*/{pattern}"), reverse=True)


def nvcc() -> str | None:
    """A CUDA compiler: of CUDA_HOME, the one on PATH, or that of PyPI's nvidia-cuda-nvcc."""
    home = os.environ.get("CUDA_HOME")
    candidates = [str(Path(home) / "bin" / "nvcc")] if home else []
    for candidate in [*candidates, "nvcc", *map(str, packaged("bin/nvcc"))]:
        if found := shutil.which(candidate):
            return found
    return None


@functools.cache
def cuda_include() -> Path | None:
    """The folder of cuda_bf16.h: a toolkit's, or that of the packages nvidia-cuda-runtime and nvidia-cuda-crt."""
    folders = []
    if home := os.environ.get("CUDA_HOME"):
        folders.append(Path(home) / "include")
    if found := nvcc():
        # The program on PATH may be a script that starts the real one elsewhere; --dryrun names its folder.
        said = subprocess.run([found, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        if top := re.search(r"^#\$ TOP=(.*)$", said.stderr, re.MULTILINE):
            folders.append(Path(top[1].strip()) / "include")
    folders += packaged("include")
    for folder in folders:
        if (folder / "cuda_bf16.h").is_file() and (folder / "crt" / "host_defines.h").is_file():
            return folder.resolve()
    return None


def missing() -> str | None:
    """Why the simulator cannot be built here, or None."""
    if compiler() is None:
        return "no C++ compiler (g++, or the one that CXX names)"
    if cuda_include() is None:
        return (
            "no CUDA headers: set CUDA_HOME, put nvcc on PATH, or `pip install nvidia-cuda-runtime nvidia-cuda-nvcc"
            " nvidia-cuda-cccl` (of one CUDA release)"
        )
    if shutil.which("addr2line") is None:
        return "no addr2line (binutils): the launched kernels could not be named"
    return None


def sources_of(case: Path) -> list[Path]:
    """What a case is linked with: its lines `// Sources: <files below kernels/>`."""
    lines = re.findall(r"^// Sources:(.*)$", case.read_text(), re.MULTILINE)
    return [KERNELS / name for line in lines for name in line.split()]


def is_fresh(target: Path, command: list[str]) -> bool:
    """Whether target was built by this command after everything it was built from."""
    stamp, dependencies = target.with_suffix(".command"), target.with_suffix(".d")
    if not (target.exists() and stamp.exists() and dependencies.exists() and stamp.read_text() == repr(command)):
        return False
    names = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    built = target.stat().st_mtime
    return all(os.path.exists(name) and os.path.getmtime(name) <= built for name in names)


def compile_one(source: Path, flags: list[str], includes: tuple[Path, ...] = (), target: Path | None = None) -> Path:
    target = target or BUILD / (str(source.relative_to(ROOT)).replace("/", "-") + ".o")
    folders = [f"-I{folder}" for folder in (*includes, KERNELS, HERE)]
    command = [compiler(), "-x", "c++", *flags, *folders, "-isystem", str(cuda_include())]
    command += ["-MD", "-MF", str(target.with_suffix(".d")), "-c", str(source), "-o", str(target)]
    if not is_fresh(target, command):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        target.with_suffix(".command").write_text(repr(command))
    return target


def flags_of(source: Path) -> list[str]:
    """Kernels are checked; a case launches through their own launchers and is plain host code, unless it holds some."""
    checked = source.suffix == ".cu" or (source.parent == HERE and "__global__" in source.read_text())
    return CHECKED if checked or source.parent.name in ("faults", "conformance") else PLAIN


def objects_of(sources: list[Path]) -> list[Path]:
    """The objects of some sources and of the simulator."""
    BUILD.mkdir(parents=True, exist_ok=True)
    units = list(dict.fromkeys([*sources, *sorted(HERE.glob("sim/*.cpp"))]))
    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(lambda unit: compile_one(unit, flags_of(unit)), units))


def link(program: Path, *parts: list[Path]) -> Path:
    objects = [part for some in parts for part in some]
    if not program.exists() or any(part.stat().st_mtime > program.stat().st_mtime for part in objects):
        command = [compiler(), "-fsanitize=undefined", *map(str, objects), "-o", str(program), "-ldl"]
        subprocess.run(command, check=True)
    return program


def build(cases: list[Path]) -> dict[Path, Path]:
    """Builds the programs of some cases: case -> program."""
    objects_of([source for case in cases for source in [case, *sources_of(case)]])  # all of them at a time
    return {case: link(BUILD / case.stem, objects_of([case, *sources_of(case)])) for case in cases}


if __name__ == "__main__":
    if why := missing():
        sys.exit(why)
    for program in build([next(HERE.rglob(f"{name}.cpp")) for name in sys.argv[1:]]).values():
        print(program)
