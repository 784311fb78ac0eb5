"""pyseqnet info | demo | bench | train: what was built, a first look, the benchmarks, the recipes."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

GOAL_MISSED, BAD_REQUEST = 1, 2  # exit codes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pyseqnet", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="version, build, CPU, CUDA")
    info.add_argument("--json", action="store_true", help="for programs")
    commands.add_parser("demo", help="train three small models and write a report", add_help=False)
    commands.add_parser("bench", help="measure beside torch (from the source folder)", add_help=False)
    train = commands.add_parser("train", help="run a recipe; exits with 1 if a goal is missed")
    train.add_argument("recipe", nargs="?", help="its name")
    train.add_argument("--list", action="store_true", help="the recipes")
    train.add_argument("--quick", action="store_true", help="well under a minute; goals do not count")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--threads", type=int, default=1, help="CPU threads, default 1")
    train.add_argument("--out", type=Path, help="folder of pictures and tables, default recipe_NAME")
    train.add_argument("--resume", type=Path, metavar="FOLDER", help="keep checkpoints there and go on from them")
    train.add_argument("--json", action="store_true", help="print the scores as JSON, no progress bar")
    train.add_argument("--record", type=Path, metavar="FILE", help="also put the scores into this table (JSON)")
    return parser


def _info(as_json: bool) -> int:
    import torch

    import pyseqnet

    facts = {"pyseqnet": pyseqnet.__version__, "torch": torch.__version__, **pyseqnet.build_info()}
    print(json.dumps(facts, indent=1) if as_json else "\n".join(f"{key}: {value}" for key, value in facts.items()))
    return 0


def _train(options: argparse.Namespace) -> int:
    from pyseqnet import recipes

    if options.list or options.recipe is None:
        for name in sorted(recipes.RECIPES):
            print(f"{name:<16} {recipes.summary(name)}")
        return 0 if options.list else BAD_REQUEST
    import torch

    from pyseqnet.data import MissingData
    from pyseqnet.recipes import record

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    try:
        run = recipes.find(options.recipe)
        out = options.out or Path(f"recipe_{options.recipe}")
        out.mkdir(parents=True, exist_ok=True)
        settings = recipes.Settings(options.seed, options.quick, out, not options.json, options.resume)
        start = time.perf_counter()
        scores = run(settings)
    except (KeyError, MissingData) as error:
        print(error.args[0] if isinstance(error, KeyError) else error, file=sys.stderr)
        return BAD_REQUEST
    row = record.row(options.recipe, settings, scores, time.perf_counter() - start)
    missed = recipes.missed(scores, settings)
    if options.record is not None:
        record.keep(options.record, row)
    if options.json:
        print(json.dumps(row, indent=1))
    else:
        for score in scores:
            bound = "" if score.goal is None else f"  ({'at least' if score.at_least else 'at most'} {score.goal:g})"
            print(f"{score.name:<48} {score.value:10.4f}{bound}{'  MISSED' if score in missed else ''}")
        print(f"{row['seconds']:.0f} s; pictures in {out}")
    return GOAL_MISSED if missed else 0


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["demo"]:
        from pyseqnet.demo.__main__ import main as demo

        return demo(given[1:])
    if given[:1] == ["bench"]:
        try:
            bench = importlib.import_module("bench.__main__").main  # beside the package, not in it
        except ModuleNotFoundError:
            print("the benchmarks are part of the source folder, run this there", file=sys.stderr)
            return BAD_REQUEST
        return int(bench(given[1:]) or 0)
    options = _parser().parse_args(given)
    return _info(options.json) if options.command == "info" else _train(options)


if __name__ == "__main__":
    sys.exit(main())
