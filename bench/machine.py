"""What was measured on what: versions, commit, date, and the machine's two ceilings."""

from __future__ import annotations

import datetime
import functools
import os
import pathlib
import platform
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

import pyseqnet
from pyseqnet import _C

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
RECIPES = RESULTS / "recipes.json"  # scores of trainings, not of a device
PROBE_SECONDS = 0.2
CUDA_COPY_BYTES = 2 << 30
CUDA_MATMUL_SIZE = 8192


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()


def _cpu_name() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(device: torch.device, threads: int) -> dict[str, object]:
    """The JSON's `meta`."""
    build = pyseqnet.build_info()
    meta: dict[str, object] = {
        "device": _cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "device_type": device.type,
        "cpu": _cpu_name(),
        "isa": build["cpu_isa"],
        "threads": threads,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "pyseqnet": pyseqnet.__version__,
        "python": platform.python_version(),
        # a tree that was copied without its history may still say what it is
        "commit": _git("rev-parse", "--short", "HEAD") or os.environ.get("PYSEQNET_COMMIT", ""),
        # a run's own results are no change of what was measured
        "modified": bool(
            _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!README.md")
        ),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device.type == "cuda":
        meta["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        meta["cudnn"] = torch.backends.cudnn.version()
        meta["tf32"] = torch.backends.cudnn.allow_tf32
    return meta


def results_file(meta: dict[str, object]) -> pathlib.Path:
    words = str(meta["device"])
    if meta["device_type"] == "cpu":
        words += f" {meta['isa']} {meta['threads']} thread{'s' if meta['threads'] != 1 else ''}"
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") + ".json")


@dataclass(frozen=True)
class Ceiling:
    """The shortest time that this machine could need for a cost."""

    seconds: float
    bound: str  # "compute" or "memory"
    gflops: float
    gbps: float


class CpuCeilings:
    """fp32 FMA peak and copy bandwidth, all threads at once; bandwidth at the working set of the row."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self.gflops = self._all_threads(lambda: _C.fma_gflops(PROBE_SECONDS))
        self.copy_gbps = self._bandwidth(256 << 20)

    def _all_threads(self, probe) -> float:
        return sum(self._pool.map(lambda _: probe(), range(self._threads)))

    @functools.cache  # noqa: B019 - one instance a process
    def _bandwidth(self, working_set: int) -> float:
        return self._all_threads(lambda: _C.copy_gbps(PROBE_SECONDS, working_set // self._threads))

    def of(self, flops: float, moved: int, dtype: torch.dtype) -> Ceiling:
        # The next power of two: what fits a cache is held against that cache.
        bandwidth = self._bandwidth(1 << max(16, (moved - 1).bit_length()))
        return _roofline(flops, moved, self.gflops * self._lanes(dtype), bandwidth)

    @staticmethod
    def _lanes(dtype: torch.dtype) -> float:
        """Multiply-adds an instruction holds, relative to fp32."""
        if dtype is torch.float64:
            return 0.5
        # the bf16 dot product sums pairs; every other 16-bit type is computed in fp32
        pairs = dtype is torch.bfloat16 and pyseqnet.build_info()["cpu_isa"] == "avx512bf16"
        return 2.0 if pairs else 1.0


class CudaCeilings:
    """torch's own matrix product in the row's dtype, and a copy of two gigabytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.copy_gbps = self._bandwidth()
        self.gflops = self._peak(torch.float32)

    def _best(self, step) -> float:
        times = []
        for _ in range(10):
            torch.cuda.synchronize(self._device)
            start = time.perf_counter()
            step()
            torch.cuda.synchronize(self._device)
            times.append(time.perf_counter() - start)
        return min(times)

    def _bandwidth(self) -> float:
        source = torch.empty(CUDA_COPY_BYTES // 2, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        return CUDA_COPY_BYTES / self._best(lambda: target.copy_(source)) * 1e-9

    @functools.cache  # noqa: B019 - one instance a process
    def _peak(self, dtype: torch.dtype) -> float:
        size = CUDA_MATMUL_SIZE
        a, b = (torch.randn(size, size, device=self._device).to(dtype) for _ in range(2))
        return 2.0 * size**3 / self._best(lambda: a @ b) * 1e-9

    def of(self, flops: float, moved: int, dtype: torch.dtype) -> Ceiling:
        return _roofline(flops, moved, self._peak(dtype), self.copy_gbps)


def _roofline(flops: float, moved: int, gflops: float, gbps: float) -> Ceiling:
    compute, memory = flops / (gflops * 1e9), moved / (gbps * 1e9)
    return Ceiling(max(compute, memory), "compute" if compute > memory else "memory", gflops, gbps)


def ceilings(device: torch.device, threads: int) -> CpuCeilings | CudaCeilings:
    return CpuCeilings(threads) if device.type == "cpu" else CudaCeilings(device)


def info(device: torch.device, threads: int) -> int:
    torch.set_num_threads(threads)
    found = ceilings(device, threads)
    shown = describe(device, threads) | {
        "fp32_gflops": round(found.gflops),
        "copy_gbps": round(found.copy_gbps),
    }
    shown |= {f"build.{name}": value for name, value in pyseqnet.build_info().items()}
    for name, value in shown.items():
        print(f"{name:<24}{value}")
    for operation, tables in _C.dispatch_tables().items():
        kernels = tables[device.type]
        print(f"{operation:<24}{' > '.join(kernels) if kernels else 'no kernel for this device'}")
    return 0


def device_results() -> list[pathlib.Path]:
    """The files of measured rows, one a device; the recipes' table of scores lies beside them."""
    return sorted(path for path in RESULTS.glob("*.json") if path != RECIPES)
