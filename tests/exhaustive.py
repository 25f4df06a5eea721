"""Exhaustive search over small instances of the placement problem."""

import random
from itertools import product

import numpy as np
from planning import machine_profile, random_routing, small_model

from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.phases import Phase
from fiddler_opt.solve.placement import MemoryLimits, Placement
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
    machine = machine_profile(
        model,
        device=rng.uniform(1, 60),
        host=rng.uniform(20, 100),
        dense=rng.uniform(1, 60),
        dense_device=rng.uniform(1, 10),
        kind=rng.choice(["cuda", "cuda", "cpu"]),
        disk_bytes_per_s=rng.uniform(0.1, 3) * 1e9,
    )
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


def fits(placement: Placement, cost: CostModel, limits: MemoryLimits) -> bool:
    """True if a placement meets the program's constraints, restated here independently."""
    resident, on_disk = (sum(map(sum, rows)) for rows in (placement.resident, placement.on_disk))
    left = cost.blocks_per_expert * sum(map(len, cost.called)) - resident - on_disk
    rows = zip(placement.resident, placement.on_disk, strict=True)
    valid_counts = all(
        min(r, d) >= 0 and r + d <= cost.blocks_per_expert
        for row in rows
        for r, d in zip(*row, strict=True)
    )
    fits_host = limits.host_bytes is None or left * limits.block_bytes <= limits.host_bytes
    return valid_counts and resident * limits.block_bytes <= limits.gpu_bytes and fits_host


class Exhaustive:
    """All placements that fit, and their times by the cost formula, restated here independently.

    `resident` and `on_disk`: blocks of each placement, [placements, layers, experts].
    """

    def __init__(self, cost: CostModel, limits: MemoryLimits):
        layers = len(cost.called)
        experts = len(cost.called[0])
        blocks = cost.blocks_per_expert
        disk = range(blocks + 1) if limits.host_bytes is not None else range(1)
        of_expert = [(r, d) for r in range(blocks + 1) for d in disk if r + d <= blocks]
        counts = np.array(list(product(of_expert, repeat=layers * experts)))
        resident = counts[:, :, 0].sum(axis=1)
        in_host = layers * experts * blocks - counts.sum(axis=(1, 2))
        fitting = resident * limits.block_bytes <= limits.gpu_bytes
        if limits.host_bytes is not None:
            fitting &= in_host * limits.block_bytes <= limits.host_bytes
        shape = (-1, layers, experts)
        self.resident = counts[fitting, :, 0].reshape(shape)
        self.on_disk = counts[fitting, :, 1].reshape(shape)

    def step_s(self, cost: CostModel, phase: Phase) -> np.ndarray:
        """Seconds of one step of a phase, by placement."""
        seconds = np.full(len(self.resident), sum(cost.fixed_s[phase.name].values()))
        for layer, scenarios in enumerate(cost.scenarios[phase.name]):
            for each in scenarios:
                device = self._parts(each.resident_s, self.resident, layer, cost)
                host_blocks = cost.blocks_per_expert - self.resident - self.on_disk
                host = self._parts(each.host_s, host_blocks, layer, cost)
                host += self._parts(each.disk_s, self.on_disk, layer, cost)
                experts = device + host
                if cost.overlap:
                    overhead = cost.launch_overhead_s[phase.name]
                    experts = np.maximum(np.maximum(device, host), overhead)
                seconds += each.probability * experts
        return seconds

    def total_s(self, cost: CostModel) -> np.ndarray:
        return sum(phase.steps * self.step_s(cost, phase) for phase in cost.phases)

    @staticmethod
    def _parts(
        seconds: dict[int, float], blocks: np.ndarray, layer: int, cost: CostModel
    ) -> np.ndarray:
        whole_s = np.zeros(blocks.shape[2])
        whole_s[list(seconds)] = list(seconds.values())
        return blocks[:, layer] @ whole_s / cost.blocks_per_expert
