"""Large results are asked to be backed by huge pages: hundreds of page faults instead of ten thousands."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import run_python

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
BYTES = 96 << 20  # above what the C library ever keeps: mapped afresh by every call
COUNT_FAULTS = f"""
import resource, torch
import pyseqnet.functional as F
torch.set_num_threads(1)
x = torch.zeros(1, {BYTES // 4096}, 32, 32)
F.max_pool2d(x[:, :1], 3, 1, 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
y = F.max_pool2d(x, 3, 1, 1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, float(y.abs().max()))
"""


def faults(**variables: str) -> int:
    result = run_python(COUNT_FAULTS, **variables)
    assert result.returncode == 0, result.stderr
    count, largest = result.stdout.split()
    assert float(largest) == 0
    return int(count)


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="this system has no transparent huge pages"
)
def test_large_results_take_few_page_faults() -> None:
    pages = BYTES // 4096
    assert faults() < pages / 4
    if "[madvise]" in SETTING.read_text():
        assert faults(PYSEQNET_HUGE_PAGES="0") > pages * 0.9
