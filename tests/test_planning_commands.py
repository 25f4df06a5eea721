"""What `fiddler-opt plan` offers beyond a budget, and the commands that look into plans."""

import json
import os
import random

import pytest
import yaml
from conftest import DEMO, ROOT
from planning import machine_profile, random_routing, small_model
from test_commands import assert_refused, files_in, run

from fiddler_opt.cli import main
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
    RoutingProfile.model_validate(data).save(path)
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
    huge.write_text(json.dumps({**json.loads((DEMO / "config.json").read_text()), "intermediate_size": 2**20}))
    stopped = run("fiddler-opt", "doctor", "--model", tmp_path, cwd=tmp_path)
    assert stopped.returncode == 1
    assert stopped.stdout.startswith("stops")
    assert "cannot run here" in stopped.stderr


def test_a_profile_that_did_not_time_the_link_alone(tmp_path):
    profile = yaml.safe_load(MACHINE.read_text())
    for times in profile["absent_expert_us"].values():
        del times[1.0]
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(profile))
    flags = ("plan", "--machine", "m.yaml", "--gpu-mem", "24GB", "-o", "p.yaml")
    result = run("fiddler-opt", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    plan, usual = Plan.load(tmp_path / "p.yaml"), Plan.load(ROOT / "plans/rtx4090.yaml")
    assert set(plan.predicted.alternatives) == {"greedy", "uniform", "layers", "cpu"}
    assert plan.stream_share == usual.stream_share
    assert plan.predicted.decode_tokens_per_s == pytest.approx(usual.predicted.decode_tokens_per_s, rel=1e-3)
    for baseline in ("stream", "fiddler"):
        assert_refused(run("fiddler-opt", *flags, "--baseline", baseline, cwd=tmp_path), "timed the share 1.0")


def test_no_plan_is_faster_than_its_bound(tmp_path, two_sets):
    for flags in (("--robust",), (), ("--robust", "--baseline", "greedy")):
        plan = planned(tmp_path, "--gpu-mem", "24GB", "--routing", two_sets, *flags)
        assert plan.predicted.bound_tokens_per_s >= plan.predicted.decode_tokens_per_s


def test_the_program_goes_into_a_new_folder(tmp_path):
    planned(tmp_path, "--gpu-mem", "24GB", "--emit", "new/folder/p.lp")
    assert (tmp_path / "new/folder/p.lp").read_text().rstrip().endswith("End")
    assert [path.name for path in (tmp_path / "new/folder").iterdir()] == ["p.lp"]


LONG = "n" * 300
READING = [
    ["plan", "--gpu-mem", "24GB", "--machine", "{}"],
    ["plan", "--gpu-mem", "24GB", "--machine", MACHINE, "--routing", "{}"],
    ["plan", "--gpu-mem", "24GB", "--profiles", "{}"],
    ["plan", "--gpu-mem", "24GB", "--machine", MACHINE, "--model", "{}"],
    ["show", "{}"],
    ["explain", "{}"],
    ["explain", ROOT / "plans/demo.yaml", "--machine", "{}"],
    ["diff", ROOT / "plans/demo.yaml", "{}"],
    ["calibrate", ROOT / "plans/demo.yaml", "{}"],
    ["profile", "--model", DEMO, "--prompts", "{}", "--only", "routing", "--plan", ROOT / "plans/demo.yaml"],
    ["profile", "--model", DEMO, "--only", "routing", "--plan", "{}"],
]
WRITING = [
    ["plan", "--gpu-mem", "24GB", "--machine", MACHINE, "-o", "{}"],
    ["plan", "--gpu-mem", "24GB", "--machine", MACHINE, "--emit", "{}"],
    ["whatif", "--gpu-mem", "8GB,24GB", "--machine", MACHINE, "--plot", "{}"],
    ["show", ROOT / "plans/demo.yaml", "--plot", "{}"],
]
FOLDERS = [["doctor", "--model", DEMO, "--profiles", "{}"], ["profile", "--model", DEMO, "--profiles", "{}"]]
CASES = [
    (command, name)
    for commands, names in (
        (READING, (LONG, f"{LONG}/x", "loop", "loop/x")),
        (WRITING, (LONG, f"{LONG}/x", "loop", "loop/x")),
        (FOLDERS, (LONG, f"{LONG}/x", "loop", "loop/x")),
    )
    for command in commands
    for name in names
]


@pytest.fixture
def odd_places(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


@pytest.mark.parametrize(("command", "name"), CASES, ids=lambda value: " ".join(map(str, value))[:60])
def test_places_that_cannot_be_looked_at(odd_places, monkeypatch, capsys, command, name):
    """One line that names the place, and nothing is written."""
    monkeypatch.chdir(odd_places)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sorted(odd_places.iterdir())
    status = main([str(part).format(name) for part in command])
    captured = capsys.readouterr()
    assert status == 1
    assert captured.out == "" or command[0] == "explain"
    last = captured.err.splitlines()[-1]
    assert last.startswith("fiddler-opt: ")
    assert name[:20] in last
    assert sorted(odd_places.iterdir()) == before


def test_a_nul_in_a_name(odd_places, monkeypatch, capsys):
    monkeypatch.chdir(odd_places)
    for command in (["show", "a\0b"], ["plan", "--gpu-mem", "24GB", "--machine", "a\0b"]):
        assert main(command) == 1
        captured = capsys.readouterr()
        assert "cannot read" in captured.err or "no such" in captured.err
        assert len(captured.err.splitlines()) == 1


def test_workloads_beyond_reason(tmp_path):
    flags = ("--machine", MACHINE, "--gpu-mem", "24GB")
    for key in ("--num-beams", "--batch-size"):
        assert_refused(run("fiddler-opt", "plan", *flags, key, 2**31 - 1, cwd=tmp_path), "is too small")
    assert_refused(run("fiddler-opt", "whatif", *flags, "--beams", "1," + "9" * 400, cwd=tmp_path), "--beams 999", "more than")
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize(
    "command",
    [
        ["plan", "--gpu-mem", "24GB", "--machine", "locked/x"],
        ["plan", "--gpu-mem", "24GB", "--machine", MACHINE, "--routing", "locked/x"],
        ["plan", "--gpu-mem", "24GB", "--machine", MACHINE, "--profiles", "locked"],
        ["plan", "--gpu-mem", "24GB", "--profiles", "locked"],
        ["plan", "--gpu-mem", "24GB", "--machine", MACHINE, "--model", "locked/m"],
        ["show", "locked/x.yaml"],
        ["explain", "locked/x.yaml"],
        ["calibrate", "locked/x.yaml", "b.json"],
        ["doctor", "--model", DEMO, "--profiles", "locked"],
        ["profile", "--model", DEMO, "--prompts", "locked/x.txt", "--only", "routing", "--plan", ROOT / "plans/demo.yaml"],
    ],
    ids=lambda command: " ".join(map(str, command))[:60],
)
def test_a_locked_folder(tmp_path, monkeypatch, capsys, command):
    """As the system answers whoever may not enter it."""
    look = os.stat

    def stat(path, **flags):
        if "locked" in str(path).split("/"):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path, **flags)

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.chdir(tmp_path)
    assert main([str(part) for part in command]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("fiddler-opt: locked")
    assert captured.err.endswith(": cannot read: Permission denied\n")
    assert captured.out == ""
