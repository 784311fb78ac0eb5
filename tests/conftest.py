"""Fixtures, and the hypothesis profiles: "ci" repeats its examples, HYPOTHESIS_PROFILE=explore draws new ones."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from support import DEVICES

# Examples are small and a refusal is an answer, so the checks on their size and share do not apply.
SUPPRESSED = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
settings.register_profile(
    "ci", derandomize=True, deadline=None, database=None, max_examples=100, suppress_health_check=SUPPRESSED
)
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=SUPPRESSED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Real data are read where they lie; a test whose data are nowhere is skipped, nothing is downloaded.
BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
os.environ.setdefault("PYSEQNET_DOWNLOAD", "0")
if BESIDE.is_dir():
    os.environ.setdefault("PYSEQNET_DATA", str(BESIDE))

# Torch is the yardstick: it must not round to TF32, nor choose another algorithm from run to run.
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
torch.backends.cudnn.benchmark = False


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _unpinned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the caller's shell says about dispatch must not decide what a test tests."""
    for name in ("PYSEQNET_FORCE", "PYSEQNET_VERBOSE", "PYSEQNET_ISA", "PYSEQNET_WINOGRAD"):
        monkeypatch.delenv(name, raising=False)
    return


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Torch, on problems this small, is faster alone; tests give our kernels two threads, or say how many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


warnings.filterwarnings("ignore", message="Deterministic behavior was enabled")
