"""What an installed copy promises: which symbols it needs, what importing does, what it says about itself."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from support import ROOT, run_python

import pyseqnet
from pyseqnet import _C

BINARY = Path(_C.__file__)


def tool(*command: str) -> str:
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} (binutils) is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def undefined_symbols() -> list[str]:
    listing = tool("nm", "-D", "--undefined-only", str(BINARY))
    return [line.split()[-1].split("@")[0] for line in listing.splitlines() if line.strip()]


def test_only_the_stable_interface_of_torch_is_used() -> None:
    """One binary serves every later torch, so nothing of torch's C++ may be named."""
    symbols = undefined_symbols()
    assert any(name.startswith("aoti_torch_") for name in symbols)
    torch_like = re.compile(r"torch|c10|at6|2at|caffe|^_ZN?K?2at|pybind11.*torch", re.IGNORECASE)
    strays = [name for name in symbols if torch_like.search(name) and not name.startswith(("aoti_torch_", "torch_"))]
    assert not strays


def test_the_symbols_that_are_needed_come_from_known_places() -> None:
    """C++ names that are not the C++ runtime's would be somebody else's C++ interface."""
    mangled = [name for name in undefined_symbols() if name.startswith("_Z")]
    # std:: and its members, operator new and delete, type information of the language's own types
    runtime = re.compile(r"_Z(TI[a-z]$|(T[VTIS])?(N[VKRO]*)?(S[tabiods]|9__gnu_cxx|N?10__cxxabiv1|n[aw]|d[al]))")
    strays = [name for name in mangled if not runtime.match(name)]
    assert not strays


def test_no_cuda_library_is_needed_to_load() -> None:
    needed = re.findall(r"NEEDED.*\[(.+)\]", tool("readelf", "-d", str(BINARY)))
    assert needed
    forbidden = re.compile(r"cuda|cublas|cudnn|libnv|libtorch_python", re.IGNORECASE)
    assert not [name for name in needed if forbidden.search(name)]


def test_only_the_module_initialiser_is_exported() -> None:
    """Kernels of the same name in another extension must not be able to replace ours."""
    listing = tool("nm", "-D", "--defined-only", str(BINARY))
    strong = [line.split()[-1] for line in listing.splitlines() if re.search(r" [TDB] ", line)]
    assert "PyInit__C" in strong
    assert not [name for name in strong if "conv" in name or "max_pool" in name]


def test_importing_makes_no_cuda_call() -> None:
    result = run_python(
        "import torch\n"
        "def refuse(*args, **kwargs): raise SystemExit('CUDA was touched at import')\n"
        "torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = refuse\n"
        "torch._C._cuda_init = torch._C._cuda_getDeviceCount = refuse\n"
        "import pyseqnet, pyseqnet.nn, pyseqnet.functional as F\n"
        "pyseqnet.build_info()\n"
        "F.max_pool2d(F.conv2d(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 3, 3)), 2)\n"
        "print('initialized', torch.cuda.is_initialized())\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "initialized False"


def test_importing_needs_torch_and_numpy_alone() -> None:
    result = run_python(
        "import sys\n"
        "import torch\n"
        "before = set(sys.modules)\n"
        "import pyseqnet, pyseqnet.nn, pyseqnet.functional, pyseqnet.models\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "print(sorted(new - {'torch', 'numpy', 'pyseqnet'}))\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_without_the_binary_the_error_says_how_to_build(tmp_path: Path) -> None:
    shutil.copytree(
        Path(pyseqnet.__file__).parent, tmp_path / "pyseqnet", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    # an editable install puts a finder of its own before sys.path
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "sys.meta_path = [f for f in sys.meta_path if '__editable__' not in str(getattr(f, '__module__', ''))]; "
        "import pyseqnet"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode != 0
    assert "ImportError" in result.stderr
    assert "pip install -e . --no-build-isolation" in result.stderr


def test_build_info() -> None:
    info = pyseqnet.build_info()
    kinds = {
        "version": str, "cuda": bool, "archs": str, "nvcc": str, "cpu_isa": str, "cpu_isa_detected": str,
        "cpu_isas_built": str, "torch_target": str, "torch": str, "compiler": str,
    }  # fmt: skip
    assert set(info) == set(kinds)
    assert all(isinstance(info[name], kind) for name, kind in kinds.items())
    assert info["torch_target"] == "2.10"
    assert info["cpu_isa"] in ("portable", "avx2", "avx512", "avx512bf16")
    assert bool(info["archs"]) == bool(info["nvcc"]) == info["cuda"]
    pyseqnet.build_info().clear()
    assert pyseqnet.build_info() == info


def test_version_is_the_projects() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"$', text, re.MULTILINE)[1] == pyseqnet.__version__


def test_types_are_shipped() -> None:
    package = resources.files("pyseqnet")
    assert (package / "py.typed").is_file()
    assert (package / "_C.pyi").is_file()
    stub = (package / "_C.pyi").read_text()
    for name in dir(_C):
        if not name.startswith("_"):
            assert f"def {name}(" in stub


def test_public_names_exist_and_are_documented() -> None:
    for module in (pyseqnet, pyseqnet.functional, pyseqnet.nn):
        assert module.__doc__
        for name in module.__all__:
            member = getattr(module, name)
            assert name.startswith("__") or member.__doc__, f"{module.__name__}.{name} has no docstring"
    for name in pyseqnet.functional.__all__:
        if not name.endswith("_reference"):
            assert "Equivalent to::" in getattr(pyseqnet.functional, name).__doc__
            assert f"{name}_reference" in pyseqnet.functional.__all__


def test_probes_measure_something() -> None:
    assert _C.fma_gflops(0.01) > 0
    assert _C.copy_gbps(0.01, 1 << 20) > 0
    with pytest.raises(ValueError, match="bytes must be positive"):
        _C.copy_gbps(0.01, 0)
