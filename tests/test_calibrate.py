"""`fiddler-opt calibrate`: a profile corrected by a run, and the plan that follows."""

import json
from dataclasses import replace

import pytest
from command_line import SHIPPED_PLAN, assert_refused, run
from planning import machine_profile, small_model

from fiddler_opt.inputs.machine import MachineProfile, seconds_at
from fiddler_opt.inputs.routing import Routing
from fiddler_opt.insight.bench_result import MeasuredMachine, MeasuredPhase, MeasuredSpeeds, Result
from fiddler_opt.insight.calibrate import calibrate
from fiddler_opt.solve.compiler import by_rule, compile_plan
from fiddler_opt.solve.problem import Problem
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Budget, Workload

WORKLOAD = Workload(prompt_tokens=12, output_tokens=20, num_beams=1, batch_size=1, max_seq_len=64)
PROVENANCE = dict.fromkeys(
    ("command", "machine", "machine_sha256", "machine_source", "routing", "created"), "test"
)
MODEL = small_model(num_layers=2, num_experts=4)
MACHINE = machine_profile(MODEL, device=10.0, host=80.0, dense=12.0, head=3.0)
ROUTING = Routing.uniform(MODEL)
BUDGET = Budget(gpu_bytes=5 * 10**8)  # room for everything


@pytest.fixture(scope="module")
def problem():
    plan = compile_plan(MODEL, MACHINE, ROUTING, WORKLOAD, BUDGET, PROVENANCE)
    return plan, Problem(MODEL, MACHINE, WORKLOAD, BUDGET, plan.prefill_chunk_tokens)


def result_of(plan, prefill: dict[str, float], decode: dict[str, float]) -> Result:
    """A run in which each part took these multiples of the profile's times."""

    def phase(times: dict[str, float], tokens: int, per_expert: float) -> MeasuredPhase:
        def rate(part: str, us: dict) -> float:
            return MODEL.expert_bytes / (seconds_at(us, per_expert) * times.get(part, 1.0))

        return MeasuredPhase(
            ms={
                "dense": (
                    2 * seconds_at(MACHINE.dense_device_us, tokens) * 1e3 * times.get("dense", 1.0)
                ),
                "head": seconds_at(MACHINE.head_us, tokens) * 1e3 * times.get("head", 1.0),
            },
            bytes_per_s={
                "host": rate("host", MACHINE.best_host_us),
                "resident": rate("resident", MACHINE.resident_expert_us),
                "CPU": 1e9,
            },
            passes=1,
            tokens_per_pass=tokens,
            tokens_per_expert=per_expert,
        )

    measured = MeasuredSpeeds(
        prompt_tokens=12, output_tokens=20, ttft_s=0.1, decode_tokens_per_s=9.0
    )
    phases = {"prefill": phase(prefill, 12, 6.5), "decode": phase(decode, 1, 1.0)}
    about = {"machine": MeasuredMachine(gpu="test"), "plan": plan.provenance}
    return Result(**about, num_beams=1, batch_size=1, measured=measured, **phases)


def test_run_as_predicted_changes_nothing(problem):
    plan, made_from = problem
    found = calibrate(plan, made_from, ROUTING, result_of(plan, {}, {}), "test")
    assert [each.factor for each in found.corrections] == pytest.approx([1.0] * 8)
    assert not found.another_wins
    assert found.machine.provenance.command == "test"
    assert found.machine.model_copy(update={"provenance": MACHINE.provenance}) == MACHINE
    assert found.now_s == pytest.approx(made_from.cost(ROUTING).total_s(found.placement))


def test_each_table_is_corrected_by_its_own_part(problem):
    """Factors are log-linear between the measured numbers of tokens, constant outside."""
    plan, made_from = problem
    result = result_of(
        plan,
        {"host": 4.0, "dense": 1.0},
        {"host": 2.0, "resident": 3.0, "dense": 0.5, "head": 1.5},
    )
    machine = calibrate(plan, made_from, ROUTING, result, "test").machine
    host = MACHINE.host_expert_us
    assert machine.host_expert_us[1] == {
        share: pytest.approx(2 * us) for share, us in host[1].items()
    }
    assert machine.host_expert_us[8] == {
        share: pytest.approx(4 * us) for share, us in host[8].items()
    }
    assert machine.resident_expert_us[1] == pytest.approx(3 * MACHINE.resident_expert_us[1])
    assert machine.dense_device_us[1] == pytest.approx(0.5 * MACHINE.dense_device_us[1])
    assert machine.dense_layer_us[1] == pytest.approx(0.5 * MACHINE.dense_layer_us[1])
    assert machine.head_us[1] == pytest.approx(1.5 * MACHINE.head_us[1])
    assert machine.resident_expert_us[8] == MACHINE.resident_expert_us[8]


def test_slow_gpu_makes_another_plan_win(problem):
    """A GPU slower than host memory should get only a part of the blocks."""
    plan, made_from = problem
    slow = {"resident": 20.0}
    found = calibrate(plan, made_from, ROUTING, result_of(plan, slow, slow), "test")
    assert found.another_wins
    again = compile_plan(MODEL, found.machine, ROUTING, WORKLOAD, BUDGET, PROVENANCE)
    assert again.num_host_blocks > plan.num_host_blocks
    better = replace(
        made_from, machine=found.machine, chunk_tokens=again.prefill_chunk_tokens
    ).cost(ROUTING)
    assert found.best_s <= better.total_s(found.placement)


def test_unmeasured_parts_are_left_alone(problem):
    plan, made_from = problem
    shown = result_of(plan, {}, {"dense": 2.0})
    only_dense = shown.decode.model_copy(
        update={"bytes_per_s": {}, "ms": {"dense": shown.decode.ms["dense"]}}
    )
    nothing = shown.prefill.model_copy(update={"bytes_per_s": {}, "ms": {}})
    found = calibrate(
        plan,
        made_from,
        ROUTING,
        shown.model_copy(update={"decode": only_dense, "prefill": nothing}),
        "test",
    )
    assert [(each.part, each.tokens, each.factor) for each in found.corrections] == [
        ("dense", 1, pytest.approx(2.0))
    ]
    assert found.machine.dense_layer_us == {
        tokens: 2 * us for tokens, us in MACHINE.dense_layer_us.items()
    }
    assert found.machine.host_expert_us == MACHINE.host_expert_us


def test_run_of_another_shape_is_scaled_by_bytes():
    """Times are proportional to bytes: a run of wide layers corrects a profile of narrow ones."""
    wide = small_model(num_layers=2, num_experts=4, hidden_size=128, vocab_size=200)
    plan = compile_plan(wide, MACHINE, ROUTING, WORKLOAD, BUDGET, PROVENANCE)
    problem = Problem(wide, MACHINE, WORKLOAD, BUDGET, plan.prefill_chunk_tokens)
    scale = wide.dense_layer_bytes / MODEL.dense_layer_bytes, wide.head_bytes / MODEL.head_bytes
    as_predicted = result_of(plan, *[{"dense": scale[0], "head": scale[1]}] * 2)
    found = calibrate(plan, problem, ROUTING, as_predicted, "test")
    assert [each.factor for each in found.corrections] == pytest.approx([1.0] * 8)


def test_without_a_gpu_one_rate_holds_for_all_blocks():
    machine = machine_profile(MODEL, device=80.0, host=80.0, dense=12.0, head=3.0, kind="cpu")
    plan = compile_plan(MODEL, machine, ROUTING, WORKLOAD, BUDGET, PROVENANCE)
    problem = Problem(MODEL, machine, WORKLOAD, BUDGET, plan.prefill_chunk_tokens)
    shown = result_of(plan, {"host": 3.0}, {"host": 3.0})
    phases = {
        name: phase.model_copy(update={"bytes_per_s": {"host": phase.bytes_per_s["host"]}})
        for name, phase in (("prefill", shown.prefill), ("decode", shown.decode))
    }
    found = calibrate(plan, problem, ROUTING, shown.model_copy(update=phases), "test").machine
    assert found.resident_expert_us == {
        tokens: pytest.approx(3 * us) for tokens, us in machine.resident_expert_us.items()
    }


def test_baseline_and_cpu_plans_are_refused(problem):
    plan, made_from = problem
    simple = compile_plan(
        MODEL, MACHINE, ROUTING, WORKLOAD, BUDGET, PROVENANCE, placer=by_rule("cpu")
    )
    with pytest.raises(FiddlerError, match="a plan made with --baseline cannot calibrate"):
        calibrate(simple, made_from, ROUTING, result_of(simple, {}, {}), "test")
    none = Budget(gpu_bytes=0)
    cpu = compile_plan(MODEL, MACHINE, ROUTING, WORKLOAD, none, PROVENANCE)
    with pytest.raises(FiddlerError, match="does not use the GPU"):
        calibrate(cpu, replace(made_from, budget=none), ROUTING, result_of(cpu, {}, {}), "test")


def test_a_run_without_the_profiled_gpu_is_refused(problem):
    plan, made_from = problem
    result = result_of(plan, {}, {}).model_copy(update={"machine": MeasuredMachine(gpu=None)})
    with pytest.raises(FiddlerError, match="measured without a GPU, but the profile timed one"):
        calibrate(plan, made_from, ROUTING, result, "test")


def test_corrected_profile_can_be_read(problem, tmp_path):
    """A data sheet corrected by a run counts as measured; no time is rounded to zero."""
    plan, made_from = problem
    paper = MACHINE.model_copy(update={"source": "data sheet"})
    tiny = {"host": 1e-4, "resident": 1e-4, "dense": 1e-4, "head": 1e-4}
    found = calibrate(
        plan, replace(made_from, machine=paper), ROUTING, result_of(plan, tiny, tiny), "test"
    )
    found.machine.save(tmp_path / "x.machine.yaml")
    read = MachineProfile.load(tmp_path / "x.machine.yaml")
    assert read == found.machine
    assert read.source == "measured"
    assert min(read.head_us.values()) == 0.1


def test_calibrate_writes_a_profile_and_refuses_other_results(tmp_path):
    bench = ("--plan", SHIPPED_PLAN, "--bench", "--max-new-tokens", 6, "--json", "b.json")
    measured = run("fiddler-run", *bench, cwd=tmp_path)
    assert measured.returncode == 0, measured.stderr
    result = run("fiddler-opt", "calibrate", SHIPPED_PLAN, "b.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["profiles/two-cores-calibrated.machine.yaml"]
    shown = ("experts in host memory", "measured / profile", "according to the new profile", "plan")
    assert all(words in result.stderr for words in shown)
    assert "measured workload" not in result.stderr
    profile = MachineProfile.load(tmp_path / result.stdout.strip())
    assert profile.provenance.command.startswith("fiddler-opt calibrate")

    figures = json.loads((tmp_path / "b.json").read_text())
    for file, content, words in (
        ("no.json", "{", "no.json: not a result of `fiddler-run --bench --json` (no JSON object"),
        ("list.json", "[]", "(no JSON object)"),
        ("part.json", json.dumps({"plan": figures["plan"]}), "(machine: Field required)"),
        (
            "nan.json",
            json.dumps(figures | {"measured": {**figures["measured"], "ttft_s": float("nan")}}),
            "(measured.ttft_s: ",
        ),
        (
            "other.json",
            json.dumps(figures | {"plan": {**figures["plan"], "created": "2020-01-01"}}),
            "the result of another plan",
        ),
        ("missing.json", None, "missing.json: cannot read"),
    ):
        if content is not None:
            (tmp_path / file).write_text(content)
        assert_refused(
            run("fiddler-opt", "calibrate", SHIPPED_PLAN, file, "-o", "x.yaml", cwd=tmp_path), words
        )
    assert not (tmp_path / "x.yaml").exists()


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_run_a_billion_times_off_is_refused(problem, factor):
    plan, made_from = problem
    result = result_of(plan, {"host": factor}, {"host": factor})
    with pytest.raises(
        FiddlerError,
        match="experts in host memory took .* us in the profile: one of them cannot be right",
    ):
        calibrate(plan, made_from, ROUTING, result, "test")
