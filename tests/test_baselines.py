"""Baseline placements fit in memory, and the integer program's plan is never worse."""

import random

import pytest
from exhaustive import EXACT, fits
from planning import machine_profile, random_routing, small_model

from fiddler_opt.inputs.routing import Routing
from fiddler_opt.solve.baselines import BASELINES, place_by_rule
from fiddler_opt.solve.comparison import compared
from fiddler_opt.solve.compiler import by_rule, compile_plan
from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.ilp import place
from fiddler_opt.solve.placement import MemoryLimits, Placement
from fiddler_opt.solve.problem import Problem
from fiddler_opt.solve.times import host_times
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Budget, Workload

WORKLOAD = Workload(prompt_tokens=12, output_tokens=20, num_beams=1, batch_size=1, max_seq_len=64)
PROVENANCE = dict.fromkeys(
    ("command", "machine", "machine_sha256", "machine_source", "routing", "created"), "test"
)


def machine_with_link(model, cpu: float = 90.0, link: float = 120.0, **kwargs):
    """A machine with times of the CPU alone, the best share and the link alone."""
    machine = machine_profile(model, host=60.0, disk_bytes_per_s=1e8, **kwargs)
    by_share = {0.0: cpu, 0.25: 60.0, 1.0: link}
    return machine.model_copy(update={"host_expert_us": {1: by_share, 8: by_share}})


@pytest.mark.parametrize("seed", range(12))
def test_no_baseline_beats_the_program(seed):
    rng = random.Random(seed)
    model = small_model(num_layers=2, num_experts=4)
    machine = machine_with_link(model, dense_device=0.5)
    routing = random_routing(model, rng)
    num_blocks = 2 * 4 * model.blocks_per_expert
    host = rng.choice([None, rng.randint(0, num_blocks) * model.block_bytes])
    limits = MemoryLimits(model.block_bytes, rng.randint(0, num_blocks) * model.block_bytes, host)
    best = place([CostModel.build(model, machine, routing, WORKLOAD, 64)], limits)
    for rule in BASELINES.values():
        cost = CostModel.build(model, machine, routing, WORKLOAD, 64, rule.policy)
        placement = place_by_rule(rule, cost, limits)
        assert fits(placement, cost, limits)
        assert best.objective_s <= cost.total_s(placement) * (1 + EXACT)


def test_baseline_placements_by_hand():
    """Two layers of three experts of four blocks.

    By popularity, layer 0 has the order 1, 2, 0 and layer 1 has 2, 0, 1.
    """
    model = small_model(num_layers=2, num_experts=3, num_experts_per_tok=1)
    phase = [[0.30, 0.36, 0.34], [0.35, 0.20, 0.45]]
    routing = Routing.uniform(model)
    routing = Routing("by hand", *(type(routing.decode)(phase, routing.decode.pair),) * 2)
    cost = CostModel.build(model, machine_with_link(model), routing, WORKLOAD, 64)
    limits = MemoryLimits(1, 14)
    rows = {name: place_by_rule(rule, cost, limits).resident for name, rule in BASELINES.items()}
    assert rows == {
        "greedy": [[0, 4, 2], [4, 0, 4]],
        "uniform": [[2, 2, 2], [2, 2, 2]],
        "layers": [[0, 0, 0], [4, 4, 4]],
        "fiddler": [[0, 4, 0], [4, 0, 4]],
        "stream": [[0, 4, 0], [4, 0, 4]],
        "cpu": [[0, 0, 0], [0, 0, 0]],
    }
    on_disk = place_by_rule(BASELINES["cpu"], cost, MemoryLimits(1, 14, host_bytes=18)).on_disk
    assert on_disk == [[2, 0, 0], [0, 4, 0]]  # the least used lie on disk


def test_policies_take_their_own_times():
    machine = machine_with_link(small_model())
    times = {
        policy: host_times(machine, policy)[1] for policy in ("together", "cpu", "link", "better")
    }
    assert times == {"together": 60.0, "cpu": 90.0, "link": 120.0, "better": 90.0}
    problem = Problem(
        small_model(),
        machine_profile(small_model(), kind="cpu"),
        WORKLOAD,
        Budget(gpu_bytes=10**9),
        64,
    )
    with pytest.raises(FiddlerError, match="needs a GPU"):
        problem.cost(Routing.uniform(small_model()), "link")


@pytest.mark.parametrize(
    ("name", "share"), [("greedy", {1: 0.25, 8: 0.25}), ("stream", {1: 1.0}), ("cpu", {1: 0.0})]
)
def test_baseline_gives_a_plan(name, share):
    model = small_model()
    routing = Routing.uniform(model)
    machine = machine_with_link(model, memory_bytes=10**9)
    budget = Budget(gpu_bytes=10**9)
    plan = compile_plan(model, machine, routing, WORKLOAD, budget, PROVENANCE, placer=by_rule(name))
    best = compile_plan(model, machine, routing, WORKLOAD, budget, PROVENANCE)
    assert best.predicted.alternatives == {}
    best = compared(best, Problem.of(best, model, machine), routing)
    assert plan.rank.stream_share == share
    assert plan.predicted.decode_tokens_per_s <= best.predicted.decode_tokens_per_s
    expected = best.predicted.alternatives[name]
    assert plan.predicted.decode_tokens_per_s == expected.decode_tokens_per_s
    assert plan.predicted.ttft_s == expected.ttft_s


def test_parts_of_the_cost_add_up():
    model = small_model()
    rng = random.Random(2)
    for kind in ("cuda", "cpu"):
        machine = machine_profile(
            model, kind=kind, dense=30.0, dense_device=4.0, disk_bytes_per_s=1e8
        )
        cost = CostModel.build(model, machine, random_routing(model, rng), WORKLOAD, 8)
        placement = Placement([[4, 1, 0, 0], [0, 2, 0, 4]], [[0, 1, 2, 0], [4, 0, 0, 0]])
        parts = cost.step_parts(cost.decode, placement)
        assert sum(parts.values()) == pytest.approx(cost.decode_step_s(placement))
        assert parts["disk"] > 0
        steps = sum(phase.steps * cost.step_s(phase, placement) for phase in cost.phases)
        assert cost.total_s(placement) == pytest.approx(steps)
        assert sum(cost.ttft_parts(placement).values()) + 19 * cost.decode_step_s(
            placement
        ) == pytest.approx(steps)
        layers = sum(cost.layer_s(layer, placement) for layer in range(2))
        fixed = sum(p.steps * sum(cost.fixed_s[p.name].values()) for p in cost.phases)
        assert layers + fixed == pytest.approx(steps)
