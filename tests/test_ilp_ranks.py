"""The integer program for several ranks against exhaustive search, and its properties."""

import random
from dataclasses import replace

import numpy as np
import pytest
from exhaustive import EXACT, Exhaustive, assert_optimal, fits, random_ranks_instance
from planning import machine_profile, random_routing, several_ranks, small_model
from seeds import seeds

from fiddler_opt.inputs.routing import Routing
from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.ilp import place, rounded_relaxation
from fiddler_opt.solve.placement import MemoryLimits, Placement, Share
from fiddler_opt.solve.rounding import whole_blocks
from fiddler_run.plan.schema import Workload

WORKLOAD = Workload(prompt_tokens=10, output_tokens=20, num_beams=1, batch_size=1, max_seq_len=64)


def without_exchange(cost: CostModel) -> CostModel:
    fixed_s = {name: {**parts, "exchange": 0.0} for name, parts in cost.fixed_s.items()}
    return replace(cost, fixed_s=fixed_s)


def best_s(cost: CostModel, limits: MemoryLimits) -> float:
    return place([cost], limits).objective_s


@pytest.mark.parametrize("seed", seeds(30, 100))
def test_program_matches_exhaustive_search(seed):
    assert_optimal(*random_ranks_instance(random.Random(seed)))


def test_cost_model_matches_exhaustive_search():
    for seed in range(20):
        costs, limits = random_ranks_instance(random.Random(seed))
        placements = Exhaustive(costs[0], limits)
        for number in random.Random(seed).choices(range(placements.num_placements), k=9):
            placement = placements.placement(number)
            assert fits(placement, costs[0], limits)
            for cost in costs:
                assert cost.total_s(placement) == pytest.approx(placements.total_s(cost)[number])


@pytest.mark.parametrize("rank", [0, 1])
def test_more_memory_on_any_rank_is_never_slower(rank):
    for seed in range(8):
        costs, limits = random_ranks_instance(random.Random(1000 + seed))
        times = []
        for blocks in range(0, 13, 3):
            sizes = list(limits.ranks)
            sizes[rank] = replace(sizes[rank], gpu_bytes=blocks * limits.block_bytes)
            more = replace(sizes[0], others=tuple(sizes[1:]))
            times.append(place(costs, more).objective_s)
        assert all(
            later <= earlier * (1 + EXACT) for earlier, later in zip(times, times[1:], strict=False)
        )


def test_equal_ranks_are_never_slower_than_fewer_without_exchange():
    """Each has room for five of the 32 blocks."""
    limits = MemoryLimits(1, 5)
    model = small_model()
    machine = machine_profile(model, host=70.0, dense_device=0.5)
    routing = random_routing(model, random.Random(4))
    times = []
    for count in (1, 2, 3):
        several = several_ranks(*[machine] * count) if count > 1 else machine
        cost = CostModel.build(model, several, routing, WORKLOAD, 64)
        alone = without_exchange(cost) if count > 1 else cost
        times.append(best_s(alone, replace(limits, others=(limits,) * (count - 1))))
    assert times[2] <= times[1] * (1 + EXACT) <= times[0] * (1 + EXACT) ** 2
    assert times[1] < 0.75 * times[0]


def test_a_rank_without_a_gpu_takes_a_part_on_its_cpu():
    """Its CPU takes as long for an expert as the first rank's CPU and link together."""
    model = small_model(num_layers=1, num_experts=2)
    machine = several_ranks(
        machine_profile(model, host=80.0), machine_profile(model, host=40.0, cpu=80.0)
    )
    routing = Routing.uniform(model)
    cost = CostModel.build(model, machine, routing, WORKLOAD, 64, cpu_alone=[1])
    assert cost.overlap == (True, False)
    none = MemoryLimits(1, 0)
    solution = place([cost], replace(none, others=(none,)))
    (share,) = solution.placement.others
    assert sum(map(sum, share.resident)) == 0
    assert sum(map(sum, share.host)) == 4  # of 8


def test_a_decode_step_by_hand():
    """Two experts of four blocks, both called. The second rank is the slowest.

    Exchange: 20 us and 64 * (2 + 4) + 2 * 12 bytes at 1 GB/s.
    """
    model = small_model(num_layers=1, num_experts=2)
    first = machine_profile(model, device=10.0, host=80.0, dense=2.0, head=3.0)
    second = machine_profile(model, device=20.0, host=40.0, kind="cpu")
    cost = CostModel.build(
        model, several_ranks(first, second), Routing.uniform(model), WORKLOAD, 64
    )
    placement = Placement.of([[2, 0]], (Share([[1, 2]], [[1, 1]]),))
    parts = cost.step_parts(cost.decode, placement)
    exchange_us = 20 + (64 * (2 + 4) + 2 * 12) * 1e-3
    assert parts["exchange"] == pytest.approx(exchange_us * 1e-6)
    assert parts["resident"] == pytest.approx(3 * 5e-6)
    assert parts["host"] == pytest.approx(2 * 10e-6)
    assert cost.decode_step_s(placement) == pytest.approx((3 + 2 + exchange_us + 35) * 1e-6)
    assert cost.hit_rate(placement) == 5 / 8
    fewer = Placement.of([[2, 0]], (Share([[1, 0]], [[0, 0]]),))  # now the first one's host is
    parts = cost.step_parts(cost.decode, fewer)
    assert parts["host"] == pytest.approx((1 + 4) * 20e-6)
    assert parts["resident"] == 0


def test_equal_experts_share_variables_and_get_all_their_blocks():
    model = small_model(num_layers=2, num_experts=8, num_experts_per_tok=4, intermediate_size=160)
    machine = several_ranks(
        machine_profile(model), machine_profile(model, host=50.0), machine_profile(model, host=95.0)
    )
    cost = CostModel.build(model, machine, Routing.uniform(model), WORKLOAD, 64)
    limits = MemoryLimits(1, 7, others=(MemoryLimits(1, 12), MemoryLimits(1, 9)))
    placement = place([cost], limits).placement
    assert fits(placement, cost, limits)
    assert placement.num_resident == 28
    for layer in range(2):
        blocks = placement.layer(layer, cost.blocks_per_expert)
        counts = np.array([row for rank in blocks for row in rank])
        assert (counts.sum(axis=0) == cost.blocks_per_expert).all()
        assert (counts.max(axis=1) - counts.min(axis=1) <= 1).all()


def test_a_rounded_relaxation_is_a_placement_within_the_limits():
    for seed in range(20):
        costs, limits = random_ranks_instance(random.Random(seed))
        limits = replace(limits, host_bytes=None)
        unlimited = tuple(replace(each, host_bytes=None) for each in limits.others)
        limits = replace(limits, others=unlimited)
        placement, bound_s = rounded_relaxation(costs, limits)
        assert fits(placement, costs[0], limits)
        assert max(cost.total_s(placement) for cost in costs) >= bound_s * (1 - 1e-9)


def test_whole_blocks_keep_the_totals():
    counts = [[0.5, 1.2, 0.3], [0.5, 1.2, 0.3], [1.0, 0.6, 2.4]]
    rounded = whole_blocks(counts, [2, 2, 4])
    assert [sum(each) for each in rounded] == [2, 2, 4]
    assert [sum(each) for each in zip(*rounded, strict=True)] == [2, 3, 3]
