"""The benchmark command: formulas, verdicts, and that a wrong result is a failed row."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import ROOT

from bench import compare, run, timing
from bench.accuracy import judge
from bench.case import DTYPES
from bench.cases import all_cases, families
from bench.timing import Timing, change

CASES = {f"{case.family}/{case.name}": case for case in all_cases()}


@pytest.fixture(autouse=True)
def _torch_settings() -> Iterator[None]:
    """A run sets torch's switches for its process; here others follow."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32
    yield
    cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32 = before


def selection(**changes: object) -> run.Selection:
    base = run.Selection(
        families=[],
        pattern="2x2_single",
        modes=["fwd", "fwdbwd"],
        dtypes=[],
        device=torch.device("cpu"),
        quick=True,
        compile=False,
        threads=torch.get_num_threads(),
    )
    return dataclasses.replace(base, **changes)


def test_every_family_has_cases_with_their_own_names() -> None:
    assert families() == [
        "additive_attention",
        "attention",
        "chain",
        "conv",
        "conv_relu_pool",
        "efficient",
        "generation",
        "linear_attention",
        "pool",
        "recurrent",
    ]
    assert len(CASES) == len(all_cases())


def test_costs_follow_the_formulas() -> None:
    conv = CASES["conv/dense_64_56"]
    image, filters = 4 * 64 * 56 * 56, 64 * 64 * 9
    assert conv.forward.flops == 2 * image * 64 * 9
    assert conv.cost("fwdbwd").flops == 3 * conv.forward.flops
    assert conv.forward.bytes(torch.float32) == 4 * (2 * image + filters + 64)
    pool = CASES["pool/2x2_64_32"]
    image = 32 * 64 * 32 * 32
    assert pool.forward.bytes(torch.bfloat16) == 2 * (image + image // 4)
    # a step also writes and reads one byte of argmax an output
    assert pool.cost("fwdbwd").bytes(torch.bfloat16) == 2 * pool.forward.bytes(torch.bfloat16) + 2 * (image // 4)


@pytest.mark.parametrize("name", ["conv/single_64_14", "conv/text1d_300_100_k5", "pool/2x2_single_64_14"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_right_results_pass_and_wrong_ones_do_not(name: str, dtype: str) -> None:
    case = CASES[name]
    inputs = case.inputs(DTYPES[dtype], torch.device("cpu"))
    assert not judge(case, inputs, "fwdbwd").fault
    factor = 1 + 64 * torch.finfo(DTYPES[dtype]).eps
    wrong = dataclasses.replace(case, ours=lambda **tensors: case.torch(**tensors) * factor)
    assert "output" in judge(wrong, inputs, "fwd").fault
    invalid = dataclasses.replace(case, ours=lambda **tensors: case.torch(**tensors) * float("nan"))
    assert judge(invalid, inputs, "fwdbwd").fault


def test_a_wrong_row_fails_the_run(tmp_path, capsys) -> None:
    case = CASES["pool/2x2_single_64_14"]
    path = tmp_path / "rows.json"
    assert run.run([case], selection(), str(path)) == 0
    wrong = dataclasses.replace(case, ours=lambda input: case.torch(input) + 1)
    assert run.run([wrong], selection(modes=["fwd"]), None) == 1
    assert "WRONG" in capsys.readouterr().out
    results = json.loads(path.read_text())
    assert [row["mode"] for row in results["rows"]] == ["fwd", "fwdbwd"]
    assert {"torch", "cuda", "device", "cpu", "isa", "threads", "commit", "date"} <= results["meta"].keys()
    assert compare.compare(str(path), str(path)) == 0
    assert "2 SAME" in capsys.readouterr().out


def test_a_gpu_flushes_its_cache_before_each_repetition_and_pauses(monkeypatch) -> None:
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("event")

        def synchronize(self) -> None:
            happened.append("wait")

        def elapsed_time(self, stop: Event) -> float:
            return 4.0  # milliseconds

    class Cache:
        def zero_(self) -> None:
            happened.append("flush")

    sizes: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1000))
    monkeypatch.setattr(timing.torch, "empty", lambda size, dtype, device: sizes.append(size) or Cache())
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: happened.append(f"sleep {seconds:g}"))
    clock = timing.CudaClock(torch.device("cuda"))
    assert sizes == [2000]
    assert clock.time(lambda i: happened.append(f"step {i}"), 5, 2) == pytest.approx(4e-3)
    assert happened == ["flush", "event", "step 5", "event", "flush", "event", "step 6", "event", "wait"]
    happened.clear()
    clock.rest(2.0)
    assert happened == ["sleep 0.5"]


def test_a_change_must_exceed_the_noise() -> None:
    quiet, noisy = Timing(1.0, 0.99, 1.01, 25), Timing(1.0, 0.5, 2.0, 9)
    assert change(0.8, [quiet, quiet])[0] == "FASTER"
    assert change(1.25, [quiet, quiet])[0] == "SLOWER"
    assert change(1.02, [quiet, quiet])[0] == "SAME"
    assert change(1.25, [quiet, noisy])[0] == "SAME"
    assert change(0.03, [quiet, noisy])[0] == "FASTER"


def test_the_command_lists_refuses_and_pins_threads() -> None:
    def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bench", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    listed = bench("list", "--family", "pool", "--dtype", "f16", "--mode", "fwd")
    assert listed.returncode == 0
    assert "pool/2x2_64_32 " in listed.stdout
    assert "conv/" not in listed.stdout
    assert bench("run", "--family", "nonsense").returncode == 2
    told = bench("info", "--threads", "2").stdout
    assert re.search(r"^threads +2$", told, re.MULTILINE)
    assert re.search(r"^omp_wait_policy +passive$", told, re.MULTILINE)


def test_curves_of_time_and_memory(tmp_path: Path) -> None:
    """Crossovers are where lines of known slopes meet; such rows are drawn; a step's peak is what it holds."""
    from bench.curves import crossover, curves, measured_crossover
    from bench.memory import peak_bytes

    assert (crossover(64, 64), round(crossover(64, 128), 1)) == (64, 85.3)  # G5
    dense, linear = ({n: cost * n**power for n in (256, 1024, 4096)} for cost, power in ((1.0, 2), (512.0, 1)))
    assert measured_crossover(dense, linear) == pytest.approx(512)
    assert measured_crossover(linear, dense) is None

    rows = [
        {"family": "efficient", "mode": "fwdbwd", "dtype": "f32", "name": f"{name}_{n}",
         "times": {"ours": {"median": seconds}}, "peak_bytes": {"ours": 1000 * n}}
        for name, line in (("dense", dense), ("linear", linear))
        for n, seconds in line.items()
    ]  # fmt: skip
    file = tmp_path / "here.json"
    file.write_text(json.dumps({"meta": {"device": "a machine", "threads": 1, "date": "today"}, "rows": rows}))
    assert curves(file) == tmp_path / "here-efficient.png"
    assert (tmp_path / "here-efficient.png").stat().st_size > 10_000
    file.write_text(json.dumps({"meta": {}, "rows": []}))
    assert curves(file) is None

    held = 64 * 2**20
    found = peak_bytes(lambda i: torch.ones(held // 4).sum(), torch.device("cpu"))
    assert held - 2**20 <= found <= held + 8 * 2**20
    assert peak_bytes(lambda i: None, torch.device("cpu")) < 2**20


def test_a_quality_task_is_trained_and_told() -> None:
    from bench import quality

    found = quality.duplication_model("reformer-2", 1, 0)
    assert {"accuracy", "1 hashes", "8 hashes", "all pairs"} <= found.keys()
    results = {
        "duplication": {"reformer-2": {**found, "1 hashes": 0.5, "2 hashes": 0.8, "4 hashes": 0.9, "8 hashes": 0.9}},
        "characters": {"softmax": {"loss": 1.8, "parameters": 1}, "linear": {"loss": 2.1, "parameters": 1}},
    }
    told = [shown for _, _, shown in quality.claims(results)]
    assert told == [False, True, found["all pairs"] < 0.795]
    text = quality.table(results, {"duplication": 1, "characters": 1}, 0)
    assert "## duplication, length 64, 1 steps" in text
    assert "+0.300 nats | not shown |" in text


def test_list_operations_have_the_values_that_they_say() -> None:
    from bench import quality

    words = {number: word for word, number in quality.VOCABULARY.items()}
    tokens, values = quality.list_operations(200, 3)
    for row, value in zip(tokens.tolist(), values.tolist(), strict=True):
        stack: list = []
        for word in (words[n] for n in row if n):
            if word != "]":
                stack.append(int(word) if word.isdigit() else word)
                continue
            parts: list[int] = []
            while isinstance(stack[-1], int):
                parts.append(stack.pop())
            parts.sort()
            found = {"[MAX": parts[-1], "[MIN": parts[0], "[MED": parts[len(parts) // 2], "[SM": sum(parts) % 10}
            stack.append(found[stack.pop()])
        assert stack == [value]
    assert len(set(values.tolist())) == 10
