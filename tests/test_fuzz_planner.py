"""Damaged files that the planner reads: a valid result, or an error of one line, and soon."""

import io
import json
import random
import time
from collections.abc import Callable

import numpy as np
import pytest
import yaml
from conftest import DEMO
from planning import machine_profile, small_model
from rich.console import Console
from test_calibrate import BUDGET, MACHINE, MADE, MODEL, ROUTING, WORKLOAD, result_of
from transformers import AutoTokenizer

from fiddler_opt.calibrate import Result, calibrate, print_calibration
from fiddler_opt.compiler import compile_plan
from fiddler_opt.machine import MachineProfile
from fiddler_opt.problem import Budget, Problem
from fiddler_opt.prompts import encode_prompts, read_prompts
from fiddler_opt.report import print_machine, print_routing
from fiddler_opt.routing import Routing, RoutingProfile
from fiddler_opt.scaling import with_rates
from fiddler_opt.trace_routing import RoutingTrace, routing_profile
from fiddler_run.errors import FiddlerError
from fiddler_run.plan import Plan

NASTY_VALUES = [
    *(0, 1, -1, 2, 7, 2**31, 2**53 + 1, 2**63, 10**9, 10**18, 10**30, 10**400, -(10**400)),
    *(0.0, -0.0, 0.5, 1.0, 5e-324, 1e-300, 1e-12, 1e12, 1e300, 1.7e308),
    *(float("inf"), float("-inf"), float("nan")),
    *(True, False, None, "", "x", "1", "\0", "\ud83d", "é" * 300, "cuda", "host"),
    *([], {}, [[]], [0], {"a": 1}, {1: 2}, [None], "[" * 3000),
]
NASTY_TEXTS = [
    *("&a [1]", "*a", "!!set {a}", "!!int ''", "!!float ''", "!!bool x", "!!timestamp x", "!!python/name:os.system"),
    *("[" * 1000, "{" * 1000, "- " * 500, "9" * 5000, "0x" + "f" * 5000, "1:2:" * 2000, "1e999", ".nan", ".inf"),
    *("\ufeff", "\t", "\0", "\x85", "\u2028", "\r", "\n---\n", "\n...\n", "? [a]: b", "<<: *a", "\\UFFFFFFFF"),
    *('"\\ud83d"', "%YAML 9.9\n", "#", ": ", "'", '"', "@", "`", "2026-13-45", "~"),
]


def places(data: object) -> list[tuple[dict | list, object]]:
    """Each (container, key or index) inside `data`."""
    items = list(data.items()) if isinstance(data, dict) else list(enumerate(data)) if isinstance(data, list) else []
    return [(data, key) for key, _ in items] + [place for _, value in items for place in places(value)]


def mutate_value(data: object, rng: random.Random) -> None:
    """Changes one value or key in place: another type or size, deleted, moved, exchanged, renamed."""
    found = places(data)
    if not found:
        return
    box, key = rng.choice(found)
    other, other_key = rng.choice(found)
    kind = rng.choice([0, 1, 2, 3, 3, 3, 4, 5])
    if kind == 0:
        del box[key]
    elif kind == 1:
        box[key], other[other_key] = json_copy(other[other_key]), json_copy(box[key])
    elif kind == 2 and isinstance(box, dict):
        box[rng.choice([other_key, "x", 0, 3, 1.5, 10**20, f"{key}_"])] = box.pop(key)
    elif kind == 3 and isinstance(box[key], (int, float)):
        box[key] = scaled(box[key], rng.choice([-25, -9, -3, -1, 1, 3, 9, 25]))
    elif kind == 4 and isinstance(other, dict):
        other[key] = json_copy(box[key])
    else:
        box[key] = rng.choice(NASTY_VALUES)


def scaled(value: float, power: int) -> float:
    if isinstance(value, float):
        return value * 10.0**power
    return value * 10**power if power > 0 else value // 10**-power


def json_copy(value: object) -> object:
    """A copy that shares nothing, so that no cycle arises."""
    if isinstance(value, dict):
        return {key: json_copy(each) for key, each in value.items()}
    return [json_copy(each) for each in value] if isinstance(value, list) else value


def mutate_text(text: str, rng: random.Random) -> str:
    """Changes some characters: flipped, cut out, said twice, another digit, a trick put in."""
    at = rng.randrange(len(text) + 1)
    length = rng.choice([1, 1, 2, 8, 64, 512])
    kind = rng.randrange(5)
    if kind == 0:
        return text[:at] + text[at + length :]
    if kind == 1:
        return text[:at] + text[at : at + length] * 2 + text[at + length :]
    if kind == 2:
        return text[:at] + rng.choice(NASTY_TEXTS) + text[at + rng.choice([0, length]) :]
    if kind == 3:
        digits = [place for place, letter in enumerate(text) if letter.isdigit()] or [0]
        place = rng.choice(digits)
        return text[:place] + rng.choice(["0", "9", "-", "99999999", "e", "."]) + text[place + 1 :]
    return text[:at] + chr(rng.choice([0, 9, 27, 127, 255, 0x2028, 0xFEFF, 0x1F600])) + text[at + 1 :]


def mutated(data: object, dump: Callable[[object], str], rng: random.Random) -> bytes:
    """The file of `data`, damaged once or several times."""
    data = json_copy(data)
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        mutate_value(data, rng)
    text = dump(data)
    for _ in range(rng.choice([0, 0, 1, 3])):
        text = mutate_text(text, rng)
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    if rng.random() < 0.1 and content:
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def as_yaml(data: object) -> str:
    return yaml.dump(data, Dumper=NoAliases, sort_keys=False)


class NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def as_json(data: object) -> str:
    return json.dumps({str(key): value for key, value in data.items()} if isinstance(data, dict) else data)


def quiet_console() -> Console:
    return Console(file=io.StringIO(), width=80)


def holds(work: Callable[[], object]) -> None:
    """Does the work, whose outcome is a result or an error of one line, within ten seconds."""
    started, said = time.monotonic(), "a result"
    try:
        work()
    except FiddlerError as error:
        said = str(error)
    assert len(said.splitlines()) == 1
    assert time.monotonic() - started < 10


@pytest.fixture(scope="module")
def routed() -> dict:
    """A routing profile of the small model."""
    rng = np.random.default_rng(0)
    experts = np.stack([[rng.permutation(4)[:2] for _ in range(2)] for _ in range(60)]).astype(np.uint8)
    trace = RoutingTrace(
        experts=experts,
        prompt=np.repeat(np.arange(4), 15).astype(np.int32),
        decode=np.tile(np.arange(15) >= 10, 4),
        prompt_sets=np.array([0, 0, 1, 1], dtype=np.int32),
        set_names=["a", "b"],
        fingerprint="",
    )
    return routing_profile(trace, MODEL.shape, "test", 6).model_dump()


@pytest.mark.parametrize("seed", range(120))
def test_machine_profiles(seed):
    rng = random.Random(seed)
    kind = rng.choice(["cuda", "cuda", "host"])
    profile = machine_profile(MODEL, kind=kind, disk_bytes_per_s=rng.choice([None, 1e9]))
    content = mutated(profile.model_dump(), as_yaml, rng).decode("utf-8", "replace")
    budget = Budget(rng.choice([0, 3 * 10**8, 5 * 10**8]), rng.choice([None, None, 10**5]))

    def work() -> None:
        machine = MachineProfile.parse(content, "m.yaml")
        print_machine(quiet_console(), machine)
        plan = compile_plan(MODEL, machine, ROUTING, WORKLOAD, budget, MADE)
        assert Plan.parse(plan.dump(), "p.yaml") == plan
        assert plan.predicted.bound_tokens_per_s >= plan.predicted.decode_tokens_per_s
        faster = with_rates(machine, ram_bytes_per_s=3e10)
        compile_plan(MODEL, faster, ROUTING, WORKLOAD, budget, MADE)

    holds(work)


@pytest.mark.parametrize("seed", range(100))
def test_routing_profiles(seed, routed):
    content = mutated(routed, as_yaml, random.Random(seed)).decode("utf-8", "replace")

    def work() -> None:
        profile = RoutingProfile.parse(content, "r.yaml")
        print_routing(quiet_console(), profile)
        routing = Routing.from_profile(profile, MODEL, "r.yaml")
        plan = compile_plan(MODEL, MACHINE, routing, WORKLOAD, Budget(3 * 10**8), MADE, robust=True)
        assert plan.predicted.bound_tokens_per_s >= plan.predicted.decode_tokens_per_s

    holds(work)


@pytest.fixture(scope="module")
def measured() -> tuple[Plan, Problem, dict]:
    plan = compile_plan(MODEL, MACHINE, ROUTING, WORKLOAD, BUDGET, MADE)
    problem = Problem(MODEL, MACHINE, WORKLOAD, BUDGET, plan.prefill_chunk_tokens)
    return plan, problem, result_of(plan, {"absent": 2.0}, {"dense": 0.5}).model_dump()


@pytest.mark.parametrize("seed", range(100))
def test_results_of_runs(seed, measured, tmp_path):
    plan, problem, data = measured
    file = tmp_path / "b.json"
    file.write_bytes(mutated(data, as_json, random.Random(seed)))

    def work() -> None:
        result = Result.load(file, plan)
        found = calibrate(plan, problem, ROUTING, result, "test")
        found.machine.save(tmp_path / "m.yaml")
        assert MachineProfile.load(tmp_path / "m.yaml") == found.machine
        print_calibration(quiet_console(), plan, result, found, file)

    holds(work)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.mark.parametrize("seed", range(100))
def test_prompts(seed, tokenizer, tmp_path):
    rng = random.Random(seed)
    asked = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    shares = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    entries = ["Once upon a time", {"prompt": "a"}, {"body": {"messages": asked}}, {"conversations": shares}]
    kind = rng.choice(["p.json", "p.jsonl", "p.txt"])

    def lines(data: list) -> str:
        return "\n".join(json.dumps(each) for each in data)

    file = tmp_path / kind
    file.write_bytes(mutated(entries, as_json if kind == "p.json" else lines, rng))
    holds(lambda: encode_prompts(tokenizer, read_prompts(file), 256, kind))


def test_a_model_of_absurd_size_is_refused_soon():
    model = small_model(num_layers=1000, num_experts=4096)
    holds(lambda: compile_plan(model, MACHINE, Routing.uniform(model), WORKLOAD, BUDGET, MADE))


@pytest.mark.parametrize("seed", range(40))
def test_machines_at_the_bounds_of_the_schema(seed):
    """Every number in bounds, and nothing that they have in common."""
    rng = random.Random(seed)
    data = machine_profile(MODEL, kind=rng.choice(["cuda", "host"])).model_dump()
    for box, key in places(data):
        if isinstance(box[key], float) and rng.random() < 0.5:
            box[key] = 10.0 ** rng.uniform(-3, 15)
    host_bytes = rng.choice([None, None, 10**5])
    data["disk_bytes_per_s"] = 10.0 ** rng.uniform(-6, 18) if host_bytes else None
    machine = MachineProfile.model_validate(data)
    budget = Budget(rng.choice([0, 3 * 10**8, 5 * 10**8]), host_bytes)

    def work() -> None:
        plan = compile_plan(MODEL, machine, ROUTING, WORKLOAD, budget, MADE)
        assert Plan.parse(plan.dump(), "p.yaml") == plan
        assert plan.predicted.bound_tokens_per_s >= plan.predicted.decode_tokens_per_s
        assert plan.predicted.gap < 0.05

    holds(work)
