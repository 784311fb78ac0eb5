"""Runs cases: checks the result, times everybody in turn, prints one row each and keeps it for the JSON."""

from __future__ import annotations

import contextlib
import itertools
import json
import pathlib
import sys
from collections import Counter
from dataclasses import asdict, dataclass

import torch

from bench import machine, timing
from bench.accuracy import judge
from bench.case import DTYPES, Case, Function, Inputs
from bench.memory import peak_bytes

ROW_SECONDS, CUDA_ROW_SECONDS, QUICK_ROW_SECONDS = 1.5, 0.4, 0.3  # a GPU is quieter and dearer
FEWEST_ROUNDS, QUICK_FEWEST_ROUNDS = 7, 3
L2_CACHES = 2  # a GPU step's rotating inputs fill the second-level cache this many times over


@dataclass(frozen=True)
class Selection:
    families: list[str]
    pattern: str
    modes: list[str]
    dtypes: list[str]  # empty: those that each case lists
    device: torch.device
    quick: bool
    compile: bool  # time torch.compile, too
    threads: int


def pick(cases: list[Case], selection: Selection) -> list[tuple[Case, str, str]]:
    picked = []
    for case in cases:
        if selection.families and case.family not in selection.families:
            continue
        if selection.pattern not in case.name or selection.device.type not in case.devices:
            continue
        modes = [mode for mode in selection.modes if mode == "fwd" or case.gradients]  # decoding has forward alone
        picked.extend(itertools.product([case], selection.dtypes or case.dtypes, modes))
    return picked


def _step(function: Function, inputs: list[Inputs], gradients: tuple[str, ...]) -> timing.Step:
    """What is timed: the forward pass alone, or forward and all gradients."""
    if not gradients:

        def forward(i: int) -> object:
            with torch.no_grad():
                return function(**inputs[i % len(inputs)])

        return forward
    leaves, wanted = [], []
    for one in inputs:
        leaf = {name: tensor.detach().requires_grad_(name in gradients) for name, tensor in one.items()}
        leaves.append(leaf)
        wanted.append([leaf[name] for name in gradients])
    with torch.no_grad():
        grad_output = torch.ones_like(function(**leaves[0])).normal_()

    def training(i: int) -> object:
        output = function(**leaves[i % len(leaves)])
        return torch.autograd.grad(output, wanted[i % len(leaves)], grad_output)

    return training


def _rotating_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> list[Inputs]:
    first = case.inputs(dtype, device)
    if device.type != "cuda":
        return [first]
    held = sum(tensor.nbytes for tensor in first.values())
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    sets = min(64, 1 + L2_CACHES * cache // max(1, held))
    return [first] + [{name: tensor.clone() for name, tensor in first.items()} for _ in range(sets - 1)]


def _compiled(case: Case) -> Function:
    torch._dynamo.reset()
    return torch.compile(case.torch, fullgraph=True, dynamic=False)


def measure(
    case: Case,
    dtype_name: str,
    mode: str,
    device: torch.device,
    ceilings: machine.CpuCeilings | machine.CudaCeilings,
    *,
    quick: bool,
    compile: bool,
) -> dict[str, object]:
    dtype = DTYPES[dtype_name]
    inputs = _rotating_inputs(case, dtype, device)
    gradients = case.gradients if mode == "fwdbwd" else ()
    judgement = judge(case, inputs[0], mode)

    steps = {
        "ours": _step(case.ours, inputs, gradients),
        "eager": _step(case.torch, inputs, gradients),
    }
    notes = []
    if compile:
        try:
            steps["compile"] = _step(_compiled(case), inputs, gradients)
            steps["compile"](0)
        except Exception as error:  # a baseline that cannot be had is said, never hidden
            steps.pop("compile", None)
            notes.append(f"torch.compile failed: {type(error).__name__}")
    if case.user:
        prepared = [case.user.prepare(one) for one in inputs]
        steps["user"] = _step(case.user.function, prepared, gradients)

    seconds = QUICK_ROW_SECONDS if quick else CUDA_ROW_SECONDS if device.type == "cuda" else ROW_SECONDS
    rounds = QUICK_FEWEST_ROUNDS if quick else FEWEST_ROUNDS
    peaks = {label: peak_bytes(step, device) for label, step in steps.items()} if case.memory else {}
    times = timing.interleaved(steps, device, seconds, rounds)
    cost = case.cost(mode)
    moved = cost.bytes(dtype)
    ceiling = ceilings.of(cost.flops, moved, dtype)
    ours = times["ours"].median
    verdict, _ = timing.change(ours / times["eager"].median, [times["ours"], times["eager"]])
    return {
        "family": case.family,
        "name": case.name,
        "shapes": case.shapes,
        "dtype": dtype_name,
        "mode": mode,
        "times": {label: asdict(value) for label, value in times.items()},
        **({"peak_bytes": peaks} if peaks else {}),
        "speedup": {label: value.median / ours for label, value in times.items() if label != "ours"},
        "verdict": verdict,  # against torch eager
        "user": case.user.label if case.user else None,
        "flops": cost.flops,
        "bytes": moved,
        "gflops": cost.flops / ours * 1e-9,
        "gbps": moved / ours * 1e-9,
        "ceiling": {**asdict(ceiling), "fraction": ceiling.seconds / ours},
        "error": judgement.error,
        "torch_error": judgement.torch_error,
        "fault": judgement.fault,
        "notes": notes,
    }


LEGEND = """+-: inter-quartile range. eager, compile, user: how many times faster ours is.
ceiling: the time that the measured peaks allow over our time; operations count as for direct convolution.
error: the largest, relative to the largest value of the exact result.
"""
HEADER = (
    f"{'case':<36}{'dtype':>6}{'mode':>8}{'ours ms':>10}{'+-':>6}{'eager':>8}{'compile':>8}{'user':>8}"
    f"{'GFLOP/s':>9}{'GB/s':>7}{'ceiling':>14}{'error':>9}  result"
)


def format_row(row: dict) -> str:
    def ratio(label: str) -> str:
        return f"{row['speedup'][label]:.2f}x" if label in row["speedup"] else "-"

    ours = row["times"]["ours"]
    result = f"WRONG: {row['fault']}" if row["fault"] else f"ok {row['verdict']}"
    ceiling = f"{row['ceiling']['fraction']:.0%} {row['ceiling']['bound']}"
    return (
        f"{row['family'] + '/' + row['name']:<36}{row['dtype']:>6}{row['mode']:>8}"
        f"{ours['median'] * 1e3:>10.3f}{(ours['upper'] - ours['lower']) / ours['median']:>6.0%}"
        f"{ratio('eager'):>8}{ratio('compile'):>8}{ratio('user'):>8}"
        f"{row['gflops']:>9.1f}{row['gbps']:>7.1f}{ceiling:>14}{row['error']:>9.1e}"
        f"  {' '.join([result, *row['notes']])}"
    )


def run(cases: list[Case], selection: Selection, json_path: str | None) -> int:
    torch.set_num_threads(selection.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, for everybody
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # the best that torch can do
    picked = pick(cases, selection)
    if not picked:
        print("no case matches; see `python -m bench list`", file=sys.stderr)
        return 2
    meta = machine.describe(selection.device, selection.threads)
    ceilings = machine.ceilings(selection.device, selection.threads)
    meta |= {"fp32_gflops": ceilings.gflops, "copy_gbps": ceilings.copy_gbps, "quick": selection.quick}
    print(summary_line(meta))
    if selection.quick:
        print("quick: few samples")
    if not selection.compile:
        print("torch.compile is left out: it takes seconds a row to build")
    print(LEGEND)
    print(HEADER)
    path = None if json_path is None else pathlib.Path(json_path) if json_path else machine.results_file(meta)
    rows: list[dict] = []
    for number, (case, dtype, mode) in enumerate(picked, 1):
        with _progress(f"{number}/{len(picked)} {case.family}/{case.name} {dtype} {mode}"):
            row = measure(
                case, dtype, mode, selection.device, ceilings, quick=selection.quick, compile=selection.compile
            )
        print(format_row(row), flush=True)
        rows.append(row)
        if path:  # after every row: what a long run has measured is not lost when it is cut off
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")
    wrong = sum(bool(row["fault"]) for row in rows)
    words = Counter(row["verdict"] for row in rows)
    beside = ", ".join(f"{words[word]} {word}" for word in ("FASTER", "SAME", "SLOWER"))
    print(f"\n{len(rows)} rows, {wrong} wrong; beside torch eager: {beside}")
    if path:
        print(f"written: {path}")
    return 1 if wrong else 0


def summary_line(meta: dict) -> str:
    where = f"{meta['device']}"
    if meta["device_type"] == "cpu":
        where += f" ({meta['isa']}), {meta['threads']} thread{'s' if meta['threads'] != 1 else ''}"
    return (
        f"{where}: {meta['fp32_gflops']:.0f} GFLOP/s fp32 and {meta['copy_gbps']:.0f} GB/s copy measured. "
        f"torch {meta['torch']}, pyseqnet {meta['pyseqnet']} at {meta['commit'] or 'no commit'}"
        f"{' with changes' if meta['modified'] else ''}, {meta['date']}"
    )


@contextlib.contextmanager
def _progress(words: str):
    """What is being measured, on a terminal only; the row then takes its place."""
    tty = sys.stderr.isatty()
    if tty:
        print(f"\r\x1b[2K{words}", end="", file=sys.stderr, flush=True)
    yield
    if tty:
        print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
