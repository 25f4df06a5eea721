"""Baselines: simple rules, some of them of other systems, evaluated by the same cost model.

Each places blocks by a simple rule and serves host blocks by its own policy. With several ranks,
they use the first alone, as on a machine with a single GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.placement import MemoryLimits, Placement, Rows
from fiddler_opt.solve.times import Policy


@dataclass(frozen=True)
class Baseline:
    """A simple rule. `fill` places a number of blocks: the resident blocks of each expert.

    `words` describes the rule in tables.
    """

    words: str
    policy: Policy
    fill: Callable[[CostModel, int], Rows]


def place_by_rule(baseline: Baseline, cost: CostModel, limits: MemoryLimits) -> Placement:
    """The rule's placement. Blocks that exceed host memory go to disk, least used first."""
    blocks = cost.blocks_per_expert
    resident = baseline.fill(cost, max(0, limits.gpu_blocks))
    on_disk = [[0] * len(row) for row in cost.called]
    if limits.host_bytes is not None:
        all_blocks = blocks * sum(map(len, cost.called))
        in_host = all_blocks - sum(map(sum, resident))
        over = in_host - limits.host_bytes // limits.block_bytes
        for layer, expert in reversed(cost.by_popularity()):
            on_disk[layer][expert] = max(0, min(over, blocks - resident[layer][expert]))
            over -= on_disk[layer][expert]
    return Placement(resident, on_disk)


def _popular(cost: CostModel, budget_blocks: int) -> Rows:
    resident = [[0] * len(row) for row in cost.called]
    for layer, expert in cost.by_popularity():
        resident[layer][expert] = min(budget_blocks, cost.blocks_per_expert)
        budget_blocks -= resident[layer][expert]
    return resident


def _whole_popular(cost: CostModel, budget_blocks: int) -> Rows:
    return _popular(cost, budget_blocks // cost.blocks_per_expert * cost.blocks_per_expert)


def _uniform(cost: CostModel, budget_blocks: int) -> Rows:
    each = min(cost.blocks_per_expert, budget_blocks // sum(map(len, cost.called)))
    return [[each] * len(row) for row in cost.called]


def _last_layers(cost: CostModel, budget_blocks: int) -> Rows:
    resident = [[0] * len(row) for row in cost.called]
    for row in reversed(resident):
        if budget_blocks < cost.blocks_per_expert * len(row):
            break
        row[:] = [cost.blocks_per_expert] * len(row)
        budget_blocks -= sum(row)
    return resident


def _nothing(cost: CostModel, _: int) -> Rows:
    return [[0] * len(row) for row in cost.called]


BASELINES = {
    "greedy": Baseline("the most used blocks on the GPU", "together", _popular),
    "uniform": Baseline("an equal part of every expert", "together", _uniform),
    "layers": Baseline("whole layers, others on the CPU (llama.cpp)", "cpu", _last_layers),
    "fiddler": Baseline("whole experts, CPU or copies (Fiddler)", "better", _whole_popular),
    "stream": Baseline("whole experts, others copied (offloaders)", "link", _whole_popular),
    "cpu": Baseline("every expert on the CPU", "cpu", _nothing),
}
