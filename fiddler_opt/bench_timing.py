"""How a call is timed: warmed up, repeated until it is sure enough, in turn with what it is compared with; median and spread."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fiddler_opt.machine import LEAST_US

WARM_UP = 1
SURE = 0.01  # the median's standard error, as a part of it, at which repeating stops
REPETITIONS = 3  # at least
PATIENCE = 4  # times the usual seconds are spent on what stays noisy
PAUSE_S = 3e-4  # before each call, as in a run where other work lies between two: threads that wait for work may fall asleep
BUSY_CYCLES = 4_500_000  # of a GPU's clock, 2 or 3 ms: longer than Python needs to queue a layer
ROUND = 4  # calls to a sample: the same call is faster in some places of the memory than in others


@dataclass(frozen=True)
class Timing:
    """`us`: the median of the samples, in microseconds. `spread`: how far their middle half lies from it, as a part of it."""

    us: float
    spread: float

    def __sub__(self, other: "Timing") -> "Timing":
        """A difference of two that were timed in turn; noise must not make it vanish or negative."""
        us = max(LEAST_US, self.us - other.us)
        return Timing(us, max(self.us * self.spread, other.us * other.spread) / us)

    def __truediv__(self, parts: float) -> "Timing":
        return Timing(max(LEAST_US, self.us / parts), self.spread)


class Stopwatch:
    """Times calls on a device, its work included, for about `seconds` a figure, but at least REPETITIONS times."""

    def __init__(self, device: torch.device, seconds: float):
        self._device, self._seconds = device, seconds

    def time(self, *calls: Callable[[], object], calls_per_sample: int = ROUND) -> list[Timing]:
        """Each from its beginning until the device is done."""
        return self.gather(*(lambda call=call: [self._once(call) for _ in range(calls_per_sample)] for call in calls))

    @torch.inference_mode()
    def gather(self, *measures: Callable[[], list[float]]) -> list[Timing]:
        """Of what measures itself, at several places of the memory in each call: microseconds, whose mean is one sample.

        They take turns, so that a drift of the machine's speed meets all alike and differences between them hold.
        """
        samples, started = [[] for _ in measures], time.perf_counter()
        while not self._enough(samples, time.perf_counter() - started):
            for measure, taken in zip(measures, samples, strict=True):
                taken.append(statistics.fmean(measure()))
        return [_summary(taken[WARM_UP:]) for taken in samples]

    def _enough(self, samples: list[list[float]], elapsed_s: float) -> bool:
        if len(samples[0]) < WARM_UP + REPETITIONS or elapsed_s < self._seconds:
            return False
        return elapsed_s > PATIENCE * self._seconds or all(_uncertainty(taken[WARM_UP:]) <= SURE for taken in samples)

    def _once(self, call: Callable[[], object]) -> float:
        self._synchronize()
        time.sleep(PAUSE_S)
        started = time.perf_counter()
        call()
        self._synchronize()
        return (time.perf_counter() - started) * 1e6

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def _summary(samples: list[float]) -> Timing:
    median = statistics.median(samples)
    lower, _, upper = statistics.quantiles(samples, n=4)
    return Timing(median, max(median - lower, upper - median) / median)


def _uncertainty(samples: list[float]) -> float:
    """Standard error of the median as a part of it, were the samples normally distributed with such quartiles."""
    return 1.86 * _summary(samples).spread / len(samples) ** 0.5
