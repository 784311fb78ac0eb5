"""python -m pyseqnet.demo: train, test, measure, report. Exits with 1 if a goal is missed."""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
from pathlib import Path

import torch

import pyseqnet
from pyseqnet.demo import jobs, speed


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pyseqnet.demo",
        description="Trains and tests three models: on handwritten digits, Python source, and dates.",
    )
    parser.add_argument("--out", type=Path, default=Path("demo_report"), help="folder of the report")
    parser.add_argument("--share", type=float, default=1.0, help="of the training: less is faster and misses the goals")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default 1")
    options = parser.parse_args(arguments)
    if not 0 < options.share <= 1:
        parser.error(f"--share must be above 0 and at most 1, not {options.share}")
    return options


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    started = time.perf_counter()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    results = [job(options.out, options.seed, options.share) for job in jobs.JOBS]

    print("measuring kernel speed beside torch ...", flush=True)
    rows = speed.measure()

    from pyseqnet.demo import plots, report  # after the training: matplotlib takes a second to import

    speed_picture = options.out / "kernel_speed.png"
    plots.kernel_speed(rows, options.threads, speed_picture)
    build = pyseqnet.build_info()
    page = report.write(
        options.out,
        results,
        speed_picture,
        speed=rows,
        run={
            "processor": f"{_processor()}, {build['cpu_isa']} kernels",
            "threads": options.threads,
            "pyseqnet": pyseqnet.__version__,
            "torch": torch.__version__,
            "Python": platform.python_version(),
            "seed": options.seed,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        },
    )
    for row in rows:
        print(
            f"  {row.name:<36} {1e3 * row.ours:8.3f} ms, torch {1e3 * row.torch:8.3f} ms: "
            f"{row.speedup:5.2f}x, error {row.error:.0e} (torch {row.torch_error:.0e})"
        )
    for result in results:
        print(
            f"{result.name}: {result.accuracy:.2%} of {result.tested} held-out {result.unit} right, "
            f"goal {result.goal:.0%}; trained for {result.history.seconds:.0f} s"
        )
    print(f"report: {page}, {time.perf_counter() - started:.0f} s in all")
    missed = [result for result in results if not result.passed]
    for result in missed:
        print(f"missed: {result.name}, {result.accuracy:.2%} is below {result.goal:.0%}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
