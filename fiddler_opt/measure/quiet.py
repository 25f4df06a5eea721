"""Refuses timings that were taken while other programs used the machine."""

import time
from collections.abc import Callable

from fiddler_run.errors import FiddlerError
from fiddler_run.system.host import OtherProcesses, num_cores

MIN_SECONDS = 0.5  # less work spans too few clock ticks of the system's accounting
MAX_CORES = 0.5
MAX_CORES_FRACTION = 0.05


def undisturbed(name: str, measure: Callable[[], dict]) -> dict:
    """The result of `measure`, if no other program used the machine meanwhile.

    Raises:
        FiddlerError: another program did.
    """
    others = OtherProcesses()
    cores = num_cores()
    started_s = time.monotonic()
    measured = measure()
    taken = others.cores() or 0.0
    long_enough = time.monotonic() - started_s > MIN_SECONDS
    if long_enough and taken > MAX_CORES + MAX_CORES_FRACTION * cores:
        raise FiddlerError(
            f"the machine is busy: other programs used {taken:.1f} of {cores} cores during a"
            f" measurement ({name}); close them and run the same command, which resumes here, or"
            " measure anyway with --force"
        )
    return measured
