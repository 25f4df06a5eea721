"""Equal experts share a variable of the integer program."""

import random

import pytest
from exhaustive import EXACT, Exhaustive, fits
from planning import machine_profile, routed, small_model

from fiddler_opt.inputs.routing import Routing
from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.equal import equal_experts, spread
from fiddler_opt.solve.ilp import place
from fiddler_opt.solve.placement import MemoryLimits
from fiddler_opt.solve.program import Program
from fiddler_run.plan.schema import Workload

WORKLOAD = Workload(prompt_tokens=10, output_tokens=5, num_beams=1, batch_size=2, max_seq_len=64)


def cost_model(expert: list[list[float]], **times: float) -> CostModel:
    """The costs where a token calls one expert, with these probabilities by layer."""
    sizes = {"num_layers": len(expert), "num_experts": len(expert[0]), "num_experts_per_tok": 1}
    model = small_model(intermediate_size=96, **sizes)
    machine = machine_profile(model, disk_bytes_per_s=1e9, **times)
    return CostModel.build(model, machine, routed("by hand", expert, [{}]), WORKLOAD, 64)


def test_blocks_are_spread_evenly():
    assert spread(7, 3) == [3, 2, 2]
    assert spread(6, 3) == [2, 2, 2]
    assert spread(0, 2) == [0, 0]


def test_experts_are_equal_if_every_routing_treats_them_alike():
    first = cost_model([[0.25, 0.5, 0.25, 0.0, 0.0]])
    second = cost_model([[0.4, 0.1, 0.1, 0.2, 0.2]])
    assert equal_experts([first], first.phases, 0) == [[0, 2], [1], [3, 4]]
    assert equal_experts([second], second.phases, 0) == [[0], [1, 2], [3, 4]]
    assert equal_experts([first, second], first.phases, 0) == [[0], [1], [2], [3, 4]]


def test_uniform_routing_needs_one_variable_per_layer():
    model = small_model(num_layers=3, num_experts=8, num_experts_per_tok=4)
    cost = CostModel.build(model, machine_profile(model), Routing.uniform(model), WORKLOAD, 64)
    program = Program([cost], MemoryLimits(1, 9), {cost.decode: 1}, relaxed=True)
    assert [list(row) for row in program.blocks.r] == [[0]] * 3


@pytest.mark.parametrize("seed", range(40))
def test_shared_variables_match_exhaustive_search(seed):
    rng = random.Random(seed)
    limited = rng.random() < 0.5
    rows = [[0.5, 0.5]] * 2 if limited else [[0.4, 0.4, 0.2], [0.3, 0.4, 0.3]]
    times = {name: rng.uniform(1, 90) for name in ("device", "host", "dense")}
    cost = cost_model(rows, **times, kind=rng.choice(["cuda", "cpu"]))
    num_blocks = cost.blocks_per_expert * sum(map(len, rows))
    host_bytes = rng.randint(0, num_blocks) if limited else None
    limits = MemoryLimits(1, rng.randint(0, num_blocks), host_bytes)
    solution = place([cost], limits)
    assert fits(solution.placement, cost, limits)
    best_s = Exhaustive(cost, limits).total_s(cost).min()
    assert best_s * (1 - 1e-9) <= solution.objective_s <= best_s * (1 + EXACT)
    assert solution.bound_s <= best_s * (1 + 1e-9)
