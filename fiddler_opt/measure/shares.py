"""Chooses the stream shares to time, around the share that keeps CPU and link equally busy."""

from collections.abc import Callable

NEIGHBOURS = 3  # shares on either side of the best
STEP = 1 / 32  # approximate distance between shares, rounded to whole blocks
BALANCE_OF_MANY = 0.96  # assumed if the CPU alone is not timed

Measure = Callable[[list[float]], dict[float, float]]


def sweep_shares(measure: Measure, ends: list[float], block: float) -> dict[float, float]:
    """Microseconds by share, for the end points and the best share with its neighbours.

    The end points predict the best share, assuming that CPU and link do not slow each other down.
    If they do, the sweep continues towards the best share.

    Args:
        measure: times a list of shares together.
        ends: 0.0, the CPU alone, and 1.0, the link alone; for many tokens only 1.0.
        block: the share of one block in a call.
    """
    times = measure(ends)
    center = BALANCE_OF_MANY
    if 0.0 in times:
        center = times[0.0] / (times[0.0] + times[1.0])
    step = block * max(1, round(STEP / block))
    while new := [share for share in _around(center, step) if share not in times]:
        times |= measure(new)
        center = min((share for share in times if 0 < share < 1), key=times.get)
    return dict(sorted(times.items()))


def _around(center: float, step: float) -> list[float]:
    middle = round(center / step)
    numbers = range(middle - NEIGHBOURS, middle + NEIGHBOURS + 1)
    return [share for share in (round(step * number, 4) for number in numbers) if 0 < share < 1]
