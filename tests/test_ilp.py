"""The integer program against exhaustive search, and its behaviour with more memory."""

import random
from dataclasses import replace

import numpy as np
import pytest
from conftest import DEMO, ROOT
from exhaustive import EXACT, Exhaustive, assert_optimal, fits, random_instance
from planning import machine_profile, random_routing, small_model
from seeds import seeds

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.routing import Routing
from fiddler_opt.solve.chunk import choose_chunk
from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.ilp import place, relaxed_s
from fiddler_opt.solve.placement import MemoryLimits, Placement
from fiddler_opt.solve.program import Program
from fiddler_opt.solve.scenarios import RankSeconds
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Budget, Workload


@pytest.mark.parametrize("seed", seeds(80, 220))
def test_program_matches_exhaustive_search(seed):
    assert_optimal(*random_instance(random.Random(seed)))


def test_cost_model_matches_exhaustive_search():
    for seed in range(12):
        costs, limits = random_instance(random.Random(seed))
        placements = Exhaustive(costs[0], limits)
        for number in random.Random(seed).sample(
            range(placements.num_placements), k=min(9, placements.num_placements)
        ):
            placement = placements.placement(number)
            assert fits(placement, costs[0], limits)
            for cost in costs:
                assert cost.total_s(placement) == pytest.approx(placements.total_s(cost)[number])


def test_greedy_is_optimal_for_one_token_and_a_slow_cpu():
    """Host blocks always take longer, so that time falls with each expert's popularity alone."""
    model = small_model(num_layers=2, num_experts=4)
    routing = random_routing(model, random.Random(5))
    machine = machine_profile(model, device=1e-3, host=80.0)
    workload = Workload(
        prompt_tokens=1, output_tokens=63, num_beams=1, batch_size=1, max_seq_len=64
    )
    cost = CostModel.build(model, machine, routing, workload, 64)
    budget = 13
    order = sorted(
        (-p, layer, e) for layer, row in enumerate(routing.decode.expert) for e, p in enumerate(row)
    )
    greedy = [[0] * 4, [0] * 4]
    left = budget
    for _, layer, expert in order:
        greedy[layer][expert] = min(left, cost.blocks_per_expert)
        left -= greedy[layer][expert]
    solution = place([cost], MemoryLimits(1, budget))
    assert solution.objective_s == pytest.approx(cost.total_s(Placement.of(greedy)), rel=EXACT)


@pytest.mark.parametrize("kind", ["gpu_bytes", "host_bytes"])
def test_more_memory_is_never_slower(kind):
    for seed in range(12):
        costs, limits = random_instance(random.Random(1000 + seed))
        limits = replace(limits, gpu_bytes=3 * limits.block_bytes)
        if kind == "host_bytes" and limits.host_bytes is None:
            continue
        more = [
            replace(limits, **{kind: blocks * limits.block_bytes}) for blocks in range(0, 16, 3)
        ]
        times = [place(costs, each).objective_s for each in more]
        assert all(
            later <= earlier * (1 + EXACT) for earlier, later in zip(times, times[1:], strict=False)
        )


def test_gpu_memory_is_filled_on_a_tie():
    """Where the CPU stands in for the GPU, every placement takes the same time."""
    model = small_model()
    machine = machine_profile(model, device=80.0, host=80.0, kind="cpu")
    workload = Workload(prompt_tokens=8, output_tokens=8, num_beams=1, batch_size=1, max_seq_len=64)
    cost = CostModel.build(model, machine, random_routing(model, random.Random(3)), workload, 64)
    assert sum(map(sum, place([cost], MemoryLimits(1, 9)).placement.resident)) == 9


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e9])
def test_plans_do_not_depend_on_the_scale_of_time(scale):
    """The solver's tolerances are absolute, but plans for much faster machines are as good."""
    for seed in range(6):
        costs, limits = random_instance(random.Random(seed))
        costs = [scaled(cost, scale) for cost in costs]
        placements = Exhaustive(costs[0], limits)
        best_s = np.max([placements.total_s(cost) for cost in costs], axis=0).min()
        solution = place(costs, limits)
        assert solution.objective_s <= best_s * (1 + EXACT)
        assert solution.bound_s <= best_s * (1 + 1e-9)
        assert solution.gap <= EXACT


def scaled(cost: CostModel, scale: float) -> CostModel:
    def times(values: dict) -> dict:
        return {key: value * scale for key, value in values.items()}

    def scaled_rank(rank: RankSeconds) -> RankSeconds:
        return RankSeconds(times(rank.resident_s), times(rank.host_s), times(rank.disk_s))

    return replace(
        cost,
        fixed_s={name: times(parts) for name, parts in cost.fixed_s.items()},
        launch_overhead_s=times(cost.launch_overhead_s),
        scenarios={
            name: [
                [replace(each, ranks=tuple(map(scaled_rank, each.ranks))) for each in layer]
                for layer in layers
            ]
            for name, layers in cost.scenarios.items()
        },
    )


@pytest.mark.slow
def test_many_equal_placements_are_solved_in_time():
    """On a GPU that holds nearly all of the demo model, very many placements are equally good."""
    model = ModelSpec.load(str(DEMO))
    machine = MachineProfile.load(ROOT / "profiles" / "rtx4090.machine.yaml")
    routing = Routing.uniform(model)
    workload = Workload(
        prompt_tokens=256, output_tokens=128, num_beams=1, batch_size=1, max_seq_len=512
    )
    problem = choose_chunk(model, machine, routing, workload, Budget(gpu_bytes=10**9))
    solution = place([problem.cost(routing)], problem.memory_limits())
    assert solution.status in ("optimal", "stopped early")  # not at the time limit
    assert solution.gap <= 0.005


def test_infeasible_budgets_are_refused():
    costs, limits = random_instance(random.Random(2))
    limits = replace(limits, gpu_bytes=-limits.block_bytes)
    steps = {phase: phase.steps for phase in costs[0].phases}
    for solve in (lambda: place(costs, limits), lambda: relaxed_s(costs, [limits], steps)):
        with pytest.raises(FiddlerError, match="the solver found no placement") as caught:
            solve()
        assert "\n" not in str(caught.value)


def test_unused_memory_goes_to_the_most_used_experts():
    """If the launch overhead exceeds all experts' times, all placements take the same time."""
    model = small_model()
    routing = random_routing(model, random.Random(7))
    machine = machine_profile(model, dense=900.0, dense_device=1.0)
    workload = Workload(prompt_tokens=1, output_tokens=8, num_beams=1, batch_size=1, max_seq_len=64)
    cost = CostModel.build(model, machine, routing, workload, 64)
    program = Program([cost], MemoryLimits(1, 9), {phase: phase.steps for phase in cost.phases})
    assert program.solve() == "optimal"
    first, second, third = cost.by_popularity()[:3]
    rows = program.placement().resident
    assert [rows[layer][expert] for layer, expert in (first, second, third)] == [4, 4, 1]
