"""python -m pyseqnet.demo: train, test, measure, report. Exits with 1 if the accuracy is missed."""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
from pathlib import Path

import torch

import pyseqnet
from pyseqnet.demo import digits, speed, training
from pyseqnet.models import ImageClassifier

GOAL = 0.98  # test accuracy
CHANNELS = (32, 64)
DROPOUT = 0.2  # before the linear layer, which holds few digits in many weights


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pyseqnet.demo", description="Trains and tests a network on handwritten digits."
    )
    parser.add_argument("--out", type=Path, default=Path("demo_report"), help="folder of the report")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default 1")
    return parser.parse_args(arguments)


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
    torch.manual_seed(options.seed)
    data = digits.load(options.seed)
    model = ImageClassifier(1, digits.IMAGE_SIZE, CHANNELS, digits.CLASSES, dropout=DROPOUT)
    history = training.train(model, data, options.epochs, options.seed)
    predicted = training.predict(model, data.test_images)
    mistakes = int((predicted != data.test_labels).sum())
    accuracy = 1 - mistakes / len(predicted)

    print("measuring kernel speed beside torch ...", flush=True)
    rows = speed.measure()

    from pyseqnet.demo import plots, report  # matplotlib takes a second to import: the training starts first

    options.out.mkdir(parents=True, exist_ok=True)
    names = ("learning_curve", "confusion_matrix", "first_layer_filters", "kernel_speed")
    pictures = {name: options.out / f"{name}.png" for name in names}
    plots.learning_curve(history, GOAL, pictures["learning_curve"])
    plots.confusion_matrix(data.test_labels, predicted, pictures["confusion_matrix"])
    plots.first_layer_filters(model.get_parameter("features.0.weight"), pictures["first_layer_filters"])
    plots.kernel_speed(rows, options.threads, pictures["kernel_speed"])
    build = pyseqnet.build_info()
    page = report.write(
        options.out,
        pictures,
        accuracy=accuracy,
        goal=GOAL,
        mistakes=mistakes,
        train_count=len(data.train_images),
        test_count=len(data.test_images),
        training_seconds=history.seconds,
        epochs=options.epochs,
        parameters=sum(p.numel() for p in model.parameters()),
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
            f"  {row.name:<34} {1e3 * row.ours:8.3f} ms, torch {1e3 * row.torch:8.3f} ms: "
            f"{row.speedup:5.2f}x, error {row.error:.0e} (torch {row.torch_error:.0e})"
        )
    print(f"test accuracy {accuracy:.2%} ({mistakes} mistakes in {len(predicted)}), goal {GOAL:.0%}")
    print(f"report: {page}, {time.perf_counter() - started:.0f} s in all")
    if accuracy < GOAL:
        print(f"missed: the test accuracy is below {GOAL:.0%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
