"""Chooses the stream shares to time, around the share that keeps CPU and link equally busy."""

from collections.abc import Callable

NEIGHBOURS = 3  # shares on either side of the best
STEP = 1 / 32  # approximate distance between shares, rounded to whole blocks
BALANCE_OF_MANY = 0.96  # assumed if the CPU alone is not timed

Measure = Callable[[list[float]], dict[float, float]]
Agree = Callable[[list[float]], list[float]]


def alone(shares: list[float]) -> list[float]:
    """What a single rank times next: what it wants."""
    return shares


def sweep_shares(
    measure: Measure, ends: list[float], block: float, agree: Agree = alone
) -> dict[float, float]:
    """Microseconds by share, for the end points and the best share with its neighbours.

    The end points predict the best share, assuming that CPU and link do not slow each other down.
    If they do, the sweep continues towards the best share.

    Args:
        measure: times a list of shares together.
        ends: 0.0, the CPU alone, and 1.0, the link alone; for many tokens only 1.0. Without a link
            only 0.0, and there is nothing to sweep.
        block: the share of one block in a call.
        agree: with several ranks, makes their lists of shares to time next into one.
    """
    step = block * max(1, round(STEP / block))
    times = measure(agree(ends))
    while new := agree(_missing(times, step)):
        times |= measure(new)
    return dict(sorted(times.items()))


def _missing(times: dict[float, float], step: float) -> list[float]:
    """The neighbours of the best share that are not timed yet."""
    if 1.0 not in times:
        return []
    inner = [share for share in times if 0 < share < 1]
    if inner:
        center = min(inner, key=times.get)
    elif 0.0 in times:
        center = times[0.0] / (times[0.0] + times[1.0])
    else:
        center = BALANCE_OF_MANY
    return [share for share in _around(center, step) if share not in times]


def _around(center: float, step: float) -> list[float]:
    middle = round(center / step)
    numbers = range(middle - NEIGHBOURS, middle + NEIGHBOURS + 1)
    return [share for share in (round(step * number, 4) for number in numbers) if 0 < share < 1]
