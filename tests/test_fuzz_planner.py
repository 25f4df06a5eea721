"""Damaged inputs of the planner give a valid result or an error of one line, in time."""

import io
import json
import random
import time
from collections.abc import Callable

import numpy as np
import pytest
from conftest import DEMO
from mutation import as_json, as_yaml, mutated, places
from planning import machine_profile, small_model
from rich.console import Console
from seeds import seeds
from test_calibrate import BUDGET, MACHINE, MODEL, PROVENANCE, ROUTING, WORKLOAD, result_of
from transformers import AutoTokenizer

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.routing import Routing
from fiddler_opt.inputs.routing_profile import RoutingProfile
from fiddler_opt.insight.bench_result import Result
from fiddler_opt.insight.calibrate import calibrate
from fiddler_opt.insight.calibration_report import print_calibration
from fiddler_opt.insight.machine_report import print_machine
from fiddler_opt.insight.routing_report import print_routing
from fiddler_opt.insight.scaling import with_rates
from fiddler_opt.measure.prompts import encode_prompts, read_prompts
from fiddler_opt.measure.routing import RoutingTrace, routing_profile
from fiddler_opt.solve.comparison import compared
from fiddler_opt.solve.compiler import compile_plan
from fiddler_opt.solve.problem import Problem
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Budget, Plan


def quiet_console() -> Console:
    return Console(file=io.StringIO(), width=80)


def assert_result_or_refusal(work: Callable[[], object]) -> None:
    """Asserts that `work` returns, or raises an error of one line, within ten seconds."""
    started = time.monotonic()
    message = "a result"
    try:
        work()
    except FiddlerError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    assert time.monotonic() - started < 10


@pytest.fixture(scope="module")
def routed() -> dict:
    """A routing profile of the small model."""
    rng = np.random.default_rng(0)
    experts = np.stack([[rng.permutation(4)[:2] for _ in range(2)] for _ in range(60)]).astype(
        np.uint8
    )
    trace = RoutingTrace(
        experts=experts,
        prompt=np.repeat(np.arange(4), 15).astype(np.int32),
        decode=np.tile(np.arange(15) >= 10, 4),
        prompt_sets=np.array([0, 0, 1, 1], dtype=np.int32),
        set_names=["a", "b"],
        fingerprint="",
    )
    return routing_profile(trace, MODEL.shape, "test", 6).model_dump()


@pytest.mark.parametrize("seed", seeds(40, 120))
def test_damaged_machine_profile_is_planned_or_refused(seed):
    rng = random.Random(seed)
    kind = rng.choice(["cuda", "cuda", "cpu"])
    profile = machine_profile(MODEL, kind=kind, disk_bytes_per_s=rng.choice([None, 1e9]))
    content = mutated(profile.model_dump(), as_yaml, rng).decode("utf-8", "replace")
    budget = Budget(
        gpu_bytes=rng.choice([0, 3 * 10**8, 5 * 10**8]), host_bytes=rng.choice([None, None, 10**5])
    )

    def work() -> None:
        machine = MachineProfile.parse(content, "m.yaml")
        print_machine(quiet_console(), machine)
        plan = compile_plan(MODEL, machine, ROUTING, WORKLOAD, budget, PROVENANCE)
        plan = compared(plan, Problem.of(plan, MODEL, machine), ROUTING)
        assert Plan.parse(plan.dump(), "p.yaml") == plan
        assert plan.predicted.bound_tokens_per_s >= plan.predicted.decode_tokens_per_s
        faster = with_rates(machine, ram_bytes_per_s=3e10)
        compile_plan(MODEL, faster, ROUTING, WORKLOAD, budget, PROVENANCE)

    assert_result_or_refusal(work)


@pytest.mark.parametrize("seed", seeds(30, 100))
def test_damaged_routing_profile_is_planned_or_refused(seed, routed):
    content = mutated(routed, as_yaml, random.Random(seed)).decode("utf-8", "replace")

    def work() -> None:
        profile = RoutingProfile.parse(content, "r.yaml")
        print_routing(quiet_console(), profile)
        routing = Routing.from_profile(profile, MODEL, "r.yaml")
        budget = Budget(gpu_bytes=3 * 10**8)
        worst_of = tuple(routing.sets.values())
        plan = compile_plan(MODEL, MACHINE, routing, WORKLOAD, budget, PROVENANCE, worst_of)
        plan = compared(plan, Problem.of(plan, MODEL, MACHINE), routing)
        assert Plan.parse(plan.dump(), "p.yaml") == plan
        assert plan.predicted.bound_tokens_per_s >= plan.predicted.decode_tokens_per_s

    assert_result_or_refusal(work)


@pytest.fixture(scope="module")
def measured() -> tuple[Plan, Problem, dict]:
    plan = compile_plan(MODEL, MACHINE, ROUTING, WORKLOAD, BUDGET, PROVENANCE)
    problem = Problem(MODEL, MACHINE, WORKLOAD, BUDGET, plan.prefill_chunk_tokens)
    return plan, problem, result_of(plan, {"host": 2.0}, {"dense": 0.5}).model_dump()


@pytest.mark.parametrize("seed", seeds(30, 100))
def test_damaged_bench_result_is_used_or_refused(seed, measured, tmp_path):
    plan, problem, data = measured
    file = tmp_path / "b.json"
    file.write_bytes(mutated(data, as_json, random.Random(seed)))

    def work() -> None:
        result = Result.load(file, plan)
        found = calibrate(plan, problem, ROUTING, result, "test")
        found.machine.save(tmp_path / "m.yaml")
        assert MachineProfile.load(tmp_path / "m.yaml") == found.machine
        print_calibration(quiet_console(), plan, result, found, file)

    assert_result_or_refusal(work)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.mark.parametrize("seed", seeds(30, 100))
def test_damaged_prompts_are_read_or_refused(seed, tokenizer, tmp_path):
    rng = random.Random(seed)
    asked = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
    ]
    shares = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    entries = [
        "Once upon a time",
        {"prompt": "a"},
        {"body": {"messages": asked}},
        {"conversations": shares},
    ]
    kind = rng.choice(["p.json", "p.jsonl", "p.txt"])

    def lines(data: list) -> str:
        return "\n".join(json.dumps(each) for each in data)

    file = tmp_path / kind
    file.write_bytes(mutated(entries, as_json if kind == "p.json" else lines, rng))
    assert_result_or_refusal(lambda: encode_prompts(tokenizer, read_prompts(file), 256, kind))


def test_absurd_number_of_experts_is_refused():
    model = small_model(num_layers=13, num_experts=4096)
    with pytest.raises(FiddlerError, match="53248 experts in all layers"):
        compile_plan(model, MACHINE, Routing.uniform(model), WORKLOAD, BUDGET, PROVENANCE)


@pytest.mark.parametrize("seed", range(40))
def test_extreme_machines_are_planned_or_refused(seed):
    """Every number is within the schema's bounds, but they do not fit together."""
    rng = random.Random(seed)
    data = machine_profile(MODEL, kind=rng.choice(["cuda", "cpu"])).model_dump()
    for box, key in places(data):
        if isinstance(box[key], float) and rng.random() < 0.5:
            box[key] = 10.0 ** rng.uniform(-3, 15)
    host_bytes = rng.choice([None, None, 10**5])
    data["disk_bytes_per_s"] = 10.0 ** rng.uniform(-6, 18) if host_bytes else None
    machine = MachineProfile.model_validate(data)
    budget = Budget(gpu_bytes=rng.choice([0, 3 * 10**8, 5 * 10**8]), host_bytes=host_bytes)

    def work() -> None:
        plan = compile_plan(MODEL, machine, ROUTING, WORKLOAD, budget, PROVENANCE)
        plan = compared(plan, Problem.of(plan, MODEL, machine), ROUTING)
        assert Plan.parse(plan.dump(), "p.yaml") == plan
        assert plan.predicted.bound_tokens_per_s >= plan.predicted.decode_tokens_per_s
        assert plan.predicted.gap < 0.05

    assert_result_or_refusal(work)
