"""Chooses the unit of time in the integer program."""

from collections.abc import Sequence
from math import floor, log10

from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.phases import Phase

RELATIVE_GAP = 1e-4  # the solver stops at this gap
FEASIBILITY_TOLERANCE = 1e-6  # of HiGHS, absolute
MS_PER_S = 1e3


def time_unit(costs: Sequence[CostModel], steps: dict[Phase, int]) -> float:
    """The factor from seconds to the program's times.

    Milliseconds, unless the solver's absolute tolerance would be too coarse for a layer's time, or
    the numbers too large for it. Then it is the power of ten that makes that time 1 to 10. A
    layer's time is that of the fastest rank alone.
    """

    def layer_s(cost: CostModel, phase: Phase) -> float:
        scenarios = (each for layer in cost.scenarios[phase.name] for each in layer)
        alone = (min(sum(rank.host_s.values()) for rank in each.ranks) for each in scenarios)
        return max(alone, default=0.0)

    times = [
        (count * layer_s(cost, phase), layer_s(cost, phase))
        for cost in costs
        for phase, count in steps.items()
    ]
    _, longest_s = max(times, default=(0.0, 0.0))
    if longest_s <= 0 or FEASIBILITY_TOLERANCE / RELATIVE_GAP <= MS_PER_S * longest_s <= 1e5:
        return MS_PER_S
    return 10.0 ** -floor(log10(longest_s))
