"""Interleaved timing: A B C, C B A, A B C, ... so that drift, boost and a noisy neighbour hit all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

Step = Callable[[int], object]  # called with a running number, by which a GPU step rotates its inputs

SAMPLE_SECONDS = 2e-4  # a sample repeats a fast step this long: far above the clock's own cost
WARM_UP_SECONDS = 0.05
MOST_ROUNDS = 60
FLUSHED_CACHES = 2  # bytes written between repetitions on a GPU, in second-level caches
PAUSE = 0.25  # of the time that a round took on a GPU
LEAST_CHANGE = 0.03  # what a quiet machine repeats; below it nothing is claimed


@dataclass(frozen=True)
class Timing:
    median: float  # seconds a step
    lower: float  # quartiles
    upper: float
    samples: int


def change(ratio: float, timings: Iterable[Timing]) -> tuple[str, float]:
    """(FASTER, SLOWER or SAME; noise) of a ratio new time / old time made from these timings.

    All in logarithms. The noise of a median is the distance of the quartiles over the square root of the number of
    samples; the timings' noises add in squares, and twice the sum is what a change must exceed.
    """
    variance = sum(math.log(timing.upper / timing.lower) ** 2 / timing.samples for timing in timings)
    noise = max(LEAST_CHANGE, 2.0 * math.sqrt(variance))
    logarithm = math.log(ratio)
    return ("SAME" if abs(logarithm) <= noise else "SLOWER" if logarithm > 0 else "FASTER"), noise


def _summary(samples: list[float]) -> Timing:
    quartiles = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(quartiles[1], quartiles[0], quartiles[2], len(samples))


class CpuClock:
    def time(self, step: Step, first: int, repeats: int) -> float:
        start = time.perf_counter()
        for i in range(repeats):
            step(first + i)
        return (time.perf_counter() - start) / repeats

    def rest(self, seconds: float) -> None:
        """Processors hold their frequency under load."""


class CudaClock:
    """Device time of a step whose inputs come from memory: before each repetition the second-level cache is flushed."""

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(FLUSHED_CACHES * cache, dtype=torch.int8, device=device)

    def time(self, step: Step, first: int, repeats: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for i, (start, stop) in enumerate(events):
            self._flush.zero_()  # not timed, and long enough for the step to be queued behind it
            start.record()
            step(first + i)
            stop.record()
        events[-1][1].synchronize()
        return sum(start.elapsed_time(stop) for start, stop in events) * 1e-3 / repeats

    def rest(self, seconds: float) -> None:
        """A pause after so much work: a device that never idles gets hot, and slower from row to row."""
        time.sleep(PAUSE * seconds)


def interleaved(steps: dict[str, Step], device: torch.device, budget: float, fewest_rounds: int) -> dict[str, Timing]:
    """Times every step in turn for about `budget` seconds in all."""
    clock = CudaClock(device) if device.type == "cuda" else CpuClock()
    repeats, round_seconds = {}, 0.0
    for label, step in steps.items():
        one, spent = clock.time(step, 0, 1), 0.0
        while spent < WARM_UP_SECONDS:
            one = clock.time(step, 0, 1)
            spent += max(one, 1e-6)
        repeats[label] = max(1, round(SAMPLE_SECONDS / one))
        round_seconds += one * repeats[label]
    rounds = min(MOST_ROUNDS, max(fewest_rounds, int(budget / round_seconds)))
    samples: dict[str, list[float]] = {label: [] for label in steps}
    order = list(steps)
    for number in range(rounds):
        for label in order:
            samples[label].append(clock.time(steps[label], number * repeats[label], repeats[label]))
        order.reverse()
        clock.rest(round_seconds)
    return {label: _summary(values) for label, values in samples.items()}
