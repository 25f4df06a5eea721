"""Rounds a solution of the linear relaxation to whole blocks."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.placement import MemoryLimits, Placement, Rows, Share


def whole_blocks(counts: Sequence[Sequence[float]], sizes: Sequence[int]) -> list[list[int]]:
    """Rounds the blocks of groups of experts by place.

    Carries the remainder of each place from group to group, so that the total of a place is exact
    to about a block.

    Args:
        counts: the blocks of each group in each place.
        sizes: all blocks of each group. No group gets more.
    """
    before = [0.0] * len(counts[0])
    found = []
    for places, size in zip(counts, sizes, strict=True):
        after = [sum(each) for each in zip(before, accumulate(places), strict=True)]
        ends = [round(b) - round(a) for a, b in zip(before, after, strict=True)]
        ends = accumulate((min(size, max(0, end)) for end in ends), max, initial=0)
        found.append([end - start for start, end in pairwise(ends)])
        before = after
    return found


def within_gpu_memory(placement: Placement, cost: CostModel, limits: MemoryLimits) -> Placement:
    """The placement without the blocks that exceed a GPU's memory. They move to the same rank's
    host memory, those of rarely called experts first.
    """
    order = cost.by_popularity()[::-1]
    first, *others = limits.ranks
    resident, _ = _without(placement.resident, first.gpu_blocks, order)
    shares = []
    for share, each in zip(placement.others, others, strict=True):
        kept, removed = _without(share.resident, each.gpu_blocks, order)
        host = [
            [a + b for a, b in zip(row, more, strict=True)]
            for row, more in zip(share.host, removed, strict=True)
        ]
        shares.append(Share(kept, host))
    return Placement(resident, placement.on_disk, tuple(shares))


def _without(rows: Rows, limit: int, order: list[tuple[int, int]]) -> tuple[Rows, Rows]:
    """At most `limit` of the blocks, and those removed, in the order of (layer, expert) pairs."""
    kept = [list(row) for row in rows]
    removed = [[0] * len(row) for row in rows]
    over = max(0, sum(map(sum, rows)) - limit)
    for layer, expert in order:
        count = min(over, kept[layer][expert])
        kept[layer][expert] -= count
        removed[layer][expert] = count
        over -= count
    return kept, removed
