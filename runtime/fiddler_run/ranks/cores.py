"""Divides the cores of a machine among its ranks."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

from fiddler_run.system.host import core_siblings


@contextmanager
def on_own_cores(threads: Sequence[int], place: int, nodes: Sequence[int]) -> Iterator[None]:
    """Binds this thread to its rank's part of the cores. Threads that it starts stay bound.

    Args:
        threads: of each rank on this machine.
        place: of this rank among them.
        nodes: the NUMA nodes of this machine's GPUs. They count if there is one for each rank.
    """
    if len(threads) == 1 or not hasattr(os, "sched_setaffinity"):
        yield
        return
    known = len(nodes) >= len(threads)
    own = divide(core_siblings(), threads, nodes if known else [0] * len(threads))[place]
    before = os.sched_getaffinity(0)
    if own:
        os.sched_setaffinity(0, {cpu for core in own for cpu in core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def divide(
    cores: Sequence[list[int]], threads: Sequence[int], nodes: Sequence[int]
) -> list[list[list[int]]]:
    """The cores of each rank, in proportion to its `threads`.

    Args:
        cores: each with its CPUs, ordered by NUMA node.
        nodes: where each rank should be. Ranks get their cores in this order.
    """
    order = sorted(range(len(threads)), key=lambda rank: nodes[rank])
    ends = [
        round(len(cores) * before / sum(threads))
        for before in accumulate(threads[rank] for rank in order)
    ]
    parts = {}
    start = 0
    for rank, end in zip(order, ends, strict=True):
        parts[rank] = list(cores[start:end])
        start = end
    return [parts[rank] for rank in range(len(threads))]
