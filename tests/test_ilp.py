"""The integer program against exhaustive search, and what more memory and faster machines must do."""

import random
from itertools import product

import pytest
from planning import machine_profile, random_routing, routed, small_model

from fiddler_opt.cost import CostModel
from fiddler_opt.ilp import RELATIVE_GAP, place
from fiddler_run.plan import Workload


def random_instance(rng: random.Random) -> tuple[CostModel, int]:
    """A cost model of at most 4,096 placements, and its block's bytes."""
    layers, experts, neurons = rng.choice([(1, 3, 128), (1, 5, 128), (2, 3, 96), (1, 4, 160), (2, 2, 160)])
    top_k = rng.choice([1, 2, 2, 2]) if experts > 2 else 1
    model = small_model(num_layers=layers, num_experts=experts, intermediate_size=neurons, num_experts_per_tok=2)
    routing = random_routing(model, rng)
    if top_k == 1:
        model = small_model(num_layers=layers, num_experts=experts, intermediate_size=neurons, num_experts_per_tok=1)
        routing = routed("random", [[p / 2 for p in row] for row in routing.decode.expert], routing.decode.pair)
    machine = machine_profile(
        model,
        device=rng.uniform(1, 60),
        absent=rng.uniform(20, 100),
        dense=rng.uniform(1, 60),
        dense_device=rng.uniform(1, 10),
        kind=rng.choice(["cuda", "cuda", "host"]),
    )
    beams = rng.choice([1, 1, 3])
    workload = Workload(prompt_tokens=rng.randint(1, 20), output_tokens=rng.randint(1, 30), num_beams=beams, max_seq_len=64)
    cost = CostModel.build(model, machine, routing, workload)
    return cost, model.block_bytes


def exhaustive(cost: CostModel, budget_blocks: int) -> tuple[float, float]:
    """The least seconds of the workload, and of a decode step, over all placements within the budget."""
    layers, experts = len(cost.called), len(cost.called[0])
    best = fastest_decode = float("inf")
    for counts in product(range(cost.blocks_per_expert + 1), repeat=layers * experts):
        if sum(counts) <= budget_blocks:
            placement = [list(counts[layer * experts : (layer + 1) * experts]) for layer in range(layers)]
            best = min(best, cost.total_s(placement))
            fastest_decode = min(fastest_decode, cost.decode_step_s(placement))
    return best, fastest_decode


@pytest.mark.parametrize("seed", range(40))
def test_equals_exhaustive_search(seed):
    rng = random.Random(seed)
    cost, block_bytes = random_instance(rng)
    every = len(cost.called) * len(cost.called[0]) * cost.blocks_per_expert
    budget_blocks = rng.randint(0, every + 2)
    solution = place(cost, block_bytes, budget_blocks * block_bytes + rng.randint(0, block_bytes - 1))
    best, fastest_decode = exhaustive(cost, budget_blocks)
    assert solution.decode_bound_s <= fastest_decode * (1 + 1e-9)
    assert solution.decode_bound_s >= cost.fixed_s["decode"]
    assert sum(map(sum, solution.placement)) <= budget_blocks
    assert all(0 <= count <= cost.blocks_per_expert for row in solution.placement for count in row)
    assert solution.status == "optimal"
    assert solution.objective_s == pytest.approx(cost.total_s(solution.placement))
    assert solution.objective_s <= best * (1 + 2 * RELATIVE_GAP)
    assert solution.bound_s <= best * (1 + 1e-9)
    assert solution.gap <= 2 * RELATIVE_GAP


def test_one_token_and_a_slow_cpu_is_greedy_by_popularity():
    """Where absent blocks always take longer, time falls with each expert's popularity alone, so greedy is optimal."""
    model = small_model(num_layers=2, num_experts=4)
    routing = random_routing(model, random.Random(5))
    machine = machine_profile(model, device=1e-3, absent=80.0)
    workload = Workload(prompt_tokens=1, output_tokens=63, num_beams=1, max_seq_len=64)
    cost = CostModel.build(model, machine, routing, workload)
    budget = 13
    order = sorted(((-p, layer, e) for layer, row in enumerate(routing.decode.expert) for e, p in enumerate(row)))
    greedy, left = [[0] * 4, [0] * 4], budget
    for _, layer, expert in order:
        greedy[layer][expert] = min(left, cost.blocks_per_expert)
        left -= greedy[layer][expert]
    solution = place(cost, 1, budget)
    assert solution.objective_s == pytest.approx(cost.total_s(greedy), rel=2 * RELATIVE_GAP)


def test_more_memory_is_never_slower():
    for seed in range(5):
        cost, block_bytes = random_instance(random.Random(100 + seed))
        every = len(cost.called) * len(cost.called[0]) * cost.blocks_per_expert
        times = [place(cost, block_bytes, blocks * block_bytes).objective_s for blocks in range(0, every + 1, 2)]
        assert all(later <= earlier * (1 + RELATIVE_GAP) for earlier, later in zip(times, times[1:], strict=False))


def test_memory_that_is_of_use_is_not_left_empty():
    """Where the CPU stands in for the GPU every placement takes the same time; the budget is used all the same."""
    model = small_model()
    machine = machine_profile(model, device=80.0, absent=80.0, kind="host")
    workload = Workload(prompt_tokens=8, output_tokens=8, num_beams=1, max_seq_len=64)
    cost = CostModel.build(model, machine, random_routing(model, random.Random(3)), workload)
    assert sum(map(sum, place(cost, 1, 9).placement)) == 9
