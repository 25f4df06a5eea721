"""Finds experts whose blocks the solver may exchange, so that one variable can stand for them."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.phases import Phase


def equal_experts(
    costs: Sequence[CostModel], phases: Sequence[Phase], layer: int
) -> list[list[int]]:
    """Groups the experts of a layer that are as often called and take as long in every scenario, in
    every rank.
    """
    keys = [list(chances) for chances in zip(*(cost.called[layer] for cost in costs), strict=True)]
    scenarios = [
        scenario
        for cost in costs
        for phase in phases
        for scenario in cost.scenarios[phase.name][layer]
    ]
    for number, scenario in enumerate(scenarios):
        for rank in scenario.ranks:
            for expert, host_s in rank.host_s.items():
                keys[expert] += number, rank.resident_s[expert], host_s, rank.disk_s[expert]
    groups = {}
    for expert, key in enumerate(keys):
        groups.setdefault(tuple(key), []).append(expert)
    return list(groups.values())


def spread(blocks: int, experts: int) -> list[int]:
    """Divides blocks among equal experts, evenly to within one."""
    each, more = divmod(blocks, experts)
    return [each + (number < more) for number in range(experts)]


def spread_places(counts: Sequence[int], experts: int) -> list[list[int]]:
    """Divides the blocks in each place among equal experts: for each place, the blocks by expert.

    Each expert gets its share of each place to within one, and of all places together, too.
    """
    ends = [spread(blocks, experts) for blocks in accumulate(counts, initial=0)]
    return [[end - start for start, end in zip(*each, strict=True)] for each in pairwise(ends)]
