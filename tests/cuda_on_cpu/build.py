"""Builds the simulator and its cases, incrementally, in build/cuda_on_cpu/.

    python tests/cuda_on_cpu/build.py case_max_pool      prints the path of the program

Kernels are compiled with -fsanitize=thread but without its library: the simulator itself is what the inserted
calls reach (sim/hooks.cpp). -O2 matters: at -O1 GCC leaves stores of class types uninstrumented.
"""

from __future__ import annotations

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

PLAIN = ["-std=c++20", "-O2", "-g", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter"]
CHECKED = [*PLAIN, "-fsanitize=thread,undefined", "-fno-sanitize=vptr,null"]


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def nvcc() -> str | None:
    """A CUDA compiler: of CUDA_HOME, or the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    candidates = [str(Path(home) / "bin" / "nvcc")] if home else []
    for candidate in [*candidates, "nvcc"]:
        if found := shutil.which(candidate):
            return found
    return None


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
    folders += sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu*/include"), reverse=True)
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


def compile_one(source: Path, flags: list[str]) -> Path:
    target = BUILD / (str(source.relative_to(ROOT)).replace("/", "-") + ".o")
    include = cuda_include()
    command = [compiler(), "-x", "c++", *flags, f"-I{KERNELS}", f"-I{HERE}", "-isystem", str(include)]
    command += ["-MD", "-MF", str(target.with_suffix(".d")), "-c", str(source), "-o", str(target)]
    if not is_fresh(target, command):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        target.with_suffix(".command").write_text(repr(command))
    return target


def build(cases: list[Path]) -> dict[Path, Path]:
    """Builds the programs of some cases: case -> program."""
    BUILD.mkdir(parents=True, exist_ok=True)
    simulator = sorted(HERE.glob("sim/*.cpp"))
    units = dict.fromkeys(simulator, PLAIN)
    for case in cases:
        # A case launches through kernels' own launchers and is plain host code, unless it holds kernels.
        units[case] = CHECKED if "__global__" in case.read_text() else PLAIN
        for source in sources_of(case):
            units[source] = CHECKED if source.suffix == ".cu" else PLAIN
    with ThreadPoolExecutor(JOBS) as pool:
        objects = dict(zip(units, pool.map(lambda unit: compile_one(*unit), units.items()), strict=True))
    programs = {}
    for case in cases:
        program = BUILD / case.stem
        parts = [objects[source] for source in [case, *sources_of(case), *simulator]]
        if not program.exists() or any(p.stat().st_mtime > program.stat().st_mtime for p in parts):
            subprocess.run(
                [compiler(), "-fsanitize=undefined", *map(str, parts), "-o", str(program), "-ldl"], check=True
            )
        programs[case] = program
    return programs


if __name__ == "__main__":
    if why := missing():
        sys.exit(why)
    for program in build([next(HERE.rglob(f"{name}.cpp")) for name in sys.argv[1:]]).values():
        print(program)
