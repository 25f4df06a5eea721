"""`fiddler-opt plan` and the commands that read its plan, for several ranks."""

import pytest
from command_line import assert_refused, run
from conftest import ROOT
from planning import few_layers
from seeds import spread

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.machine_parts import Network
from fiddler_opt.inputs.machine_ranks import load_machines
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.insight.sources import profile_sha256
from fiddler_opt.solve.problem import Problem
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan

MACHINE = ROOT / "profiles" / "rtx4090.machine.yaml"
TWO = ("--machine", MACHINE, MACHINE, "--network", "0.2ms,1GB/s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model of four layers and, made from two profiles, a plan of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    few_layers(folder / "four-layers", 4)
    result = plan(folder, *TWO, "--gpu-mem", "6GB,4GB")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "plans/four-layers-6GB+4GB.yaml\n"
    return folder


@pytest.fixture(scope="module")
def two(folder) -> Plan:
    return Plan.load(folder / "plans/four-layers-6GB+4GB.yaml")


def plan(folder, *flags):
    return run("fiddler-opt", "plan", "--model", "four-layers", *flags, cwd=folder)


def test_a_plan_of_two_ranks(two):
    assert two.problems() == []
    assert two.budget.other_gpu_bytes == [4 * 10**9]
    first, second = two.ranks
    assert [first.machine, second.machine] == [0, 1]
    assert [rank.gpu_memory_bytes.total for rank in two.ranks] == [6 * 10**9, 4 * 10**9]
    assert all(rank.gpu_memory_bytes.used <= rank.gpu_memory_bytes.total for rank in two.ranks)
    assert second.gpu_memory_bytes.non_expert_weights == second.gpu_memory_bytes.kv_cache == 0
    assert first.host_memory_bytes.embedding > second.host_memory_bytes.embedding == 0
    assert two.predicted.decode_ms["exchange"] > 4 * 0.2
    assert sum(two.predicted.decode_ms.values()) == pytest.approx(
        1e3 / two.predicted.decode_tokens_per_s, rel=1e-3
    )
    assert two.provenance.machine == f"{MACHINE} + {MACHINE}"
    assert two.provenance.network == "0.2ms,1GB/s"


def test_two_ranks_have_finer_blocks(folder, two):
    model = ModelSpec.load(str(folder / "four-layers"))
    machines = load_machines([MACHINE, MACHINE], "0.2ms,1GB/s")
    assert (two.block_neurons, two.blocks_per_expert) == (448, 32)
    problem = Problem.of(two, model, machines)
    assert problem.model.block_neurons == 448
    assert problem.of_first_rank().model.block_neurons == 896
    coarser = two.model_copy(update={"block_neurons": 896})
    with pytest.raises(FiddlerError, match="block_neurons is 896, but this release plans with 448"):
        Problem.of(coarser, model, machines)


def test_commands_read_a_plan_of_two_ranks(folder):
    path = "plans/four-layers-6GB+4GB.yaml"
    shown = run("fiddler-opt", "show", path, "--why", "--plot", "plan.png", cwd=folder)
    assert shown.returncode == 0, shown.stderr
    for words in ("rank 1, machine 1: ", "states and sums on their way between ranks", "next in"):
        assert words in shown.stdout
    assert (folder / "plan.png").read_bytes().startswith(b"\x89PNG")
    one = plan(folder, "--machine", MACHINE, "--gpu-mem", "6GB", "-o", "one.yaml")
    assert one.returncode == 0, one.stderr
    difference = run("fiddler-opt", "diff", "one.yaml", path, cwd=folder)
    assert difference.returncode == 0, difference.stderr
    assert "ranks[1].gpu_memory_bytes.total" in difference.stdout
    same = run("fiddler-opt", "diff", path, path, cwd=folder)
    assert "the plans are the same" in same.stdout
    other = run("fiddler-opt", "show", path, "--why", "--machine", MACHINE, cwd=folder)
    assert other.returncode == 1
    assert "the plan was made from 2 machine profiles" in other.stderr


def test_one_size_plans_for_the_first_rank_alone(folder):
    one = MachineProfile.load(MACHINE)
    network = Network(round_trip_us=20.0, bytes_per_s=1e10)
    both = one.model_copy(update={"other_ranks": [one.as_rank(0, machine=0)], "network": network})
    path = folder / "both.machine.yaml"
    both.save(path)
    result = plan(folder, "--machine", path, "--gpu-mem", "6GB", "-o", "first.yaml")
    assert result.returncode == 0, result.stderr
    assert "the machine profile has 2 ranks, this plan uses 1" in result.stderr
    alone = plan(folder, "--machine", MACHINE, "--gpu-mem", "6GB", "-o", "alone.yaml")
    assert alone.returncode == 0
    first, only = (Plan.load(folder / name) for name in ("first.yaml", "alone.yaml"))
    assert first.ranks == only.ranks
    assert first.predicted == only.predicted
    assert first.provenance.machine_sha256 == profile_sha256(both)
    shown = run("fiddler-opt", "show", "first.yaml", "--why", cwd=folder)
    assert "next in" in shown.stdout
    printed = run("fiddler-opt", "show", path, cwd=folder)
    assert "rank 1, machine 0: " in printed.stdout


def test_a_rank_may_use_its_cpu_alone(folder):
    result = plan(folder, *TWO, "--gpu-mem", "6GB,0GB", "-o", "cpu.yaml")
    assert result.returncode == 0, result.stderr
    rank = Plan.load(folder / "cpu.yaml").ranks[1]
    assert rank.gpu_memory_bytes.total == rank.num_resident_blocks == 0
    assert rank.stream_share == {1: 0.0}
    assert rank.host_memory_bytes.experts > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((*TWO, "--gpu-mem", "6GB,1GB"), "--gpu-mem 1.00 GB of rank 1 is too small: "),
        ((*TWO, "--gpu-mem", "1GB,6GB"), "--gpu-mem 1.00 GB of rank 0 is too small: "),
        ((*TWO, "--gpu-mem", "6GB,99GB"), "--gpu-mem 99.00 GB of rank 1 is more than the 25.76 GB"),
        ((*TWO, "--gpu-mem", "6GB,6GB,6GB"), "has 3 sizes, a rank each, but the machine profile"),
        (("--machine", MACHINE, "--gpu-mem", "6GB,6GB"), "`fiddler-opt profile --ranks 2`"),
        ((*TWO, "--gpu-mem", "6GB,6"), "--gpu-mem 6: a size needs a unit"),
        ((*TWO, "--target", "4tok/s"), "--target is for one rank, but the machine profile has 2"),
        ((*TWO, "--gpu-mem", "6GB,6GB", "--host-mem", "9GB"), "--host-mem is for one rank"),
        ((*TWO, "--gpu-mem", "6GB,6GB", "--baseline", "cpu"), "--baseline cpu places the experts"),
        (TWO[:3], "--machine names 2 machines; add their network"),
        ((*TWO[:3], "--network", "1GB/s"), "--network 1GB/s: not a round trip and a rate"),
        ((*TWO[:3], "--network", "0ms,1GB/s"), "--network 0ms,1GB/s: not a round trip and a rate"),
        (("--machine", MACHINE, *TWO[3:]), "--network is between several --machine files"),
    ],
)
def test_flags_that_do_not_fit_are_refused(folder, flags, words):
    assert_refused(plan(folder, *flags, "-o", "none.yaml"), words)
    assert not (folder / "none.yaml").exists()


def test_a_plan_of_two_ranks_calibrates_nothing(folder):
    (folder / "result.json").write_text("{}")
    path = "plans/four-layers-6GB+4GB.yaml"
    result = run("fiddler-opt", "calibrate", path, "result.json", cwd=folder)
    assert_refused(result, "a plan of 2 ranks; calibrate each machine with a plan of one")


@pytest.mark.parametrize(("ranks", "memory"), spread([("1..2", "8GB"), ("1..3", "4GB")], 1))
def test_whatif_repeats_the_machine(folder, ranks, memory):
    """Two ranks have twice the GPU memory, CPUs and links of one."""
    flags = ("--model", "four-layers", "--machine", MACHINE, "--encoding", "bf16")
    result = run("fiddler-opt", "whatif", *flags, "--ranks", ranks, "--gpu-mem", memory, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "each rank has its own GPU, link and RAM" in result.stdout
    rows = [line.split("│") for line in result.stdout.splitlines() if line.startswith("│")]
    assert [row[1].strip() for row in rows] == ["1", "2", "3"][: int(ranks[-1])]
    rates = [float(row[2]) for row in rows]
    assert rates == sorted(set(rates))
    assert rates[1] > 1.5 * rates[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--machine", MACHINE, "--ranks", "1,100"), "--ranks 1,100: there can be 64 at most"),
        (("--machine", MACHINE, MACHINE, "--ranks", "1,2"), "--machine: give one profile"),
        (("--machine", MACHINE, "--ranks", "0,2"), "--ranks 0: must be more than zero"),
    ],
)
def test_impossible_ranks_are_refused(folder, flags, words):
    result = run("fiddler-opt", "whatif", "--model", "four-layers", *flags, cwd=folder)
    assert_refused(result, words)
