"""Merges rounds of timing by their median, so that a slowdown during one has little effect."""

from statistics import median

Us = float | dict[float, float]  # microseconds, or microseconds by stream share
TimedParts = dict[str, tuple[str, int]]  # by part: the kind of figure and the number of tokens


def merged_rounds(parts: dict[str, dict[str, Us]], timed: TimedParts) -> dict[str, dict[int, Us]]:
    """The median over the rounds, by table and number of tokens."""
    rounds: dict[str, dict[int, list[Us]]] = {}
    for part, (_, tokens) in timed.items():
        for table, us in parts[part].items():
            rounds.setdefault(table, {}).setdefault(tokens, []).append(us)
    return {
        table: {tokens: _median(several) for tokens, several in by_tokens.items()}
        for table, by_tokens in rounds.items()
    }


def drift_between_rounds(parts: dict[str, dict[str, Us]], timed: TimedParts) -> dict[int, float]:
    """How much longer a host expert took in the slowest round than in the fastest, as a fraction.

    By number of tokens. Empty if there was only one round.
    """
    totals: dict[int, list[float]] = {}
    for part, (_, tokens) in timed.items():
        by_share = parts[part].get("host_expert_us", {})
        if by_share:
            totals.setdefault(tokens, []).append(sum(by_share.values()))
    return {
        tokens: round(max(rounds) / min(rounds) - 1, 3)
        for tokens, rounds in totals.items()
        if len(rounds) > 1
    }


def _median(several: list[Us]) -> Us:
    if isinstance(several[0], dict):
        return {share: round(median(us[share] for us in several), 1) for share in several[0]}
    return round(median(several), 1)
