"""Time intervals, in seconds, and their overlap."""

from fiddler_run.engine.timeline import Span

Interval = tuple[float, float]


def union(spans: list[Span]) -> list[Interval]:
    """The union of the spans, as disjoint intervals in order."""
    merged: list[Interval] = []
    for span in sorted(spans, key=lambda span: span.start_s):
        if merged and span.start_s <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], span.stop_s)
        else:
            merged.append((span.start_s, span.stop_s))
    return merged


def intersection(some: list[Interval], others: list[Interval]) -> list[Interval]:
    """The intersection of two lists of disjoint intervals in order."""
    common = []
    i = 0
    j = 0
    while i < len(some) and j < len(others):
        start = max(some[i][0], others[j][0])
        stop = min(some[i][1], others[j][1])
        if start < stop:
            common.append((start, stop))
        if some[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return common


def length_s(intervals: list[Interval]) -> float:
    return sum(stop - start for start, stop in intervals)
