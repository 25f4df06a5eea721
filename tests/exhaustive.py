"""Exhaustive search over small instances of the placement problem."""

import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from planning import machine_profile, random_routing, several_ranks, small_model

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.ilp import place, relaxed_s
from fiddler_opt.solve.phases import Phase
from fiddler_opt.solve.placement import MemoryLimits, Placement, Rows, Share
from fiddler_opt.solve.time_unit import RELATIVE_GAP
from fiddler_run.plan.schema import Workload

EXACT = 2 * RELATIVE_GAP


def random_instance(rng: random.Random) -> tuple[list[CostModel], MemoryLimits]:
    """Cost models of at most 4,096 placements and memory limits, with random features.

    Features: a GPU or none; one or two experts per token; one or several sequences; launch
    overhead longer or shorter than experts; host memory limited, with the rest on disk, or not;
    one or two routings.
    """
    limited = rng.random() < 0.4
    layers, experts, neurons = rng.choice(
        [(1, 3, 96), (2, 2, 64)] if limited else [(1, 3, 128), (1, 5, 128), (2, 3, 96), (2, 2, 160)]
    )
    top_k = rng.choice([1, 2, 2, 2]) if experts > 2 else 1
    model = small_model(
        num_layers=layers, num_experts=experts, intermediate_size=neurons, num_experts_per_tok=top_k
    )
    machine = random_profile(model, rng)
    workload = Workload(
        prompt_tokens=rng.randint(1, 20),
        output_tokens=rng.randint(1, 30),
        num_beams=rng.choice([1, 1, 3]),
        batch_size=rng.choice([1, 1, 2]),
        max_seq_len=64,
    )
    routings = [random_routing(model, rng) for _ in range(rng.choice([1, 1, 2]))]
    chunk = rng.choice([8, 64])
    costs = [CostModel.build(model, machine, routing, workload, chunk) for routing in routings]
    num_blocks = layers * experts * costs[0].blocks_per_expert
    size = model.block_bytes
    gpu_bytes = rng.randint(0, num_blocks + 2) * size + rng.randint(0, size - 1)
    host_bytes = rng.randint(0, num_blocks) * size + rng.randint(0, size - 1) if limited else None
    return costs, MemoryLimits(size, gpu_bytes, host_bytes)


def random_profile(model: ModelSpec, rng: random.Random) -> MachineProfile:
    """A machine of one rank with random times."""
    return machine_profile(
        model,
        device=rng.uniform(1, 60),
        host=rng.uniform(20, 100),
        dense=rng.uniform(1, 60),
        dense_device=rng.uniform(1, 10),
        kind=rng.choice(["cuda", "cuda", "cpu"]),
        disk_bytes_per_s=rng.uniform(0.1, 3) * 1e9,
    )


def random_ranks_instance(rng: random.Random) -> tuple[list[CostModel], MemoryLimits]:
    """As `random_instance`, for two or three unequal ranks, at most 10,000 placements.

    Features: ranks without a GPU, or that use their CPU alone; host memory of a rank limited or
    not, with the rest of the first rank's on disk; one or two routings.
    """
    num_ranks = rng.choice([2, 2, 2, 3])
    limited = rng.random() < 0.2 and num_ranks == 2
    sizes = [(1, 3, 96), (2, 2, 64), (1, 4, 64), (1, 2, 128)]
    few = [(1, 3, 64), (1, 2, 64)]
    layers, experts, neurons = rng.choice(few if limited or num_ranks == 3 else sizes)
    top_k = rng.choice([1, 2]) if experts > 2 else 1
    model = small_model(
        num_layers=layers, num_experts=experts, intermediate_size=neurons, num_experts_per_tok=top_k
    )
    ranks = [random_profile(model, rng) for _ in range(num_ranks)]
    machine = several_ranks(*ranks, round_trip_us=rng.uniform(1, 50))
    workload = Workload(
        prompt_tokens=rng.randint(1, 20),
        output_tokens=rng.randint(1, 30),
        num_beams=1,
        batch_size=rng.choice([1, 1, 2]),
        max_seq_len=64,
    )
    num_blocks = layers * experts * model.blocks_per_expert
    size = model.block_bytes
    limits = [
        MemoryLimits(
            size,
            rng.choice([0, rng.randint(0, num_blocks)]) * size + rng.randint(0, size - 1),
            rng.choice([None, rng.randint(0, num_blocks) * size]) if number else None,
        )
        for number in range(num_ranks)
    ]
    cpu_alone = [number for number, each in enumerate(limits) if each.gpu_bytes < size]
    routings = [random_routing(model, rng) for _ in range(rng.choice([1, 1, 2]))]
    costs = [
        CostModel.build(model, machine, routing, workload, 64, cpu_alone=cpu_alone)
        for routing in routings
    ]
    host_bytes = rng.randint(0, num_blocks) * size if limited else None
    return costs, replace(limits[0], host_bytes=host_bytes, others=tuple(limits[1:]))


def fits(placement: Placement, cost: CostModel, limits: MemoryLimits) -> bool:
    """True if a placement meets the program's constraints, restated here independently."""
    blocks = cost.blocks_per_expert

    def count(rows: Rows) -> int:
        return sum(map(sum, rows))

    rows = [placement.resident, placement.on_disk]
    rows += [part for share in placement.others for part in (share.resident, share.host)]
    by_expert = np.array(rows).sum(axis=0)
    left = int((blocks - by_expert).sum())
    resident = [placement.resident, *(share.resident for share in placement.others)]
    in_host = [left, *(count(share.host) for share in placement.others)]
    return (
        bool((np.array(rows) >= 0).all() and (by_expert <= blocks).all())
        and all(
            count(on_gpu) * limits.block_bytes <= each.gpu_bytes
            for on_gpu, each in zip(resident, limits.ranks, strict=True)
        )
        and all(
            each.host_bytes is None or host * limits.block_bytes <= each.host_bytes
            for host, each in zip(in_host, limits.ranks, strict=True)
        )
    )


class Exhaustive:
    """All placements that fit, and their times by the cost formula, restated here independently.

    `counts`: by rank and place, the blocks of each placement, [placements, layers, experts].
    """

    def __init__(self, cost: CostModel, limits: MemoryLimits):
        layers = len(cost.called)
        experts = len(cost.called[0])
        blocks = cost.blocks_per_expert
        places = [(number, place) for number in range(len(limits.ranks)) for place in "rh"]
        if limits.host_bytes is not None:
            places.append((0, "d"))
        of_expert = [
            (*counts, blocks - sum(counts))
            for counts in product(range(blocks + 1), repeat=len(places) - 1)
            if sum(counts) <= blocks
        ]
        counts = np.array(list(product(of_expert, repeat=layers * experts)))
        totals = dict(zip(places, counts.sum(axis=1).T, strict=True))
        fitting = np.full(len(counts), True)
        for number, each in enumerate(limits.ranks):
            fitting &= totals[number, "r"] * limits.block_bytes <= each.gpu_bytes
            if each.host_bytes is not None:
                fitting &= totals[number, "h"] * limits.block_bytes <= each.host_bytes
        self.counts = {
            place: counts[fitting, :, column].reshape(-1, layers, experts)
            for column, place in enumerate(places)
        }
        self.num_ranks = len(limits.ranks)
        self.num_placements = int(fitting.sum())

    def placement(self, index: int) -> Placement:
        rows = {place: counts[index].tolist() for place, counts in self.counts.items()}
        none = np.zeros_like(self.counts[0, "r"][index]).tolist()
        others = (Share(rows[n, "r"], rows[n, "h"]) for n in range(1, self.num_ranks))
        return Placement(rows[0, "r"], rows.get((0, "d"), none), tuple(others))

    def step_s(self, cost: CostModel, phase: Phase) -> np.ndarray:
        """Seconds of one step of a phase, by placement."""
        seconds = np.full(self.num_placements, sum(cost.fixed_s[phase.name].values()))
        for layer, scenarios in enumerate(cost.scenarios[phase.name]):
            for each in scenarios:
                slowest = np.full(self.num_placements, cost.launch_overhead_s[phase.name])
                for number, rank in enumerate(each.ranks):
                    device = self._parts(rank.resident_s, (number, "r"), layer, cost)
                    host = self._parts(rank.host_s, (number, "h"), layer, cost)
                    host = host + self._parts(rank.disk_s, (number, "d"), layer, cost)
                    both = np.maximum(device, host) if cost.overlap[number] else device + host
                    slowest = np.maximum(slowest, both)
                seconds += each.probability * slowest
        return seconds

    def total_s(self, cost: CostModel) -> np.ndarray:
        return sum(phase.steps * self.step_s(cost, phase) for phase in cost.phases)

    def _parts(
        self, seconds: dict[int, float], place: tuple[int, str], layer: int, cost: CostModel
    ) -> np.ndarray | float:
        if place not in self.counts:
            return 0.0
        blocks = self.counts[place]
        whole_s = np.zeros(blocks.shape[2])
        whole_s[list(seconds)] = list(seconds.values())
        return blocks[:, layer] @ whole_s / cost.blocks_per_expert


def assert_optimal(costs: list[CostModel], limits: MemoryLimits) -> None:
    """Asserts that the solver finds the best of all placements, and sound bounds."""
    placements = Exhaustive(costs[0], limits)
    best_s = np.max([placements.total_s(cost) for cost in costs], axis=0).min()
    fastest_decode_s = max(placements.step_s(cost, cost.decode).min() for cost in costs)
    solution = place(costs, limits)
    assert fits(solution.placement, costs[0], limits)
    assert solution.status == "optimal"
    assert solution.objective_s == pytest.approx(
        max(cost.total_s(solution.placement) for cost in costs)
    )
    assert best_s * (1 - 1e-9) <= solution.objective_s <= best_s * (1 + EXACT)
    assert solution.bound_s <= best_s * (1 + 1e-9)
    assert solution.gap <= EXACT
    bounds_s = [relaxed_s([cost], [limits], {cost.decode: 1})[0] for cost in costs]
    assert max(bounds_s) <= fastest_decode_s * (1 + 1e-9)
