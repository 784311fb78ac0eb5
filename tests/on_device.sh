#!/usr/bin/env bash
# Everything a machine with a CUDA device can tell, in one command: build, conformance of every kernel with its oracle,
# the test-suite, compute-sanitizer, benchmarks. Nothing is downloaded: it uses the python3 in PATH (torch with CUDA,
# pybind11, numpy, pytest, hypothesis) and nvcc.
#
#   tests/on_device.sh RESULTS_FOLDER [step ...]      steps: build conformance pytest streams sanitizer bench
#                                                     (default: all, in this order; `make gpu STEPS="build bench"`)
#
# A failed step does not stop the others; the exit status is the number of failed steps. Each step has a time limit, and
# its log in RESULTS_FOLDER; summary.txt there says what passed. All of them share BUDGET seconds (default: 600).
set -u
cd "$(dirname "$0")/.."
out=${1:?usage: tests/on_device.sh RESULTS_FOLDER [step ...]}
shift
all_steps="build conformance pytest streams sanitizer bench"
steps=${*:-$all_steps}
mkdir -p "$out" build/device
out=$(cd "$out" && pwd)
failed=0
: >"$out/summary.txt"
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

deadline=$(($(date +%s) + ${BUDGET:-600}))

say() { echo "$*" | tee -a "$out/summary.txt"; }

for tool in python3 nvcc nvidia-smi compute-sanitizer; do
    command -v "$tool" >/dev/null || say "missing: $tool (steps that need it will fail)"
done
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')
[ "$arch" = 90 ] && arch=90a
# Without a device the sources still compile, for Hopper.
[ -n "$arch" ] || { say "no CUDA device: nvidia-smi names none"; arch=90a; }
export PYSEQNET_CUDA_ARCHS=${PYSEQNET_CUDA_ARCHS:-$arch}
jobs=${MAX_JOBS:-$(nproc)}

# step NAME SECONDS COMMAND...: runs it under a time limit, with its output in a log
step() {
    local name=$1 limit=$2 start status words
    shift 2
    start=$(date +%s)
    [ $((deadline - start)) -lt "$limit" ] && limit=$((deadline - start))
    if [ "$limit" -lt 1 ]; then
        say "$name: left out, the time is up"
        failed=$((failed + 1))
        return
    fi
    timeout -k 10 "$limit" bash -c '"$@"' bash "$@" >"$out/$name.log" 2>&1  # a shell, since timeout knows no functions
    status=$?
    words=ok
    [ $status = 0 ] || words="FAILED ($status)"
    [ $status = 124 ] && words="FAILED (over $limit s)"
    say "$(printf '%-14s %-20s %4d s' "$name" "$words" $(($(date +%s) - start)))"
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
object_of() { # kernels/pool/max_pool_generic.cu -> build/device/kernels-pool-max_pool_generic.cu.o
    echo "build/device/${1//\//-}.o"
}
program() { # source with a main() [more sources]: links and runs it
    local name source objects=()
    name=$(basename "$1" .cpp)
    for source in "$@"; do objects+=("$(object_of "$source")"); done
    echo "== $name"
    nvcc "${objects[@]}" -o "build/device/$name" && timeout 120 "build/device/$name" && return 0
    echo "FAILED $name"
    return 1
}
conformance() {
    local status=0 source sources=(kernels/*/*_reference.cpp kernels/*/*.cu)
    rm -rf build/device && mkdir -p build/device
    sources+=(tests/cuda_on_cpu/case_*.cpp tests/cuda_on_cpu/faults/faults_*.cpp tests/cuda_on_cpu/conformance/*.cpp)
    for source in "${sources[@]}"; do
        [ -e "$source" ] && printf '%s\0%s\0' "$source" "$(object_of "$source")"
    done | xargs -0 -n 2 -P "$jobs" bash -c 'compile "$@"' bash
    # What each PTX wrapper does, held against stored results; the simulator's own kernels, without their faults.
    for source in tests/cuda_on_cpu/conformance/*.cpp tests/cuda_on_cpu/faults/faults_*.cpp; do
        [ -e "$source" ] || continue
        program "$source" || status=1
    done
    for source in tests/cuda_on_cpu/case_*.cpp; do
        # shellcheck disable=SC2046
        program "$source" $(sed -n 's|^// Sources:||p' "$source" | tr ' ' '\n' | sed -n 's|^..*$|kernels/&|p') || status=1
    done
    return $status
}

# Small problems, four at a time: the tools slow a kernel down by ten to a hundred.
sanitize_one() { # tool program
    local name log
    name=$(basename "$2")
    log=$out/sanitizer/$1-$name.log
    timeout 100 compute-sanitizer --tool "$1" --error-exitcode 9 "$2" --seeds 1 --random 3 >"$log" 2>&1 &&
        echo "ok     $1 $name" && return 0
    echo "FAILED $1 $name: $log"
    tail -n 8 "$log"
    return 1
}
sanitizer() {
    local tool case cases=(build/device/case_*)
    [ -x "${cases[0]}" ] || { echo "there are no cases: run the step conformance first"; return 1; }
    mkdir -p "$out/sanitizer"
    for tool in memcheck racecheck synccheck; do
        for case in "${cases[@]}"; do printf '%s\0%s\0' $tool "$case"; done
    done | xargs -0 -n 2 -P 4 bash -c 'sanitize_one "$@"' bash  # xargs fails if one of them does
}

run_pytest() { python3 -m pytest -q --maxfail=30 -p no:cacheprovider --durations=10 "$@"; }

# Into bench/results/ and the tables made of it, with a copy beside the logs.
bench() {
    python3 -m bench run --device cuda --no-compile --json "$out/cuda.json"
    local status=$? device
    device=$(python3 -c 'import json, sys; from bench import machine
print(machine.results_file(json.load(open(sys.argv[1]))["meta"]))' "$out/cuda.json") &&
        cp "$out/cuda.json" "$device" && python3 -m bench readme
    return $status
}

export -f build compile object_of program conformance sanitize_one sanitizer run_pytest bench
export arch out jobs
for name in $steps; do
    case $name in
        build) step build 200 build ;;
        conformance) step conformance 200 conformance ;;
        pytest) step pytest 200 run_pytest --ignore tests/test_cuda_on_cpu.py --ignore tests/test_streams.py -k cuda tests ;;
        streams) step streams 60 run_pytest -m cuda tests/test_streams.py ;;
        sanitizer) step sanitizer 150 sanitizer ;;
        bench) step bench 240 bench ;;
        *) say "unknown step: $name (there are: $all_steps)"; failed=$((failed + 1)) ;;
    esac
done
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv 2>/dev/null | tee "$out/device.txt"
say "$failed failed"
exit $failed
