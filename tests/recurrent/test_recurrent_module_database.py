"""Torch's own module test database on our recurrent layers, in a process whose torch.nn holds our classes."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from support import run_python

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("expecttest"), reason="torch.testing._internal needs expecttest"
)
SCRIPT = Path(__file__).with_name("recurrent_module_database.py")


def test_database_passes_and_a_planted_fault_is_found(device: str) -> None:
    argv = [str(SCRIPT), "--device", device]
    result = run_python(f"import runpy, sys; sys.argv = {argv!r}; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert int(re.search(r"(\d+) passed, 0 failed", result.stdout)[1]) >= 100
