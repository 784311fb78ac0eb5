"""python -m bench run | compare | plot | list | info | readme

python -m bench run --quick                       a first look, a few minutes
python -m bench run --family pool --dtype bf16    a part
python -m bench run --json                        everything, kept in bench/results/<device>.json
python -m bench compare old.json new.json         FASTER, SLOWER or SAME, row by row
python -m bench readme                            the README's numbers from bench/results/
"""

from __future__ import annotations

import argparse
import os
import sys


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    select = argparse.ArgumentParser(add_help=False)
    select.add_argument("--family", action="append", default=[], help="as `bench list` names them; may be repeated")
    select.add_argument("--case", default="", help="part of a case's name")
    select.add_argument("--mode", choices=("fwd", "fwdbwd"), help="default: both")
    select.add_argument("--dtype", action="append", default=[], choices=("f32", "bf16", "f16", "f64"))
    select.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    select.add_argument("--threads", type=int, default=1, help="CPU threads, default 1")
    run = commands.add_parser("run", parents=[select], help="check and time; exits with 1 if a result is off")
    run.add_argument("--quick", action="store_true", help="few samples, no torch.compile")
    run.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    run.add_argument(
        "--json",
        nargs="?",
        const="",
        metavar="PATH",
        help="keep the rows; default bench/results/<device>.json",
    )
    commands.add_parser("list", parents=[select], help="the cases")
    commands.add_parser("info", parents=[select], help="build, machine, measured ceilings")
    compare = commands.add_parser("compare", help="two result files")
    compare.add_argument("old")
    compare.add_argument("new")
    plot = commands.add_parser("plot", help="a speed chart (PNG) beside each result file")
    plot.add_argument("files", nargs="*", help="default: all of bench/results/")
    commands.add_parser("readme", help="regenerate the README's numbers")
    return parser


def _pin_threads(threads: int) -> None:
    """Before torch is imported: OpenMP reads its settings once, when its library is loaded."""
    if threads < 1:
        raise SystemExit("--threads must be at least 1")
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    # Idle workers of one library's pool must not spin while the other's run.
    os.environ["OMP_WAIT_POLICY"] = "passive"


def _run_or_list(options: argparse.Namespace) -> int:
    _pin_threads(options.threads)
    import torch

    from bench import machine
    from bench import run as runner
    from bench.cases import all_cases, families

    unknown = set(options.family) - set(families())
    if unknown:
        print(
            f"no such family: {', '.join(sorted(unknown))}; there are {', '.join(families())}",
            file=sys.stderr,
        )
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch finds no CUDA device here", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    selection = runner.Selection(
        families=options.family,
        pattern=options.case,
        modes=[options.mode] if options.mode else ["fwd", "fwdbwd"],
        dtypes=options.dtype,
        device=device,
        quick=getattr(options, "quick", False),
        compile=not (getattr(options, "quick", False) or getattr(options, "no_compile", False)),
        threads=options.threads,
    )
    if options.command == "run":
        return runner.run(all_cases(), selection, options.json)
    if options.command == "list":
        for case, dtype, mode in runner.pick(all_cases(), selection):
            cost = case.cost(mode)
            print(
                f"{case.family + '/' + case.name:<36}{dtype:>6}{mode:>8}{cost.flops / 1e6:>10.1f} MFLOP"
                f"{cost.bytes(runner.DTYPES[dtype]) / 1e6:>9.2f} MB  {case.shapes}"
            )
        return 0
    return machine.info(device, options.threads)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.command in ("run", "list", "info"):
        return _run_or_list(options)
    if options.command == "compare":
        from bench.compare import compare

        return compare(options.old, options.new)
    if options.command == "plot":
        from bench.plot import plot

        files = options.files
        if not files:
            from bench.machine import device_results

            files = [str(path) for path in device_results()]
        return plot(files)
    from bench.readme import readme

    return readme()


if __name__ == "__main__":
    sys.exit(main())
