"""The stream shares to time: around the one that keeps CPU and link equally busy."""

from collections.abc import Callable

NEIGHBOURS = 3  # shares on either side of the best
STEP = 1 / 32  # between shares, about: in fact whole blocks
BALANCE_OF_MANY = 0.96  # assumed where the CPU alone is not timed

Measure = Callable[[list[float]], dict[float, float]]


def sweep_shares(measure: Measure, ends: list[float], block: float) -> dict[float, float]:
    """Microseconds by share: the ends, and the best share with its neighbours on either side.

    The ends predict the best share if CPU and link do not slow each other down. Where they do, the
    sweep goes on towards it.

    Args:
        measure: times a list of shares together.
        ends: 0.0, the CPU alone, and 1.0, the link alone; for many tokens only the latter.
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
