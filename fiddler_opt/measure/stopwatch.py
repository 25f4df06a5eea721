"""Times calls on a device, alternating between them, as the median of many samples."""

import statistics
import time
from collections.abc import Callable

import torch

from fiddler_opt.inputs.machine import MIN_US

WARM_UP = 1
MIN_SAMPLES = 3
# A sample is the mean of this many calls, because some memory is faster than the rest, and a
# run uses both.
CALLS_PER_SAMPLE = 4
# Before each call, as in a run: other work lies between two calls, and threads may fall asleep.
PAUSE_S = 3e-4
BUSY_CYCLES = 4_500_000  # GPU clock cycles, 2 or 3 ms: longer than Python needs to queue a layer


class Stopwatch:
    """Times calls on a device, including the device's work.

    Calls that are timed together take about `seconds`, with at least MIN_SAMPLES samples each. They
    take turns, so that a drift in the machine's speed affects all of them and their differences
    hold.
    """

    def __init__(self, device: torch.device, seconds: float):
        self._device = device
        self._seconds = seconds

    def time(
        self, *calls: Callable[[], object], calls_per_sample: int = CALLS_PER_SAMPLE
    ) -> list[float]:
        """Microseconds of each call, until the device has finished."""
        return self.gather(
            *(
                lambda call=call: [self._once(call) for _ in range(calls_per_sample)]
                for call in calls
            )
        )

    @torch.inference_mode()
    def gather(self, *samplers: Callable[[], list[float]]) -> list[float]:
        """The median of each sampler's samples. A sample is the mean of returned microseconds."""
        samples = [[] for _ in samplers]
        started_s = time.perf_counter()
        while (
            len(samples[0]) < WARM_UP + MIN_SAMPLES
            or time.perf_counter() - started_s < self._seconds
        ):
            for sampler, taken in zip(samplers, samples, strict=True):
                taken.append(statistics.fmean(sampler()))
        return [statistics.median(taken[WARM_UP:]) for taken in samples]

    def _once(self, call: Callable[[], object]) -> float:
        self._synchronize()
        time.sleep(PAUSE_S)
        started_s = time.perf_counter()
        call()
        self._synchronize()
        return (time.perf_counter() - started_s) * 1e6

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def difference(us: float, part_us: float) -> float:
    """Microseconds of a whole without one of its parts, at least MIN_US.

    Both are timed alternately.
    """
    return max(MIN_US, us - part_us)
