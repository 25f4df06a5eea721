"""What several rounds of timing the same figures come to, since what slows a machine for a while should meet but one of them."""

from statistics import fmean, median

import numpy as np

from fiddler_opt.bench_experts import SMOOTHED

Timed = dict[str, tuple[str, int]]  # by part: what it times, for how many tokens


def merged_rounds(parts: dict[str, dict], timed: Timed) -> tuple[dict[str, dict], dict[str, dict]]:
    """The rounds' median microseconds, by share smoothed, and mean spread, by table and tokens. Shares that only the first round
    has are as much slower as its other ones are in the median."""
    spreads: dict[str, dict[int, list[float]]] = {}
    for part, (_, tokens) in timed.items():
        for table, spread in parts[part]["spread"].items():
            spreads.setdefault(table, {}).setdefault(tokens, []).append(spread)

    def middle(several: list[dict]) -> dict | float:
        first, again = several[0], _in_all(several)
        medians = {share: median(by_share[share] for by_share in several) for share in again}
        slower = sum(medians.values()) / sum(first[share] for share in again)
        medians = {share: round(medians.get(share, first[share] * slower), 1) for share in first}
        return medians[None] if None in medians else smoothed(medians)

    tables = {table: {n: middle(several) for n, several in found.items()} for table, found in _rounds(parts, timed).items()}
    return tables, {table: {n: round(fmean(of), 3) for n, of in found.items()} for table, found in spreads.items()}


def drift_between_rounds(parts: dict[str, dict], timed: Timed) -> dict[int, float]:
    """By tokens, an absent expert's slowest round over the fastest, less one; where there was but one, nothing."""

    def slowest_over_fastest(several: list[dict]) -> float:
        whole = [sum(by_share[share] for share in _in_all(several)) for by_share in several]
        return max(whole) / min(whole) - 1

    rounds = _rounds(parts, timed)["absent_expert_us"]
    return {tokens: round(slowest_over_fastest(several), 3) for tokens, several in rounds.items() if len(several) > 1}


def smoothed(by_share: dict[float, float]) -> dict[float, float]:
    """Each time between the ends replaced by what a parabola through the five around it says: of many noisy times the least is too
    small, and its share chosen by chance."""
    inside = sorted(share for share in by_share if 0 < share < 1)
    if len(inside) < SMOOTHED:
        return by_share
    found = dict(by_share)
    for number, share in enumerate(inside):
        first = min(max(0, number - SMOOTHED // 2), len(inside) - SMOOTHED)
        around = np.array(inside[first : first + SMOOTHED])
        found[share] = round(float(np.polyfit(around - share, [by_share[each] for each in around], 2)[-1]), 1)
    return found


def _rounds(parts: dict[str, dict], timed: Timed) -> dict[str, dict[int, list[dict]]]:
    """Each round's microseconds by share, by table and tokens; the share of what has none is None."""
    rounds: dict[str, dict[int, list[dict]]] = {}
    for part, (_, tokens) in timed.items():
        for table, us in parts[part]["times"].items():
            rounds.setdefault(table, {}).setdefault(tokens, []).append(us if isinstance(us, dict) else {None: us})
    return rounds


def _in_all(several: list[dict]) -> list[float]:
    """The shares that every round has."""
    return [share for share in several[0] if all(share in by_share for by_share in several)]
