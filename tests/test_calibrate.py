"""`fiddler-opt calibrate`: a profile corrected by a run, and what would follow from it."""

import json
from dataclasses import replace

import pytest
from planning import machine_profile, small_model
from test_commands import SHIPPED_PLAN, assert_refused, run

from fiddler_opt.calibrate import Phase, Result, Speeds, calibrate
from fiddler_opt.compiler import compile_plan
from fiddler_opt.machine import MachineProfile, seconds_at
from fiddler_opt.problem import Budget, Problem
from fiddler_opt.routing import Routing
from fiddler_run.errors import FiddlerError
from fiddler_run.plan import Workload

WORKLOAD = Workload(prompt_tokens=12, output_tokens=20, num_beams=1, batch_size=1, max_seq_len=64)
MADE = dict.fromkeys(("command", "machine", "machine_sha256", "machine_source", "routing", "created"), "test")
MODEL = small_model(num_layers=2, num_experts=4)
MACHINE = machine_profile(MODEL, device=10.0, absent=80.0, dense=12.0, head=3.0)
ROUTING = Routing.uniform(MODEL)
BUDGET = Budget(5 * 10**8)  # room for everything


@pytest.fixture(scope="module")
def problem():
    plan = compile_plan(MODEL, MACHINE, ROUTING, WORKLOAD, BUDGET, MADE)
    return plan, Problem(MODEL, MACHINE, WORKLOAD, BUDGET, plan.prefill_chunk_tokens)


def result_of(plan, prefill: dict[str, float], decode: dict[str, float]) -> Result:
    """A run in which each part took so many times what the profile says."""

    def phase(times: dict[str, float], tokens: int, per_expert: float) -> Phase:
        def rate(part: str, us: dict) -> float:
            return MODEL.expert_bytes / (seconds_at(us, per_expert) * times.get(part, 1.0))

        return Phase(
            ms={
                "dense": 2 * seconds_at(MACHINE.dense_device_us, tokens) * 1e3 * times.get("dense", 1.0),
                "head": seconds_at(MACHINE.head_us, tokens) * 1e3 * times.get("head", 1.0),
            },
            bytes_per_s={
                "absent": rate("absent", MACHINE.best_absent_us),
                "resident": rate("resident", MACHINE.device_expert_us),
                "CPU": 1e9,
            },
            passes=1,
            tokens_per_pass=tokens,
            tokens_per_expert=per_expert,
        )

    measured = Speeds(prompt_tokens=12, output_tokens=20, ttft_s=0.1, decode_tokens_per_s=9.0)
    phases = {"prefill": phase(prefill, 12, 6.5), "decode": phase(decode, 1, 1.0)}
    return Result(plan=plan.provenance, num_beams=1, batch_size=1, measured=measured, **phases)


def test_a_run_as_predicted_changes_nothing(problem):
    plan, made_from = problem
    found = calibrate(plan, made_from, ROUTING, result_of(plan, {}, {}), "test")
    assert [term.factor for term in found.terms] == pytest.approx([1.0] * 8)
    assert not found.another_wins
    assert found.machine.provenance.command == "test"
    assert found.machine.model_copy(update={"provenance": MACHINE.provenance}) == MACHINE
    assert found.now_s == pytest.approx(made_from.cost(ROUTING).total_s(found.placement))


def test_each_table_is_corrected_by_its_own_terms(problem):
    """By the nearest where it was not measured, between in proportion to the logarithm of tokens."""
    plan, made_from = problem
    result = result_of(plan, {"absent": 4.0, "dense": 1.0}, {"absent": 2.0, "resident": 3.0, "dense": 0.5, "head": 1.5})
    machine = calibrate(plan, made_from, ROUTING, result, "test").machine
    absent = MACHINE.absent_expert_us
    assert machine.absent_expert_us[1] == {share: pytest.approx(2 * us) for share, us in absent[1].items()}
    assert machine.absent_expert_us[8] == {share: pytest.approx(4 * us) for share, us in absent[8].items()}
    assert machine.device_expert_us[1] == pytest.approx(3 * MACHINE.device_expert_us[1])
    assert machine.dense_device_us[1] == pytest.approx(0.5 * MACHINE.dense_device_us[1])
    assert machine.dense_layer_us[1] == pytest.approx(0.5 * MACHINE.dense_layer_us[1])
    assert machine.head_us[1] == pytest.approx(1.5 * MACHINE.head_us[1])
    assert machine.device_expert_us[8] == MACHINE.device_expert_us[8]


def test_another_plan_wins(problem):
    """A GPU slower than host memory is best left a part of the work."""
    plan, made_from = problem
    slow = {"resident": 20.0}
    found = calibrate(plan, made_from, ROUTING, result_of(plan, slow, slow), "test")
    assert found.another_wins
    again = compile_plan(MODEL, found.machine, ROUTING, WORKLOAD, BUDGET, MADE)
    assert again.num_absent_blocks > plan.num_absent_blocks
    better = replace(made_from, machine=found.machine, chunk_tokens=again.prefill_chunk_tokens).cost(ROUTING)
    assert found.best_s <= better.total_s(found.placement)


def test_parts_that_a_run_did_not_show_are_left_alone(problem):
    plan, made_from = problem
    shown = result_of(plan, {}, {"dense": 2.0})
    only_dense = shown.decode.model_copy(update={"bytes_per_s": {}, "ms": {"dense": shown.decode.ms["dense"]}})
    nothing = shown.prefill.model_copy(update={"bytes_per_s": {}, "ms": {}})
    found = calibrate(plan, made_from, ROUTING, shown.model_copy(update={"decode": only_dense, "prefill": nothing}), "test")
    assert [(term.part, term.tokens, term.factor) for term in found.terms] == [("dense", 1, pytest.approx(2.0))]
    assert found.machine.dense_layer_us == {tokens: 2 * us for tokens, us in MACHINE.dense_layer_us.items()}
    assert found.machine.absent_expert_us == MACHINE.absent_expert_us


def test_a_profile_of_another_shape():
    """Times grow with bytes: what a run of wide layers took says what the profile's narrow ones would."""
    wide = small_model(num_layers=2, num_experts=4, hidden_size=128, vocab_size=200)
    plan = compile_plan(wide, MACHINE, ROUTING, WORKLOAD, BUDGET, MADE)
    problem = Problem(wide, MACHINE, WORKLOAD, BUDGET, plan.prefill_chunk_tokens)
    scale = wide.dense_layer_bytes / MODEL.dense_layer_bytes, wide.head_bytes / MODEL.head_bytes
    as_predicted = result_of(plan, *[{"dense": scale[0], "head": scale[1]}] * 2)
    found = calibrate(plan, problem, ROUTING, as_predicted, "test")
    assert [term.factor for term in found.terms] == pytest.approx([1.0] * 8)


def test_without_a_gpu_one_rate_holds_for_all_blocks():
    machine = machine_profile(MODEL, device=80.0, absent=80.0, dense=12.0, head=3.0, kind="host")
    plan = compile_plan(MODEL, machine, ROUTING, WORKLOAD, BUDGET, MADE)
    problem = Problem(MODEL, machine, WORKLOAD, BUDGET, plan.prefill_chunk_tokens)
    shown = result_of(plan, {"absent": 3.0}, {"absent": 3.0})
    phases = {
        name: phase.model_copy(update={"bytes_per_s": {"absent": phase.bytes_per_s["absent"]}})
        for name, phase in (("prefill", shown.prefill), ("decode", shown.decode))
    }
    found = calibrate(plan, problem, ROUTING, shown.model_copy(update=phases), "test").machine
    assert found.device_expert_us == {tokens: pytest.approx(3 * us) for tokens, us in machine.device_expert_us.items()}


def test_what_a_run_cannot_correct(problem):
    plan, made_from = problem
    by_rule = compile_plan(MODEL, MACHINE, ROUTING, WORKLOAD, BUDGET, MADE, baseline="cpu")
    with pytest.raises(FiddlerError, match="a rule of thumb"):
        calibrate(by_rule, made_from, ROUTING, result_of(by_rule, {}, {}), "test")
    none = Budget(0)
    cpu = compile_plan(MODEL, MACHINE, ROUTING, WORKLOAD, none, MADE)
    with pytest.raises(FiddlerError, match="no use of the GPU"):
        calibrate(cpu, replace(made_from, budget=none), ROUTING, result_of(cpu, {}, {}), "test")


def test_a_corrected_profile_can_be_read(problem, tmp_path):
    """Data sheets that were corrected by a run are measured; nothing takes no time."""
    plan, made_from = problem
    paper = MACHINE.model_copy(update={"source": "data sheet"})
    tiny = {"absent": 1e-4, "resident": 1e-4, "dense": 1e-4, "head": 1e-4}
    found = calibrate(plan, replace(made_from, machine=paper), ROUTING, result_of(plan, tiny, tiny), "test")
    found.machine.save(tmp_path / "x.machine.yaml")
    read = MachineProfile.load(tmp_path / "x.machine.yaml")
    assert read == found.machine
    assert read.source == "measured"
    assert min(read.head_us.values()) == 0.1


def test_the_command(tmp_path):
    measured = run("fiddler-run", "--plan", SHIPPED_PLAN, "--bench", "--max-new-tokens", 6, "--json", "b.json", cwd=tmp_path)
    assert measured.returncode == 0, measured.stderr
    result = run("fiddler-opt", "calibrate", SHIPPED_PLAN, "b.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["profiles/two-cores-calibrated.machine.yaml"]
    for words in ("an expert in host memory", "factor", "by the new profile", "plan"):
        assert words in result.stderr
    assert "another workload" not in result.stderr
    profile = MachineProfile.load(tmp_path / result.stdout.strip())
    assert profile.provenance.command.startswith("fiddler-opt calibrate")

    figures = json.loads((tmp_path / "b.json").read_text())
    for file, content, words in (
        ("no.json", "{", "no.json: not a result of `fiddler-run --bench --json` (no JSON object"),
        ("list.json", "[]", "(no JSON object)"),
        ("part.json", json.dumps({"plan": figures["plan"]}), "(num_beams: Field required)"),
        ("nan.json", json.dumps(figures | {"measured": {**figures["measured"], "ttft_s": float("nan")}}), "(measured.ttft_s: "),
        ("other.json", json.dumps(figures | {"plan": {**figures["plan"], "created": "2020-01-01"}}), "the result of another plan"),
        ("missing.json", None, "missing.json: cannot read"),
    ):
        if content is not None:
            (tmp_path / file).write_text(content)
        assert_refused(run("fiddler-opt", "calibrate", SHIPPED_PLAN, file, "-o", "x.yaml", cwd=tmp_path), words)
    assert not (tmp_path / "x.yaml").exists()


@pytest.mark.parametrize("value", [1.7e308, 5e-324, 10**400, -1, 0, "x", None])
@pytest.mark.parametrize("key", ["passes", "tokens_per_pass", "tokens_per_expert"])
def test_results_beyond_reason(problem, tmp_path, key, value):
    plan, _ = problem
    data = result_of(plan, {}, {}).model_dump()
    data["decode"][key] = value
    (tmp_path / "b.json").write_text(json.dumps(data))
    with pytest.raises(FiddlerError, match=rf"b.json: not a result of .*\((decode.{key}|no JSON)") as caught:
        Result.load(tmp_path / "b.json", plan)
    assert "\n" not in str(caught.value)


def test_a_result_with_a_byte_order_mark_and_one_that_is_deep(problem, tmp_path):
    plan, _ = problem
    result = result_of(plan, {}, {})
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf" + result.model_dump_json().encode())
    assert Result.load(tmp_path / "b.json", plan) == result
    for text in ("[" * 100_000, '{"plan":' * 100_000):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(FiddlerError, match="b.json: not a result of"):
            Result.load(tmp_path / "b.json", plan)


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_a_run_a_billion_times_off_is_no_measurement(problem, factor):
    plan, made_from = problem
    result = result_of(plan, {"absent": factor}, {"absent": factor})
    with pytest.raises(FiddlerError, match="an expert in host memory takes .* us: one of them is no measurement"):
        calibrate(plan, made_from, ROUTING, result, "test")
