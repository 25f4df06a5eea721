"""Finds other processes that use this machine's CPUs."""

import os
import time

from fiddler_run.system import host
from fiddler_run.system.host import read


def busiest(seconds: float, count: int = 3) -> list[tuple[str, float]]:
    """The other processes that use the most CPU time during the next `seconds`.

    Returns their names and the number of cores that each keeps busy, if above 0.05.
    """
    before = _ticks_by_process()
    start_s = time.monotonic()
    time.sleep(seconds)
    after = _ticks_by_process()
    elapsed_s = time.monotonic() - start_s
    per_core = elapsed_s * os.sysconf("SC_CLK_TCK")
    used = [
        (name, (ticks - before.get((pid, name), ticks)) / per_core)
        for (pid, name), ticks in after.items()
    ]
    return sorted((entry for entry in used if entry[1] > 0.05), key=lambda entry: -entry[1])[:count]


def _ticks_by_process() -> dict[tuple[int, str], int]:
    ticks = {}
    for folder in (host.ROOT / "proc").glob("[0-9]*"):
        # the name may contain any character
        name, _, rest = read(folder / "stat").partition("(")[2].rpartition(")")
        if rest and int(folder.name) != os.getpid():
            fields = rest.split()
            ticks[int(folder.name), name] = int(fields[11]) + int(fields[12])  # utime, stime
    return ticks
