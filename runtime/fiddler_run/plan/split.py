"""The split rule: how many host blocks of a called expert take the link. The CPU gets the rest.

`kernels/route.h` applies the same rule on the decode path, where the GPU sends the router's choice
to the CPU's threads.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from math import log


def split(calls: Iterable[tuple[float, int]]) -> Iterator[int]:
    """Yields the number of streamed blocks of each called expert, in the order of the calls.

    Carries the rounding remainder from expert to expert, so that a layer's total is exact to half a
    block.

    Args:
        calls: for each called expert, the share of its host blocks to stream, and their number.
    """
    remainder = 0.0
    for share, num_host in calls:
        remainder += share * num_host
        streamed = min(num_host, max(0, int(remainder + 0.5)))
        remainder -= streamed
        yield streamed


def scale_odds(share: float, factor: float) -> float:
    """The share whose odds, streamed : CPU, are `factor` times those of `share`."""
    if factor == 1 or share in (0, 1):
        return share  # avoids rounding
    return share * factor / (share * factor + 1 - share)


def fading(factor: float, tokens: int, last: int) -> float:
    """`factor` at one token, 1 from `last` tokens on, log-linear in between."""
    return factor ** max(0.0, 1 - log(tokens, last))


def interpolate(values: dict[int, float], tokens: float) -> float:
    """The value at `tokens`: linear between the entries of `values`, constant outside them."""
    points = sorted(values)
    if tokens <= points[0]:
        return values[points[0]]
    if tokens >= points[-1]:
        return values[points[-1]]
    right = bisect_right(points, tokens)
    low = points[right - 1]
    high = points[right]
    part = (tokens - low) / (high - low)
    return values[low] * (1 - part) + values[high] * part
