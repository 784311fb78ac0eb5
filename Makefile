# make demo      trains and tests three models on real data, writes demo_report/index.html
# make test      lint, C++ tests, Python tests
# make lint      ruff, mypy, clang-format
# make sanitize  C++ tests and a Python smoke run with the address and undefined-behaviour sanitizers
# make docs      the documentation, from pages and docstrings: build/docs/index.html
# make fuzz      random problems over all functions, dtypes, layouts and kernels for FUZZ_SECONDS (600)
# make kernels   every CUDA kernel for every architecture: registers, spills, instructions (build/kernels.md)
# make gpu       on a machine with an NVIDIA GPU: build, conformance, tests, compute-sanitizer, benchmarks
#                (STEPS="conformance bench" for some of them)
# make bench     a quick benchmark; BENCH="--family pool --json" for another
# make build     the environment and the extension alone
# make clean     removes what was built, not the environment
#
# Each sets up what it needs: an environment in .venv, then an editable build. Done once; a changed source is
# compiled again, the rest is kept. Variables: PYTHON, VENV, TORCH, MAX_JOBS, and those that setup.py reads.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BENCH ?= --quick

PY := $(VENV)/bin/python
BUILT := $(VENV)/.built
SOURCES := $(shell find kernels csrc -type f) setup.py pyproject.toml
CXX_FILES = $(shell find kernels csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
MAX_JOBS ?= $(shell nproc)
export MAX_JOBS
# Whatever pip installs or builds in isolation, torch stays the one above.
export PIP_CONSTRAINT := $(abspath $(VENV))/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint test-cpp test-python sanitize docs fuzz kernels gpu bench build clean

demo: $(BUILT)
	OMP_WAIT_POLICY=passive $(PY) -m pyseqnet.demo --out demo_report

# A file of tests at a time in each of MAX_JOBS processes; threads of a process sleep while they wait for each other.
PYTEST := OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(MAX_JOBS) --dist loadfile

# ctest has just run the C++ programs that tests/test_kernels_cpp.py would compile again.
test: lint test-cpp
	$(PYTEST) --ignore=tests/test_kernels_cpp.py

lint: $(BUILT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

test-cpp: $(BUILT)
	$(call ctest,build/cmake,-DPYSEQNET_CUDA=OFF)

test-python: $(BUILT)
	$(PYTEST)

sanitize: $(BUILT)
	$(call ctest,build/cmake-sanitize,-DPYSEQNET_SANITIZE=ON)
	PYSEQNET_SANITIZE=1 $(PY) setup.py --quiet build --build-lib build/sanitize
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  PYTHONPATH=build/sanitize $(PY) tests/sanitize_smoke.py

docs: $(BUILT)
	$(PY) -m sphinx -q -W --keep-going -b html docs build/docs

FUZZ_SECONDS ?= 600
fuzz: $(BUILT)
	@mkdir -p build
	PYTHONWARNINGS=ignore OMP_WAIT_POLICY=passive $(PY) tests/fuzz.py --seconds $(FUZZ_SECONDS) --log build/fuzz.jsonl

# Where there is no CUDA toolkit its compiler comes from PyPI.
KERNEL_TOOLS := 'nvidia-cuda-nvcc~=13.0' 'nvidia-cuda-nvdisasm~=13.0'
kernels: $(BUILT)
	@$(PY) tests/kernel_report.py --tools || $(PY) -m pip install --quiet $(KERNEL_TOOLS)
	$(PY) tests/kernel_report.py

# With the python3 of PATH and its torch for CUDA; downloads nothing.
GPU_LOGS ?= build/gpu
STEPS ?=
gpu:
	bash tests/on_device.sh $(GPU_LOGS) $(STEPS)

bench: $(BUILT)
	$(PY) -m bench run $(BENCH)

build: $(BUILT)

clean:
	rm -rf build dist demo_report *.egg-info pyseqnet/_C*.so $(BUILT) .pytest_cache .mypy_cache .ruff_cache .hypothesis

# $(call ctest,folder,options): kernels/ alone, without torch
define ctest
	$(VENV)/bin/cmake -S . -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja -DCMAKE_BUILD_TYPE=Release $(2)
	$(VENV)/bin/cmake --build $(1) -j $(MAX_JOBS)
	$(VENV)/bin/ctest --test-dir $(1) --output-on-failure
endef

# The stamp is as old as the start of the build: what changes meanwhile is compiled next time.
# With nvcc, a tree to work in is built for one architecture (and PTX); an installed package for all: setup.py.
$(BUILT): $(SOURCES) | $(VENV)/.torch
	@echo 'building pyseqnet, $(MAX_JOBS) compilers at a time (minutes the first time) ...'
	@touch $@.started
	PYSEQNET_CUDA_ARCHS="$${PYSEQNET_CUDA_ARCHS:-90a}" \
	  $(PY) -m pip install --quiet --no-build-isolation -e '.[demo,bench,test,lint]'
	@$(PY) -c 'import pyseqnet; print("built:", *(f"{k}={v}" for k, v in pyseqnet.build_info().items()))'
	@mv $@.started $@

$(VENV)/.torch: | $(PY)
	@mkdir -p $(VENV) && echo '$(TORCH)' > $(PIP_CONSTRAINT)
	@echo 'installing $(TORCH) and the build tools ...'
	$(PY) -m pip install --quiet '$(TORCH)' numpy 'setuptools>=77' wheel ninja pybind11
	@touch $@

# A bare Debian or Ubuntu has neither venv nor Python's headers: as root they are installed, else asked for.
HAS_PYTHON_PARTS = $(PYTHON) -c 'import ensurepip, os, sysconfig as s; open(os.path.join(s.get_path("include"), "Python.h"))' 2>/dev/null
$(PY):
	@command -v $(PYTHON) >/dev/null || { echo 'python3 is missing'; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || { echo 'a C++ compiler is missing: install g++'; exit 1; }
	@$(HAS_PYTHON_PARTS) || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && echo 'installing python3-venv and python3-dev ...' && apt-get -qq update \
	  && apt-get -qq install -y python3-venv python3-dev >/dev/null && $(HAS_PYTHON_PARTS); } \
	  || { echo "$(PYTHON) lacks venv or its headers. On Debian or Ubuntu: sudo apt-get install python3-venv python3-dev"; exit 1; }
	$(PYTHON) -m venv $(VENV)
