"""What others do, on the same cost model: placements by rules of thumb, and how they serve absent blocks."""

from collections.abc import Callable
from dataclasses import dataclass

from fiddler_opt.cost import CostModel, Placement, Policy, Rows
from fiddler_opt.ilp import Room, by_popularity


@dataclass(frozen=True)
class Baseline:
    """`fill`: how many blocks of each expert are resident, of so many at most that fit. `words` say it to a reader."""

    words: str
    policy: Policy
    fill: Callable[[CostModel, int], Rows]


def place_by_rule(baseline: Baseline, cost: CostModel, room: Room) -> Placement:
    """Its placement. What host memory cannot hold goes to disk, the least used blocks first."""
    blocks, called = cost.blocks_per_expert, cost.called
    resident = baseline.fill(cost, max(0, (room.gpu_bytes - room.embedding_bytes) // room.block_bytes))
    on_disk = [[0] * len(row) for row in called]
    if room.host_bytes is not None:
        over = blocks * sum(map(len, called)) - sum(map(sum, resident)) - room.host_bytes // room.block_bytes
        for layer, expert in reversed(by_popularity(cost)):
            on_disk[layer][expert] = max(0, min(over, blocks - resident[layer][expert]))
            over -= on_disk[layer][expert]
    return Placement(resident, on_disk)


def _popular(cost: CostModel, budget_blocks: int) -> Rows:
    resident = [[0] * len(row) for row in cost.called]
    for layer, expert in by_popularity(cost):
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
