"""Scenarios: sets of experts a layer may call, their probabilities, and each expert's time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fiddler_opt.inputs.routing import PhaseRouting
from fiddler_opt.solve.phases import Phase

# Maps numbers of tokens to the seconds of experts that are resident, in host memory, and on disk.
ExpertTimes = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class RankSeconds:
    """Seconds of each called expert if all its blocks were in this place of a rank."""

    resident_s: dict[int, float]
    host_s: dict[int, float]
    disk_s: dict[int, float]


@dataclass(frozen=True)
class Scenario:
    """A set of experts called in a layer, with its probability and the seconds of each rank."""

    probability: float
    ranks: tuple[RankSeconds, ...]


def chance_called(probability: float, tokens: int) -> float:
    """The probability that any of `tokens` independent tokens chooses an expert.

    Args:
        probability: that one token chooses it.
    """
    difference = 1 - (1 - probability) ** tokens
    return difference or tokens * probability  # the difference underflows to 0 below 1e-16


def layer_scenarios(
    routing: PhaseRouting,
    layer: int,
    phase: Phase,
    top_k: int,
    expert_times: Sequence[ExpertTimes],
) -> list[Scenario]:
    """The scenarios of one layer.

    Exact for a single token with top-1 routing, or with top-2 routing if the frequencies of pairs
    are known. Otherwise a single scenario holds each expert's expected time. Copies of a token
    choose the same experts.

    Args:
        expert_times: of each rank.
    """
    different = phase.tokens // phase.copies
    called = None
    if different == 1 and top_k == 1:
        called = (((expert,), p) for expert, p in enumerate(routing.expert[layer]))
    elif different == 1 and top_k == 2 and routing.pair[layer]:
        called = routing.pair[layer].items()
    if called is not None:
        copies = np.array(phase.copies)
        times = [[float(seconds) for seconds in each(copies)] for each in expert_times]
        return [
            Scenario(
                p,
                tuple(
                    RankSeconds(*(dict.fromkeys(experts, seconds) for seconds in places))
                    for places in times
                ),
            )
            for experts, p in called
            if p > 0
        ]
    experts = {e: p for e, p in enumerate(routing.expert[layer]) if p > 0}
    chances = np.array([chance_called(p, different) for p in experts.values()])
    tokens = phase.tokens * np.array(list(experts.values())) / chances
    ranks = []
    for each in expert_times:
        by_place = ((chances * times).tolist() for times in each(tokens))
        ranks.append(RankSeconds(*(dict(zip(experts, times, strict=True)) for times in by_place)))
    return [Scenario(1.0, tuple(ranks))]
