"""What `fiddler-opt plan` offers beyond a budget, and the commands that look into plans."""

import json
import random

import pytest
import yaml
from conftest import DEMO, ROOT
from planning import machine_profile, random_routing, small_model
from test_commands import assert_refused, files_in, run

from fiddler_opt.cost import CostModel, Placement
from fiddler_opt.explain import placement_of, worths
from fiddler_opt.machine import MachineProfile
from fiddler_opt.model import DEFAULT_MODEL, ModelSpec
from fiddler_opt.routing import Routing, RoutingProfile
from fiddler_run.plan import Plan, Workload

MACHINE = ROOT / "profiles/rtx4090.machine.yaml"
PLAN = ("plan", "--machine", MACHINE)


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    """A routing profile of Mixtral's shape: stories choose the even experts most, code the odd ones."""
    folder = tmp_path_factory.mktemp("sets")
    experts, pairs = range(8), [(e, f) for e in range(8) for f in range(e + 1, 8)]

    def counts(liked: int, tokens: int) -> dict:
        both = {p: 20 if p[0] % 2 == p[1] % 2 == liked else 1 for p in pairs}
        scale = tokens // sum(both.values())
        row = [scale * n for n in both.values()]
        chosen = [sum(scale * n for p, n in both.items() if e in p) for e in experts]
        rows = {"activations": chosen, "pairs": row, "reuse": [0] * 8}
        return {"tokens": sum(row), "followers": sum(row) - 10, **{k: dict.fromkeys(range(32), v) for k, v in rows.items()}}

    def part(liked: int) -> dict:
        prefill, decode = counts(liked, 4000), counts(liked, 3000)
        return {"prompts": 10, "prefill": prefill, "decode": {**decode, "followers": decode["tokens"]}}

    data = {
        "version": 2,
        "model": {"name": "m", "num_layers": 32, "num_experts": 8, "num_experts_per_tok": 2},
        "recorded": {"command": "by hand", "created": "2026-01-01", "output_tokens": 1000},
        "sets": {"stories": part(0), "code": part(1)},
    }
    path = folder / "routing.yaml"
    path.write_text(yaml.safe_dump(data))
    RoutingProfile.load(path)
    return path


def planned(folder, *flags) -> Plan:
    result = run("fiddler-opt", *PLAN, "-o", "p.yaml", *flags, cwd=folder)
    assert result.returncode == 0, result.stderr
    return Plan.load(folder / "p.yaml")


def test_target_is_reached_with_the_least_memory(tmp_path):
    plan = planned(tmp_path, "--target", "4.3tok/s")
    assert plan.predicted.decode_tokens_per_s >= 4.3
    less = planned(tmp_path, "--gpu-mem", f"{plan.gpu_memory_bytes.total / 1e9 - 0.1:.1f}GB")
    assert less.predicted.decode_tokens_per_s < 4.3


@pytest.mark.parametrize(("apart", "told"), [({1: 0.3, 2: 0.24, 4: 0.05, 512: 0.0}, "24%"), ({1: 0.1, 64: 0.9}, None), ({}, None)])
def test_a_machine_that_was_not_steady(tmp_path, apart, told):
    machine = MachineProfile.load(MACHINE)
    path = tmp_path / "machine.yaml"
    machine.model_copy(update={"drift": apart}).save(path)
    result = run("fiddler-opt", "plan", "--machine", path, "--gpu-mem", "24GB", "-o", "p.yaml", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (f"took {told} longer in one minute" in " ".join(result.stderr.split())) == bool(told)


def test_robust_plans_for_the_worst_set(tmp_path, two_sets):
    flags = ("--gpu-mem", "24GB", "--routing", two_sets)
    plain, robust = planned(tmp_path, *flags), planned(tmp_path, *flags, "--robust")
    assert set(plain.predicted.regret) == {"stories", "code"}
    worst = [max(plan.predicted.regret.values()) for plan in (plain, robust)]
    assert 0 < worst[1] <= worst[0] + 1e-3
    totals = []
    machine, workload = MachineProfile.load(MACHINE), plain.workload
    model = ModelSpec.load(DEFAULT_MODEL)
    routing = Routing.from_profile(RoutingProfile.load(two_sets), model, "here")
    for plan in (plain, robust):
        costs = [CostModel.build(model, machine, each, workload, plan.prefill_chunk_tokens) for each in routing.sets.values()]
        totals.append(max(cost.total_s(placement_of(plan)) for cost in costs))
    assert totals[1] <= totals[0] * (1 + 1e-4)


def test_host_memory_that_is_too_small_leaves_the_rest_on_disk(tmp_path):
    profile = yaml.safe_load(MACHINE.read_text())
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({**profile, "disk_bytes_per_s": 5e9}))
    flags = ("plan", "--machine", "m.yaml", "--gpu-mem", "24GB", "--host-mem", "60GB", "-o", "p.yaml")
    result = run("fiddler-opt", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "on disk" in result.stderr
    plan = Plan.load(tmp_path / "p.yaml")
    assert plan.host_memory_bytes.experts + plan.host_memory_bytes.embedding <= 60e9
    assert plan.disk_bytes == plan.num_disk_blocks * plan.block_bytes > 10e9
    assert plan.predicted.binding == "GPU and host memory"
    assert plan.predicted.decode_ms["disk"] > 0


def test_emitted_program_and_baseline(tmp_path):
    plan = planned(tmp_path, "--gpu-mem", "24GB", "--baseline", "stream", "--emit", "program.lp")
    assert plan.stream_share == {1: 1.0}
    assert plan.provenance.status == "not solved: stream"
    program = (tmp_path / "program.lp").read_text()
    assert "Minimize" in program
    assert "r_31_7" in program


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--target", "6"], ["--target 6: not a speed", "6tok/s"]),
        (["--target", "99tok/s"], ["--target 99tok/s cannot be reached with the GPU's 25.76 GB", "they reach"]),
        (["--gpu-mem", "24GB", "--host-mem", "60GB"], ["--host-mem", "knows no disk speed"]),
        (["--gpu-mem", "24GB", "--host-mem", "60"], ["--host-mem 60: a size needs a unit"]),
        (["--gpu-mem", "0GB", "--baseline", "stream", "--machine", ROOT / "profiles/two-cores.machine.yaml"], ["needs a GPU"]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_refused(tmp_path, flags, words):
    assert_refused(run("fiddler-opt", *PLAN, "-o", "p.yaml", *flags, cwd=tmp_path), *words)
    assert files_in(tmp_path) == {}


def test_explain(tmp_path):
    result = run("fiddler-opt", "explain", "plans/rtx4090.yaml", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for words in ("kv cache", "where the time goes", "experts: CPU and link", "GPU memory is used up", "Fiddler", "gets next"):
        assert words in result.stdout
    text = (ROOT / "plans/rtx4090.yaml").read_text()
    (tmp_path / "lost.yaml").write_text(text.replace("machine: profiles/rtx4090", "machine: profiles/lost"))
    lost = run("fiddler-opt", "explain", "lost.yaml", cwd=tmp_path)
    assert lost.returncode == 0
    assert "gets next" not in lost.stdout
    assert "lost.machine.yaml: cannot read" in lost.stderr
    other = ROOT / "profiles/two-cores.machine.yaml"
    wrong = run("fiddler-opt", "explain", "plans/rtx4090.yaml", "--machine", other, cwd=ROOT)
    assert wrong.returncode == 1
    assert "not the profile that the plan was made from" in wrong.stderr


def test_worths_are_differences_of_the_cost_model():
    model = small_model()
    workload = Workload(prompt_tokens=4, output_tokens=4, num_beams=1, batch_size=1, max_seq_len=64)
    routing = random_routing(model, random.Random(1))
    cost = CostModel.build(model, machine_profile(model), routing, workload, 64)
    found = {(each.layer, each.expert): each for each in worths(cost, Placement.of([[4, 2, 0, 0], [0, 0, 1, 4]]))}
    assert found[0, 0].saves_us is None
    assert found[0, 2].costs_us is None
    step_us = [1e6 * cost.decode_step_s(Placement.of([[4, n, 0, 0], [0, 0, 1, 4]])) for n in (1, 2, 3)]
    assert found[0, 1].costs_us == pytest.approx(step_us[0] - step_us[1])
    assert found[0, 1].saves_us == pytest.approx(step_us[1] - step_us[2])


def test_whatif(tmp_path):
    flags = ("--machine", MACHINE, "--gpu-mem", "8GB,24GB", "--plot", "curve.png")
    result = run("fiddler-opt", "whatif", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "24.00 GB" in result.stdout
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert_refused(run("fiddler-opt", "whatif", "--machine", MACHINE, cwd=tmp_path), "--gpu-mem")


def test_doctor(tmp_path):
    result = run("fiddler-opt", "doctor", "--model", DEMO, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "CPU kernel" in result.stdout
    huge = tmp_path / "config.json"
    huge.write_text(json.dumps({**json.loads((DEMO / "config.json").read_text()), "num_hidden_layers": 10**7}))
    stopped = run("fiddler-opt", "doctor", "--model", tmp_path, cwd=tmp_path)
    assert stopped.returncode == 1
    assert stopped.stdout.startswith("stops")
    assert "cannot run here" in stopped.stderr
