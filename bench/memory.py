"""What a step adds to the memory at its peak."""

from __future__ import annotations

import ctypes
import pathlib

import torch

from bench import timing

STATUS, CLEAR = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): the peak resident set becomes the present one


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_bytes(step: timing.Step, device: torch.device) -> int:
    """Of the caching allocator on CUDA; on the CPU (Linux) of the process, with freed memory handed back before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(0)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    step(0)  # what is allocated once: threads, tables
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text(RESET_PEAK)
    before = _resident("VmRSS")
    step(0)
    return max(0, _resident("VmHWM") - before)
