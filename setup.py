"""Builds pyseqnet._C: torch-free kernels, once per instruction set and CUDA architecture, and a thin binding.

setuptools has no flags per source and torch's CUDAExtension refuses to work beside a CPU build of torch, so compiling
is a step of our own: a list of jobs, run by MAX_JOBS threads, each skipped when its command and its inputs are those
of the last time.

Environment: PYSEQNET_CUDA=auto|0|1, PYSEQNET_CUDA_ARCHS="80;90a;100;120", CUDA_HOME, PYSEQNET_SANITIZE=1, MAX_JOBS,
CXX.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_CUDA_ARCHS = "80;90a;100;120"
PTX_ARCH = "80"  # one PTX that any newer device can compile at load time
TORCH_TARGET = "0x020a000000000000"  # LibTorch Stable ABI of torch 2.10
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx512bf16": ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16"],
}
BF16_MARKER = "// ISA: +avx512bf16"  # only sources that say so are compiled for that instruction set


def say(text: str) -> None:
    print(f"pyseqnet: {text}", flush=True)


def find_nvcc() -> Path | None:
    """nvcc as PYSEQNET_CUDA, CUDA_HOME and PATH say; None for a CPU-only build."""
    wish = os.environ.get("PYSEQNET_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"pyseqnet: PYSEQNET_CUDA must be auto, 0 or 1, not {wish!r}")
    if wish == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(Path(on_path))
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    if wish == "1":
        raise SystemExit("pyseqnet: PYSEQNET_CUDA=1, but there is no nvcc in CUDA_HOME, /usr/local/cuda or PATH")
    return None


class Toolchain:
    """Which compilers there are and the flags that every job of a kind shares."""

    def __init__(self) -> None:
        self.cxx = os.environ.get("CXX", "g++").split()
        self.sanitize = os.environ.get("PYSEQNET_SANITIZE", "0") not in ("", "0")
        self.nvcc = None if self.sanitize else find_nvcc()
        self.archs = [a for a in re.split(r"[;, ]+", os.environ.get("PYSEQNET_CUDA_ARCHS", DEFAULT_CUDA_ARCHS)) if a]
        speed = (
            ["-O1", "-g", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
            if self.sanitize
            else ["-O3", "-g0"]
        )
        self.cxx_flags = [
            "-std=c++20",
            "-fPIC",
            "-fvisibility=hidden",
            *speed,
            "-Wall",
            "-Wextra",
            "-Ikernels",
        ]
        # GCC's vector extensions: ABI notes on passing vectors and false "uninitialized" reports on shuffles.
        self.kernel_flags = [
            "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
            "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized",
        ]  # fmt: skip
        self.defines: list[str] = []
        if self.nvcc:
            archs = ", ".join(f"sm_{a}" for a in self.archs) + f" + PTX {PTX_ARCH}"
            version = self.nvcc_version()
            self.defines = [
                "-DPYSEQNET_WITH_CUDA=1",
                f'-DPYSEQNET_CUDA_ARCHS="{archs}"',
                f'-DPYSEQNET_NVCC_VERSION="{version}"',
            ]
            say(f"building with CUDA: nvcc {version}, {archs}")
        else:
            say("building for the CPU only: " + ("sanitizers" if self.sanitize else "no nvcc, or PYSEQNET_CUDA=0"))

    def nvcc_version(self) -> str:
        text = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        found = re.search(r"release ([\d.]+)", text)
        return found.group(1) if found else "unknown"

    @property
    def cuda_home(self) -> Path:
        return self.nvcc.parent.parent

    def isas(self, source: Path) -> list[str]:
        if platform.machine() not in ("x86_64", "AMD64"):
            return ["portable"]
        wants_bf16 = BF16_MARKER in source.read_text()[:1000]
        return ["portable", "avx2", "avx512"] + (["avx512bf16"] if wants_bf16 else [])

    def gencode(self) -> list[str]:
        flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs]
        return [*flags, f"-gencode=arch=compute_{PTX_ARCH},code=compute_{PTX_ARCH}"]


class Job:
    """One object file. Skipped when the command is the same and no input is newer than the object."""

    def __init__(self, source: Path, tag: str, folder: Path, command: list[str], isa: str | None = None) -> None:
        self.source, self.isa = source, isa
        self.object = folder / f"{source.with_suffix('').as_posix().replace('/', '.')}{tag}.o"
        self.depfile, self.record = self.object.with_suffix(".d"), self.object.with_suffix(".cmd")
        self.command = [*command, "-MMD", "-MF", str(self.depfile), "-c", str(source), "-o", str(self.object)]

    def is_current(self) -> bool:
        if not (self.object.exists() and self.record.exists() and self.depfile.exists()):
            return False
        if self.record.read_text() != " ".join(self.command):
            return False
        inputs = self.depfile.read_text().replace("\\\n", " ").split(":", 1)[-1].split()
        built = self.object.stat().st_mtime
        return all(os.path.exists(i) and os.path.getmtime(i) <= built for i in inputs)

    def run(self) -> None:
        self.record.unlink(missing_ok=True)
        subprocess.run(self.command, cwd=ROOT, check=True)
        if self.isa and self.isa != "portable":
            self.check_symbols()
        self.record.write_text(" ".join(self.command))

    def check_symbols(self) -> None:
        """A weak symbol outside the ISA's namespace could replace the portable copy in the whole program."""
        listing = subprocess.run(["nm", "-C", str(self.object)], capture_output=True, text=True, check=True).stdout
        weak = [line.split(" ", 2)[2] for line in listing.splitlines() if re.match(r"[0-9a-f]* [WVu] ", line)]
        # DW.ref.* are pointers that the sanitizers' exception tables use: data, the same in every copy.
        stray = [name for name in weak if f"pyseqnet::{self.isa}::" not in name and not name.startswith("DW.ref.")]
        if stray:
            self.object.unlink()
            raise SystemExit(f"pyseqnet: {self.source} for {self.isa} leaves weak symbols: {', '.join(stray[:5])}")


def kernel_jobs(tools: Toolchain, folder: Path) -> list[Job]:
    jobs = []
    for source in sorted(Path("kernels").glob("*/*.cpp")):
        base = [*tools.cxx, *tools.cxx_flags, *tools.kernel_flags, *tools.defines]
        if not source.name.endswith("_cpu.cpp"):
            jobs.append(Job(source, "", folder, base))
            continue
        jobs += [
            Job(source, f".{isa}", folder, [*base, f"-DPYSEQNET_ISA={isa}", *ISA_FLAGS[isa]], isa)
            for isa in tools.isas(source)
        ]
    if tools.nvcc:
        nvcc = [
            str(tools.nvcc), "-std=c++20", "-O3", "-Ikernels", "-Xcompiler=-fPIC,-fvisibility=hidden",
            "-ccbin", tools.cxx[0], *tools.defines, *tools.gencode(),
        ]  # fmt: skip
        jobs += [Job(source, ".cu", folder, nvcc) for source in sorted(Path("kernels").glob("*/*.cu"))]
    return jobs


def binding_jobs(tools: Toolchain, folder: Path) -> list[Job]:
    import pybind11
    import torch

    include = Path(torch.__file__).parent / "include"
    base = [*tools.cxx, *tools.cxx_flags, *tools.defines, "-Icsrc"]
    # torch carries a pybind11 of its own, which refuses to be included beside the stable ABI.
    to_python = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
    to_torch = [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-isystem{include}", f"-isystem{include / 'torch/csrc/api/include'}"
    ]  # fmt: skip
    return [
        Job(source, "", folder, base + (to_python if source.name == "module.cpp" else to_torch))
        for source in sorted(Path("csrc").glob("*.cpp"))
    ]


class Build(build_ext):
    """build_ext that knows the jobs above."""

    def build_extension(self, ext: Extension) -> None:
        os.chdir(ROOT)
        tools = Toolchain()
        folder = ROOT / "build" / ("objects-sanitize" if tools.sanitize else "objects") / sys.implementation.cache_tag
        folder.mkdir(parents=True, exist_ok=True)
        jobs = kernel_jobs(tools, folder) + binding_jobs(tools, folder)
        stale = [job for job in jobs if not job.is_current()]
        workers = int(os.environ.get("MAX_JOBS", 0)) or len(os.sched_getaffinity(0))
        say(f"{len(stale)} of {len(jobs)} objects to compile, {workers} at a time")
        # The slowest first: nvcc, then sources that are compiled for wide vectors.
        stale.sort(key=lambda job: (job.source.suffix != ".cu", job.isa is None))
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(Job.run, stale))
        self.link(tools, [str(job.object) for job in jobs], Path(self.get_ext_fullpath(ext.name)))

    def link(self, tools: Toolchain, objects: list[str], target: Path) -> None:
        import torch

        target.parent.mkdir(parents=True, exist_ok=True)
        command = [*tools.cxx, "-shared", *objects, f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
        if tools.sanitize:
            command += ["-fsanitize=address,undefined"]
        else:
            command += ["-Wl,--strip-all"]
        if tools.nvcc:
            libraries = [p for p in (tools.cuda_home / "lib64", tools.cuda_home / "lib") if p.is_dir()]
            command += [f"-L{p}" for p in libraries] + ["-lcudart_static", "-lrt", "-lpthread"]
        # -Bsymbolic keeps two extensions that both link cudart statically apart.
        subprocess.run([*command, "-ldl", "-Wl,-Bsymbolic", "-o", str(target)], check=True)


setup(ext_modules=[Extension("pyseqnet._C", sources=[])], cmdclass={"build_ext": Build})
