"""The cost model against numbers computed by hand."""

import random

import pytest
from planning import PAIRS, machine_profile, random_routing, routed, small_model

from fiddler_opt.inputs.machine import seconds_at
from fiddler_opt.inputs.routing import PhaseRouting, Routing
from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.lower import without_repetition
from fiddler_opt.solve.phases import workload_phases
from fiddler_opt.solve.placement import Placement
from fiddler_opt.solve.scenarios import chance_called
from fiddler_run.plan.schema import Workload
from fiddler_run.plan.split import interpolate

WORKLOAD = Workload(prompt_tokens=10, output_tokens=5, num_beams=1, batch_size=1, max_seq_len=64)


def test_times_are_interpolated_by_tokens():
    times = {1: 10.0, 4: 40.0, 8: 48.0}
    assert seconds_at(times, 1) == pytest.approx(10e-6)
    assert seconds_at(times, 2) == pytest.approx(20e-6)
    assert seconds_at(times, 6) == pytest.approx(44e-6)
    assert seconds_at(times, 16) == pytest.approx(96e-6)  # in proportion past the last point
    assert seconds_at(times, 0.5) == pytest.approx(10e-6)


def test_phases_by_hand():
    long = Workload(
        prompt_tokens=5000, output_tokens=100, num_beams=4, batch_size=1, max_seq_len=8192
    )
    assert [(p.name, p.steps, p.tokens) for p in workload_phases(long, 2048)] == [
        ("prefill", 2, 2048),
        ("prefill of the rest", 1, 903),
        ("prefill of the last token", 1, 4),
        ("decode", 99, 4),
    ]
    batch = long.model_copy(update={"num_beams": 1, "batch_size": 3})
    assert [(p.name, p.steps, p.tokens) for p in workload_phases(batch, 2048)] == [
        ("prefill", 2, 3 * 2048),
        ("prefill of the rest", 1, 3 * 904),
        ("decode", 99, 3),
    ]


def test_decode_step_by_hand():
    """Half of the tokens choose the experts (0,1), a quarter (0,2) and a quarter (1,2)."""
    model = small_model(num_layers=1, num_experts=3)
    routing = routed(
        "by hand", [[0.75, 0.75, 0.5]], [dict(zip(PAIRS[3], (0.5, 0.25, 0.25), strict=True))]
    )
    machine = machine_profile(model, device=10.0, host=80.0, dense=12.0, head=3.0)
    cost = CostModel.build(model, machine, routing, WORKLOAD, 64)
    assert cost.blocks_per_expert == 4
    # resident: expert 0 whole, expert 1 half, expert 2 not at all
    placement = Placement.of([[4, 2, 0]])
    pair_us = {
        (0, 1): max(10 + 5, 0 + 40),
        (0, 2): max(10 + 0, 0 + 80),
        (1, 2): max(5 + 0, 40 + 80),
    }
    experts_us = 0.5 * pair_us[0, 1] + 0.25 * pair_us[0, 2] + 0.25 * pair_us[1, 2]
    assert cost.decode_step_s(placement) == pytest.approx((3 + 12 + experts_us) * 1e-6)
    assert cost.hit_rate(placement) == pytest.approx((0.75 * 4 + 0.75 * 2) / (4 * 2))


def test_without_a_gpu_times_add_up():
    model = small_model(num_layers=1, num_experts=2)
    machine = machine_profile(model, device=10.0, host=80.0, kind="cpu", dense=2.0, head=1.0)
    cost = CostModel.build(model, machine, Routing.uniform(model), WORKLOAD, 64)
    assert cost.decode_step_s(Placement.of([[4, 2]])) == pytest.approx((3 + 10 + 5 + 40) * 1e-6)


def test_beams_choose_the_same_experts_at_first():
    """With a prompt of one token, the three beams call the same two of four experts."""
    model = small_model(num_layers=1, num_experts=4)
    machine = machine_profile(model, device=10.0, host=80.0, dense=12.0, head=3.0)
    beams = WORKLOAD.model_copy(update={"prompt_tokens": 1, "num_beams": 3})
    cost = CostModel.build(model, machine, Routing.uniform(model), beams, 64)
    nothing = Placement.of([[0] * 4])
    assert cost.ttft_s(nothing) == pytest.approx((3 + 12 + 2 * 80) * 1e-6)
    assert cost.decode_step_s(nothing) > (3 + 12 + 3 * 80) * 1e-6


def test_launch_overhead_is_hidden_behind_experts():
    """A layer without experts takes 57 us, of which experts wait for 12: experts that take less
    than 45 cost 45.
    """
    model = small_model(num_layers=1, num_experts=2)
    machine = machine_profile(
        model, device=10.0, host=80.0, dense=57.0, dense_device=12.0, head=3.0
    )
    cost = CostModel.build(model, machine, Routing.uniform(model), WORKLOAD, 64)
    assert cost.decode_step_s(Placement.of([[4, 4]])) == pytest.approx(
        (3 + 12 + max(45, 20)) * 1e-6
    )
    assert cost.decode_step_s(Placement.of([[0, 0]])) == pytest.approx(
        (3 + 12 + max(45, 160)) * 1e-6
    )


def test_each_phase_has_its_own_routing():
    model = small_model(num_layers=1, num_experts=2, num_experts_per_tok=1)
    first = ([[1.0, 0.0]], [{(0, 1): 0.0}])
    second = ([[0.0, 1.0]], [{(0, 1): 0.0}])
    routing = Routing("by hand", PhaseRouting(*first), PhaseRouting(*second))
    cost = CostModel.build(model, machine_profile(model), routing, WORKLOAD, 64)
    assert cost.hit_rate(Placement.of([[4, 0]])) == 0
    assert cost.hit_rate(Placement.of([[0, 4]])) == 1
    assert cost.ttft_s(Placement.of([[4, 0]])) < cost.ttft_s(Placement.of([[0, 4]]))


def test_times_scale_with_bytes():
    model = small_model()
    other = small_model(intermediate_size=256)
    machine = machine_profile(model, device=10.0, host=80.0)
    small, large = (
        CostModel.build(m, machine, Routing.uniform(m), WORKLOAD, 64) for m in (model, other)
    )
    first, second = (next(iter(c.scenarios["decode"][0])).ranks[0].host_s for c in (small, large))
    assert second[0] == pytest.approx(2 * first[0])


def test_zero_gpu_memory_costs_the_cpu_alone():
    """A plan without GPU memory makes does not use the GPU, and nothing overlaps.

    Dense weights, which were timed on the GPU, take the CPU as long as equal bytes of an expert.
    """
    model = small_model(num_layers=1, num_experts=2)
    machine = machine_profile(model, device=10.0, host=80.0, dense=2.0, head=1.0, cpu=120.0)
    cost = CostModel.build(model, machine, Routing.uniform(model), WORKLOAD, 64, cpu_alone=[0])
    of_an_expert = (model.dense_layer_bytes + model.head_bytes) / model.expert_bytes
    assert cost.decode_step_s(Placement.of([[0, 0]])) == pytest.approx(
        (3 + (2 + of_an_expert) * 120) * 1e-6
    )


@pytest.mark.parametrize("tokens", [1, 3, 24, 100])
def test_dropping_redundant_shares_keeps_the_interpolation(tokens):
    """The runtime must stream the shares that were costed, also between the profile's tokens."""
    share = {1: 0.0, 4: 0.0, 8: 0.0, 32: 0.5, 64: 1.0, 128: 1.0, 256: 1.0}
    kept = without_repetition(share)
    assert kept == {1: 0.0, 8: 0.0, 32: 0.5, 64: 1.0, 256: 1.0}
    assert interpolate(kept, tokens) == pytest.approx(interpolate(share, tokens))


def test_chance_called_by_hand():
    assert chance_called(0.25, 1) == pytest.approx(0.25)
    assert chance_called(0.25, 2) == pytest.approx(1 - 0.75**2)


def test_total_is_the_sum_of_its_phases():
    model = small_model()
    routing = random_routing(model, random.Random(0))
    cost = CostModel.build(model, machine_profile(model), routing, WORKLOAD, 64)
    placement = Placement.of([[1, 2, 3, 0], [4, 4, 0, 0]])
    assert cost.total_s(placement) == pytest.approx(
        cost.ttft_s(placement) + 4 * cost.decode_step_s(placement)
    )


def test_unseen_pair_costs_nothing():
    model = small_model(num_layers=1, num_experts=3)
    routing = routed("by hand", [[1.0, 1.0, 0.0]], [{(0, 1): 1.0, (0, 2): 0.0, (1, 2): 0.0}])
    cost = CostModel.build(model, machine_profile(model), routing, WORKLOAD, 64)
    assert cost.total_s(Placement.of([[2, 2, 0]])) == cost.total_s(Placement.of([[2, 2, 4]]))
