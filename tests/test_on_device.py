"""`make gpu` without a GPU: its script with stand-ins for the tools, so that failures are seen to be handled."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support import ROOT

SCRIPT = "tests/on_device.sh"
TOOLS = {
    "nvidia-smi": 'case "$*" in *compute_cap*) echo 9.0 ;; *) echo "name, driver"; echo "NVIDIA H200, 1" ;; esac',
    # Writes what -o names: a program that does what its name asks for.
    "nvcc": (
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done\n'
        "case $out in\n"
        '  *.o) echo object > "$out" ;;\n'
        '  *) printf "#!/bin/sh\\necho ran $(basename $out); case $out in *broken*) exit 1 ;; esac\\n" > "$out"\n'
        '     chmod +x "$out" ;;\n'
        "esac"
    ),
    "compute-sanitizer": 'echo "$@"; case "$*" in *racecheck*pool*) exit 9 ;; esac',
    "python3": 'case "$*" in *"bench run"*) exit 3 ;; *pytest*) sleep ${PYTEST_SLEEP:-0} ;; esac; echo "python3 $*"',
}


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A tree with the script, two cases and their sources, and stand-ins for the tools."""
    tree = tmp_path / "tree"
    for name in ("case_pool.cpp", "case_conv.cpp", "faults/faults_a.cpp", "conformance/ptx.cpp"):
        file = tree / "tests" / "cuda_on_cpu" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("// Sources: pool/a.cu\nint main() {}\n")
    (tree / "kernels" / "pool").mkdir(parents=True)
    (tree / "kernels" / "pool" / "a.cu").write_text("")
    shutil.copy(ROOT / SCRIPT, tree / SCRIPT)
    for name, body in TOOLS.items():
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)
    return tree


def run(tree: Path, *steps: str, **variables: str) -> tuple[int, str]:
    path = f"{tree.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", SCRIPT, "logs", *steps],
        cwd=tree,
        env={**os.environ, "PATH": path, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, (tree / "logs" / "summary.txt").read_text() if (tree / "logs").exists() else done.stderr


def test_a_failed_step_does_not_stop_the_others(machine: Path) -> None:
    status, summary = run(machine)
    words = {line.split()[0]: line.split()[1] for line in summary.splitlines() if line.endswith(" s")}
    assert words == {
        "build": "ok",
        "conformance": "ok",
        "pytest": "ok",
        "streams": "ok",
        "sanitizer": "FAILED",  # racecheck of case_pool
        "bench": "FAILED",
    }
    assert status == 2
    assert summary.endswith("2 failed\n")
    assert "ran case_conv" in (machine / "logs" / "conformance.log").read_text()
    sanitizer = (machine / "logs" / "sanitizer.log").read_text()
    assert "FAILED racecheck case_pool" in sanitizer
    assert "ok     synccheck case_pool" in sanitizer


def test_a_part_runs_alone_and_a_broken_case_is_named(machine: Path) -> None:
    (machine / "tests" / "cuda_on_cpu" / "case_broken.cpp").write_text("// Sources: pool/a.cu\n")
    status, summary = run(machine, "conformance", "nonsense")
    assert status == 2
    assert "unknown step: nonsense" in summary
    log = (machine / "logs" / "conformance.log").read_text()
    assert "FAILED case_broken" in log
    assert "ran case_pool" in log
    assert not (machine / "logs" / "bench.log").exists()


def test_a_step_that_takes_too_long_is_cut_off(machine: Path) -> None:
    status, summary = run(machine, "pytest", "bench", BUDGET="2", PYTEST_SLEEP="30")
    assert status == 2
    assert "FAILED (over" in summary
    assert "bench: left out, the time is up" in summary


def test_a_machine_without_a_device_says_so(machine: Path) -> None:
    for tool in ("nvidia-smi", "compute-sanitizer"):
        (machine.parent / "bin" / tool).unlink()
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a device")
    status, summary = run(machine, "conformance", "sanitizer")
    assert "no CUDA device" in summary
    assert "missing: nvidia-smi" in summary
    assert status == 1  # what compiles has compiled
