"""Finds experts whose blocks the solver may exchange, so that one variable can stand for them."""

from collections.abc import Sequence

from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.phases import Phase


def equal_experts(
    costs: Sequence[CostModel], phases: Sequence[Phase], layer: int
) -> list[list[int]]:
    """Groups the experts of a layer that are as often called and take as long in every scenario."""
    keys = [list(chances) for chances in zip(*(cost.called[layer] for cost in costs), strict=True)]
    scenarios = [
        scenario
        for cost in costs
        for phase in phases
        for scenario in cost.scenarios[phase.name][layer]
    ]
    for number, scenario in enumerate(scenarios):
        for expert, host_s in scenario.host_s.items():
            keys[expert] += number, scenario.resident_s[expert], host_s, scenario.disk_s[expert]
    groups = {}
    for expert, key in enumerate(keys):
        groups.setdefault(tuple(key), []).append(expert)
    return list(groups.values())


def spread(blocks: int, experts: int) -> list[int]:
    """Divides blocks among equal experts, evenly to within one."""
    each, more = divmod(blocks, experts)
    return [each + (number < more) for number in range(experts)]
