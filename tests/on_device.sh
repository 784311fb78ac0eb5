#!/usr/bin/env bash
# Everything a machine with a CUDA device can tell, in one command: build, conformance of every kernel with its oracle,
# the test-suite, compute-sanitizer, benchmarks. Nothing is downloaded: it uses the python3 in PATH (torch with CUDA,
# pybind11, numpy, pytest, hypothesis) and nvcc.
#
#   tests/on_device.sh RESULTS_FOLDER [step ...]      steps: build conformance pytest sanitizer bench (default: all)
#
# A failed step does not stop the others; the exit status is the number of failed steps. Logs go to RESULTS_FOLDER.
set -u
cd "$(dirname "$0")/.."
out=${1:?usage: tests/on_device.sh RESULTS_FOLDER [step ...]}
shift
steps=${*:-build conformance pytest sanitizer bench}
mkdir -p "$out" build/device
failed=0
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
[ "$arch" = 90 ] && arch=90a
export PYSEQNET_CUDA_ARCHS=${PYSEQNET_CUDA_ARCHS:-$arch}

# step NAME SECONDS COMMAND...: runs it under a time limit, with its output in a log
step() {
    local name=$1 limit=$2 start status
    shift 2
    start=$(date +%s)
    timeout "$limit" bash -c '"$@"' bash "$@" >"$out/$name.log" 2>&1  # a shell, since timeout knows no functions
    status=$?
    printf '%-14s %s  %4d s\n' "$name" "$([ $status = 0 ] && echo ok || echo "FAILED ($status)")" $(($(date +%s) - start))
    if [ $status != 0 ]; then
        failed=$((failed + 1))
        tail -n 25 "$out/$name.log"
    fi
}

build() { python3 setup.py build_ext --inplace; }

# The simulator's cases, compiled for the device: the same comparison with the oracle, on real hardware.
compile() { # source object
    nvcc -x cu -std=c++20 -O2 -Ikernels -Itests/cuda_on_cpu -gencode "arch=compute_$arch,code=sm_$arch" \
        "-DPYSEQNET_CUDA_ARCHS=\"$arch\"" -c "$1" -o "$2" || echo "COMPILE FAILED $1"
}
conformance() {
    local status=0 source name object objects=()
    rm -rf build/device && mkdir -p build/device
    for source in kernels/*/*_reference.cpp kernels/*/*.cu; do
        object=build/device/$(basename "$source").o
        objects+=("$object")
        compile "$source" "$object" &
    done
    for source in tests/cuda_on_cpu/case_*.cpp tests/cuda_on_cpu/faults/faults_*.cpp; do
        compile "$source" "build/device/$(basename "$source" .cpp).main.o" &
    done
    wait
    for source in tests/cuda_on_cpu/case_*.cpp; do
        name=$(basename "$source" .cpp)
        echo "== $name"
        nvcc "build/device/$name.main.o" "${objects[@]}" -o "build/device/$name" && "build/device/$name" ||
            { echo "FAILED $name"; status=1; }
    done
    # The simulator's own kernels, without their faults: what it believes of each PTX wrapper, held against the device.
    for source in tests/cuda_on_cpu/faults/faults_*.cpp; do
        name=$(basename "$source" .cpp)
        echo "== $name"
        nvcc "build/device/$name.main.o" -o "build/device/$name" && timeout 60 "build/device/$name" ||
            { echo "FAILED $name"; status=1; }
    done
    return $status
}

sanitizer() {
    local status=0 tool case
    for case in build/device/case_*[!o]; do
        for tool in memcheck racecheck initcheck synccheck; do
            echo "== compute-sanitizer $tool $(basename "$case")"
            timeout 100 compute-sanitizer --tool "$tool" --error-exitcode 9 "$case" 2>&1 | tail -n 15
            [ "${PIPESTATUS[0]}" = 0 ] || status=1
        done
    done
    return $status
}

# Into bench/results/ and the tables made of it, with a copy beside the logs.
bench() {
    python3 -m bench run --device cuda --no-compile --json "$out/cuda.json"
    local status=$? device
    device=$(python3 -c 'import json, sys; from bench import machine
print(machine.results_file(json.load(open(sys.argv[1]))["meta"]))' "$out/cuda.json") &&
        cp "$out/cuda.json" "$device" && python3 -m bench readme
    return $status
}

export -f build compile conformance sanitizer bench
export arch out
for name in $steps; do
    case $name in
        build) step build 400 build ;;
        conformance) step conformance 300 conformance ;;
        pytest) step pytest 500 python3 -m pytest -q --maxfail=30 -p no:cacheprovider --durations=10 \
            --ignore tests/test_cuda_on_cpu.py -k cuda tests ;;
        sanitizer) step sanitizer 400 sanitizer ;;
        bench) step bench 500 bench ;;
        *) echo "unknown step: $name"; failed=$((failed + 1)) ;;
    esac
done
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv | tee "$out/device.txt"
exit $failed
