"""`fiddler-opt plan`: budgets, targets, robust plans, baselines and refusals."""

import pytest
import yaml
from command_line import assert_refused, files_in, run
from conftest import DEMO, ROOT
from planning import few_layers
from seeds import spread

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.routing import Routing
from fiddler_opt.inputs.routing_profile import RoutingProfile
from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.placement import placement_of
from fiddler_run.plan.schema import Budget, Plan

MACHINE = ROOT / "profiles/rtx4090.machine.yaml"
LAYERS = 4


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory) -> str:
    return few_layers(tmp_path_factory.mktemp("model") / "four-layers", LAYERS)


@pytest.fixture(scope="module")
def plan_command(four_layers):
    flags = ("--machine", MACHINE, "--model", four_layers, "--encoding", "bf16")
    return ("plan", *flags, "-o", "p.yaml")


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    """A routing profile of four layers: stories choose the even experts most, code the odd ones."""
    folder = tmp_path_factory.mktemp("sets")
    pairs = [(e, f) for e in range(8) for f in range(e + 1, 8)]

    def rows(liked: int, layer: int, scale: int) -> dict[str, list[int]]:
        """Counts by pair: high for pairs of liked experts, and different in each layer."""
        weights = [10, 14, 18, 22, 26, 30]
        rotated = iter(weights[layer:] + weights[:layer])
        both = {p: next(rotated) if p[0] % 2 == p[1] % 2 == liked else 1 for p in pairs}
        counted = {p: scale * n for p, n in both.items()}
        chosen = [sum(n for p, n in counted.items() if e in p) for e in range(8)]
        return {"activations": chosen, "pairs": list(counted.values()), "reuse": [0] * 8}

    def counts(liked: int, scale: int) -> dict:
        by_layer = {layer: rows(liked, layer, scale) for layer in range(LAYERS)}
        tokens = sum(by_layer[0]["pairs"])
        keys = ("activations", "pairs", "reuse")
        found = {key: {layer: row[key] for layer, row in by_layer.items()} for key in keys}
        return {"tokens": tokens, "followers": tokens - 10, **found}

    def part(liked: int) -> dict:
        prefill = counts(liked, 28)
        decode = counts(liked, 21)
        return {
            "prompts": 10,
            "prefill": prefill,
            "decode": {**decode, "followers": decode["tokens"]},
        }

    data = {
        "version": 2,
        "model": {"name": "m", "num_layers": LAYERS, "num_experts": 8, "num_experts_per_tok": 2},
        "recorded": {"command": "by hand", "created": "2026-01-01", "output_tokens": 1000},
        "sets": {"stories": part(0), "code": part(1)},
    }
    path = folder / "routing.yaml"
    RoutingProfile.model_validate(data).save(path)
    return path


@pytest.fixture
def planned(plan_command, tmp_path):
    """Runs `fiddler-opt plan` with further flags and loads the plan."""

    def plan(*flags) -> Plan:
        result = run("fiddler-opt", *plan_command, *flags, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return Plan.load(tmp_path / "p.yaml")

    return plan


def test_target_is_reached_with_the_least_memory(planned):
    middle = planned("--gpu-mem", "7GB").predicted.decode_tokens_per_s
    plan = planned("--target", f"{middle:.2f}tok/s")
    assert plan.predicted.decode_tokens_per_s >= round(middle, 2)
    assert set(plan.predicted.alternatives) >= {"greedy", "cpu"}
    less = planned("--gpu-mem", f"{plan.budget.gpu_bytes / 1e9 - 0.1:.1f}GB")
    assert less.predicted.decode_tokens_per_s < round(middle, 2)


def test_all_free_gpu_memory_is_the_default_budget(four_layers, tmp_path):
    """The file's name states the budget, rounded down."""
    result = run("fiddler-opt", "plan", "--machine", MACHINE, "--model", four_layers, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "plans/four-layers-25.7GB.yaml\n"
    assert result.stderr.startswith(
        "no --gpu-mem: planning for the 25.76 GB that, according to the machine profile, were"
    )
    plan = Plan.load(tmp_path / result.stdout.strip())
    assert plan.budget == Budget(gpu_bytes=MachineProfile.load(MACHINE).device.free_bytes)

    cpu = ROOT / "profiles/two-cores.machine.yaml"
    result = run("fiddler-opt", "plan", "--machine", cpu, "--model", DEMO, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "plans/tiny-mixtral-0GB.yaml\n"
    assert "has no GPU: planning for the CPU alone" in result.stderr.splitlines()[0]
    assert Plan.load(tmp_path / result.stdout.strip()).budget == Budget(gpu_bytes=0)


@pytest.mark.parametrize(
    ("drift", "words"),
    [({1: 0.3, 2: 0.24, 4: 0.05, 512: 0.0}, "24%"), ({1: 0.1, 64: 0.9}, None), ({}, None)],
)
def test_plan_warns_of_an_unsteady_machine(plan_command, tmp_path, drift, words):
    machine = MachineProfile.load(MACHINE)
    path = tmp_path / "machine.yaml"
    machine.model_copy(update={"drift": drift, "encodings": {}}).save(path)
    flags = ("--machine", path, "--gpu-mem", "6GB")
    result = run("fiddler-opt", *plan_command, *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (f"took {words} longer in one minute" in " ".join(result.stderr.split())) == bool(words)


def test_robust_plan_is_better_for_the_worst_set(planned, four_layers, two_sets):
    flags = ("--gpu-mem", "6GB", "--routing", two_sets)
    plain = planned(*flags)
    robust = planned(*flags, "--robust")
    assert set(plain.predicted.regret) == {"stories", "code"}
    worst = [max(plan.predicted.regret.values()) for plan in (plain, robust)]
    assert 0 < worst[1] <= worst[0] + 1e-3
    totals = []
    machine = MachineProfile.load(MACHINE)
    model = ModelSpec.load(four_layers)
    routing = Routing.from_profile(RoutingProfile.load(two_sets), model, "here")
    for plan in (plain, robust):
        costs = [
            CostModel.build(model, machine, each, plan.workload, plan.prefill_chunk_tokens)
            for each in routing.sets.values()
        ]
        totals.append(max(cost.total_s(placement_of(plan)) for cost in costs))
    assert totals[1] <= totals[0] * (1 + 1e-4)


def test_blocks_beyond_host_memory_go_to_disk(plan_command, tmp_path):
    profile = yaml.safe_load(MACHINE.read_text())
    (tmp_path / "m.yaml").write_text(
        yaml.safe_dump({**profile, "disk_bytes_per_s": 5e9, "encodings": {}})
    )
    flags = (*plan_command, "--machine", "m.yaml", "--gpu-mem", "6GB", "--host-mem")
    result = run("fiddler-opt", *flags, "6GB", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "on disk" in result.stderr
    plan = Plan.load(tmp_path / "p.yaml")
    assert plan.budget == Budget(gpu_bytes=6 * 10**9, host_bytes=6 * 10**9)
    host = plan.rank.host_memory_bytes
    assert host.embedding == 262_144_000
    assert 6e9 - plan.block_bytes < host.experts + host.embedding <= 6e9
    assert plan.rank.disk_bytes == plan.rank.num_disk_blocks * plan.block_bytes > 1e9
    assert plan.predicted.binding == "GPU and host memory"
    assert plan.predicted.decode_ms["disk"] > 0
    refused = run("fiddler-opt", *flags, "200MB", cwd=tmp_path)
    assert_refused(refused, "--host-mem 200.00 MB is too small: the embedding table alone takes")


def test_baseline_is_planned_and_program_is_emitted(planned, tmp_path):
    flags = ("--gpu-mem", "6GB", "--baseline", "stream", "--emit", "new/folder/p.lp")
    plan = planned(*flags)
    assert plan.rank.stream_share == {1: 1.0}
    assert plan.provenance.status == "not solved: stream"
    program = (tmp_path / "new/folder/p.lp").read_text()
    assert "Minimize" in program
    assert "r_3_7" in program
    assert program.rstrip().endswith("End")
    assert [path.name for path in (tmp_path / "new/folder").iterdir()] == ["p.lp"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--target", "6"], ["--target 6: not a speed", "6tok/s"]),
        (
            ["--target", "9999tok/s"],
            ["--target 9999tok/s cannot be reached with the GPU's 25.76 GB", "they reach"],
        ),
        (["--gpu-mem", "24GB", "--host-mem", "60GB"], ["--host-mem", "has no disk speed"]),
        (["--gpu-mem", "24GB", "--robust"], ["--robust needs a routing profile"]),
        (["--gpu-mem", "24GB", "--host-mem", "60"], ["--host-mem 60: a size needs a unit"]),
        (
            [
                "--gpu-mem",
                "0GB",
                "--baseline",
                "stream",
                "--machine",
                ROOT / "profiles/two-cores.machine.yaml",
            ],
            ["needs a GPU"],
        ),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_plan_refuses_impossible_flags(plan_command, tmp_path, flags, words):
    assert_refused(run("fiddler-opt", *plan_command, *flags, cwd=tmp_path), *words)
    assert files_in(tmp_path) == {}


def test_profile_without_link_times_rules_out_link_baselines(plan_command, planned, tmp_path):
    profile = yaml.safe_load(MACHINE.read_text())
    for times in profile["host_expert_us"].values():
        del times[1.0]
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({**profile, "encodings": {}}))
    usual = planned("--gpu-mem", "6GB", "--encoding", "bf16")
    flags = ("--machine", "m.yaml", "--gpu-mem", "6GB")
    plan = planned(*flags)
    assert set(plan.predicted.alternatives) == {"greedy", "uniform", "layers", "cpu"}
    assert plan.rank.stream_share == usual.rank.stream_share
    assert plan.predicted.decode_tokens_per_s == pytest.approx(
        usual.predicted.decode_tokens_per_s, rel=1e-3
    )
    for baseline in ("stream", "fiddler"):
        refused = run("fiddler-opt", *plan_command, *flags, "--baseline", baseline, cwd=tmp_path)
        assert_refused(refused, "timed the share 1.0")


@pytest.mark.parametrize("flags", spread(["--robust", "--robust --baseline greedy", ""], 1))
def test_no_plan_is_faster_than_its_bound(planned, two_sets, flags):
    plan = planned("--gpu-mem", "6GB", "--routing", two_sets, *flags.split())
    assert plan.predicted.bound_tokens_per_s >= plan.predicted.decode_tokens_per_s


def test_absurd_workloads_are_refused(tmp_path):
    flags = ("--machine", MACHINE, "--gpu-mem", "24GB")
    for key in ("--num-beams", "--batch-size"):
        assert_refused(
            run("fiddler-opt", "plan", *flags, key, 2**31 - 1, cwd=tmp_path), "is too small"
        )
    assert_refused(
        run("fiddler-opt", "whatif", *flags, "--beams", "1," + "9" * 400, cwd=tmp_path),
        "--beams 999",
        "more than",
    )
    assert files_in(tmp_path) == {}
