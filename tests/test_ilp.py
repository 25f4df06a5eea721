"""The integer program against exhaustive search, and what more memory and faster machines must do."""

import random
from dataclasses import replace
from itertools import product

import pytest
from conftest import DEMO, ROOT
from planning import machine_profile, random_routing, small_model

from fiddler_opt.compiler import choose_chunk
from fiddler_opt.cost import CostModel, Placement
from fiddler_opt.ilp import RELATIVE_GAP, Room, place, relaxed_s
from fiddler_opt.machine import MachineProfile
from fiddler_opt.model import ModelSpec
from fiddler_opt.problem import Budget
from fiddler_opt.routing import Routing
from fiddler_run.errors import FiddlerError
from fiddler_run.plan import Workload

EXACT = 2 * RELATIVE_GAP


def random_instance(rng: random.Random) -> tuple[list[CostModel], Room]:
    """Cost models of at most 4,096 placements, and room for some of them; with any feature on or off.

    Features: a GPU or none; one expert or two a token; one sequence or several; Python slower or faster than experts; the
    embedding movable or not; host memory limited, with the rest on disk, or not; one routing or several at once.
    """
    limited = rng.random() < 0.4
    layers, experts, neurons = rng.choice(
        [(1, 3, 96), (2, 2, 64)] if limited else [(1, 3, 128), (1, 5, 128), (2, 3, 96), (2, 2, 160)]
    )
    top_k = rng.choice([1, 2, 2, 2]) if experts > 2 else 1
    model = small_model(num_layers=layers, num_experts=experts, intermediate_size=neurons, num_experts_per_tok=top_k)
    machine = machine_profile(
        model,
        device=rng.uniform(1, 60),
        absent=rng.uniform(20, 100),
        dense=rng.uniform(1, 60),
        dense_device=rng.uniform(1, 10),
        kind=rng.choice(["cuda", "cuda", "host"]),
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
    every = layers * experts * costs[0].blocks_per_expert
    size, embedding_bytes = model.block_bytes, rng.choice([0, rng.randint(1, 3 * model.block_bytes)])
    gpu_bytes = rng.randint(0, every + 2) * size + rng.randint(0, size - 1)
    host_bytes = embedding_bytes + rng.randint(0, every) * size + rng.randint(0, size - 1) if limited else None
    return costs, Room(size, gpu_bytes, host_bytes, embedding_bytes)


def fits(placement: Placement, cost: CostModel, room: Room) -> bool:
    """The program's constraints, written once more."""
    resident, on_disk = (sum(map(sum, rows)) for rows in (placement.resident, placement.on_disk))
    absent = cost.blocks_per_expert * sum(map(len, cost.called)) - resident - on_disk
    on_gpu, in_host = (0, room.embedding_bytes) if placement.host_embedding else (room.embedding_bytes, 0)
    rows = zip(placement.resident, placement.on_disk, strict=True)
    whole = all(min(r, d) >= 0 and r + d <= cost.blocks_per_expert for row in rows for r, d in zip(*row, strict=True))
    host = room.host_bytes is None or absent * room.block_bytes + in_host <= room.host_bytes
    return whole and resident * room.block_bytes + on_gpu <= room.gpu_bytes and host


def placements(cost: CostModel, room: Room):
    """All that fit."""
    layers, experts, blocks = len(cost.called), len(cost.called[0]), cost.blocks_per_expert
    disk = range(blocks + 1) if room.host_bytes is not None else range(1)
    of_expert = [(r, d) for r in range(blocks + 1) for d in disk if r + d <= blocks]
    for counts in product(of_expert, repeat=layers * experts):
        rows = [counts[layer * experts : (layer + 1) * experts] for layer in range(layers)]
        resident, on_disk = ([[both[place] for both in row] for row in rows] for place in (0, 1))
        for host_embedding in (False, True) if room.embedding_bytes else (False,):
            placement = Placement(resident, on_disk, host_embedding)
            if fits(placement, cost, room):
                yield placement


@pytest.mark.parametrize("seed", range(220))
def test_equals_exhaustive_search(seed):
    costs, room = random_instance(random.Random(seed))
    every = list(placements(costs[0], room))
    if not every:  # the embedding alone is too large
        with pytest.raises(FiddlerError, match="no placement"):
            place(costs, room)
        return
    best_s = min(max(cost.total_s(placement) for cost in costs) for placement in every)
    fastest_decode_s = max(min(cost.decode_step_s(placement) for placement in every) for cost in costs)
    solution = place(costs, room)
    assert fits(solution.placement, costs[0], room)
    assert solution.status == "optimal"
    assert solution.objective_s == pytest.approx(max(cost.total_s(solution.placement) for cost in costs))
    assert best_s * (1 - 1e-9) <= solution.objective_s <= best_s * (1 + EXACT)
    assert solution.bound_s <= best_s * (1 + 1e-9)
    assert solution.gap <= EXACT
    assert solution.decode_bound_s <= fastest_decode_s * (1 + 1e-9)


def test_one_token_and_a_slow_cpu_is_greedy_by_popularity():
    """Where absent blocks always take longer, time falls with each expert's popularity alone, so greedy is optimal."""
    model = small_model(num_layers=2, num_experts=4)
    routing = random_routing(model, random.Random(5))
    machine = machine_profile(model, device=1e-3, absent=80.0)
    workload = Workload(prompt_tokens=1, output_tokens=63, num_beams=1, batch_size=1, max_seq_len=64)
    cost = CostModel.build(model, machine, routing, workload, 64)
    budget = 13
    order = sorted(((-p, layer, e) for layer, row in enumerate(routing.decode.expert) for e, p in enumerate(row)))
    greedy, left = [[0] * 4, [0] * 4], budget
    for _, layer, expert in order:
        greedy[layer][expert] = min(left, cost.blocks_per_expert)
        left -= greedy[layer][expert]
    solution = place([cost], Room(1, budget))
    assert solution.objective_s == pytest.approx(cost.total_s(Placement.of(greedy)), rel=EXACT)


@pytest.mark.parametrize("kind", ["gpu_bytes", "host_bytes"])
def test_more_memory_is_never_slower(kind):
    for seed in range(12):
        costs, room = random_instance(random.Random(1000 + seed))
        room = replace(room, gpu_bytes=room.embedding_bytes + 3 * room.block_bytes, host_bytes=room.host_bytes)
        if kind == "host_bytes" and room.host_bytes is None:
            continue
        more = [replace(room, **{kind: room.embedding_bytes + blocks * room.block_bytes}) for blocks in range(0, 16, 3)]
        times = [place(costs, each).objective_s for each in more]
        assert all(later <= earlier * (1 + EXACT) for earlier, later in zip(times, times[1:], strict=False))


def test_memory_that_is_of_use_is_not_left_empty():
    """Where the CPU stands in for the GPU every placement takes the same time; the budget is used all the same."""
    model = small_model()
    machine = machine_profile(model, device=80.0, absent=80.0, kind="host")
    workload = Workload(prompt_tokens=8, output_tokens=8, num_beams=1, batch_size=1, max_seq_len=64)
    cost = CostModel.build(model, machine, random_routing(model, random.Random(3)), workload, 64)
    assert sum(map(sum, place([cost], Room(1, 9)).placement.resident)) == 9


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e9])
def test_units_of_time_do_not_matter(scale):
    """The solver's tolerances are absolute; a machine that is a million times faster gets the same plans."""
    for seed in range(6):
        costs, room = random_instance(random.Random(seed))
        every = list(placements(costs[0], room))
        if not every:
            continue
        costs = [scaled(cost, scale) for cost in costs]
        best_s = min(max(cost.total_s(placement) for cost in costs) for placement in every)
        solution = place(costs, room)
        assert solution.objective_s <= best_s * (1 + EXACT)
        assert solution.bound_s <= best_s * (1 + 1e-9)
        assert solution.gap <= EXACT


def scaled(cost: CostModel, scale: float) -> CostModel:
    def times(values: dict) -> dict:
        return {key: value * scale for key, value in values.items()}

    return replace(
        cost,
        fixed_s={name: times(parts) for name, parts in cost.fixed_s.items()},
        queueing_s=times(cost.queueing_s),
        host_embedding_s=times(cost.host_embedding_s),
        scenarios={
            name: [
                [
                    replace(
                        each,
                        resident_s=times(each.resident_s),
                        absent_s=times(each.absent_s),
                        disk_s=times(each.disk_s),
                    )
                    for each in layer
                ]
                for layer in layers
            ]
            for name, layers in cost.scenarios.items()
        },
    )


def test_equal_experts_do_not_keep_the_solver_busy():
    """The demo model on a GPU that holds nearly all of it: any of very many placements is as good."""
    model = ModelSpec.load(str(DEMO))
    machine = MachineProfile.load(ROOT / "profiles" / "rtx4090.machine.yaml")
    routing = Routing.uniform(model)
    workload = Workload(prompt_tokens=256, output_tokens=128, num_beams=1, batch_size=1, max_seq_len=512)
    problem = choose_chunk(model, machine, routing, workload, Budget(10**9))
    solution = place([problem.cost(routing)], problem.room())
    assert solution.gap <= 0.005
    assert solution.solve_s < 15


def test_budgets_that_nothing_fits_in():
    """Neither memory holds the embedding."""
    costs, room = random_instance(random.Random(2))
    room = Room(room.block_bytes, 0, 0, embedding_bytes=10 * room.block_bytes)
    steps = {phase: phase.steps for phase in costs[0].phases}
    for solve in (lambda: place(costs, room), lambda: relaxed_s(costs, room, steps)):
        with pytest.raises(FiddlerError, match="the solver found no placement") as caught:
            solve()
        assert "\n" not in str(caught.value)
