"""How a call is timed: warmed up, repeated, in turn with what it is compared with, and summed up by its median."""

import statistics
import time
from collections.abc import Callable

import torch

WARM_UP, REPETITIONS, SECONDS_PER_FIGURE = 2, 5, 0.3
PAUSE_S = 3e-4  # before each call, as in a run where other work lies between two: threads that wait for work may fall asleep


@torch.inference_mode()
def medians_us(calls: list[Callable[[], object]], device: torch.device) -> list[float]:
    """Median microseconds of each call, the device's work included; at least REPETITIONS of each and SECONDS_PER_FIGURE.

    The calls take turns, so that a drift of the machine's speed meets all alike and differences between them hold.
    """
    samples, stop = [[] for _ in calls], time.perf_counter() + SECONDS_PER_FIGURE
    while len(samples[0]) < WARM_UP + REPETITIONS or time.perf_counter() < stop:
        for call, taken in zip(calls, samples, strict=True):
            _synchronize(device)
            time.sleep(PAUSE_S)
            started = time.perf_counter()
            call()
            _synchronize(device)
            taken.append((time.perf_counter() - started) * 1e6)
    return [statistics.median(taken[WARM_UP:]) for taken in samples]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def positive_us(difference: float) -> float:
    """A difference of two timings, to 0.1 us; noise must not make it vanish or negative."""
    return max(0.1, round(difference, 1))
