"""Runs operator_database.py in a process of its own."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
from support import ROOT

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("expecttest"), reason="torch.testing._internal needs expecttest"
)


def test_torchs_samples_and_errors() -> None:
    home = str(ROOT / "tests")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "operator_database.py"]
    result = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-4000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed
    assert int(passed[1]) == 20  # four functions: four dtypes and the errors
