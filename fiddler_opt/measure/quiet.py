"""Refuses figures that were timed while other programs used the machine."""

import time
from collections.abc import Callable

from fiddler_run.errors import FiddlerError
from fiddler_run.system.host import OtherProcesses, num_cores

MIN_SECONDS = 0.5  # shorter work spans too few of the clock ticks in which the system counts
MAX_CORES = 0.5
MAX_CORES_FRACTION = 0.05


def undisturbed(name: str, measure: Callable[[], dict]) -> dict:
    """The result of `measure`, if other programs left the machine to it.

    Raises:
        FiddlerError: they did not.
    """
    others = OtherProcesses()
    cores = num_cores()
    started_s = time.monotonic()
    measured = measure()
    taken = others.cores() or 0.0
    long_enough = time.monotonic() - started_s > MIN_SECONDS
    if long_enough and taken > MAX_CORES + MAX_CORES_FRACTION * cores:
        raise FiddlerError(
            f"the machine is busy: other programs took {taken:.1f} of {cores} cores while it was"
            f" timed ({name}); close them and run this again, which goes on from here, or time it"
            " all the same with --force"
        )
    return measured
