"""Commands: exit status, stdout, stderr and the files they write."""

import os
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from command_line import MACHINE, SHIPPED_PLAN, assert_refused, files_in, run, run_process, started
from conftest import DEMO, ROOT

from fiddler_opt.cli import COMMANDS, parse_arguments
from fiddler_opt.commands.profile import prompts_files
from fiddler_run.plan.schema import Plan

PROMPTS = DEMO / "prompts"
PROFILE_FLAGS = (
    "--model", DEMO, "--prompts", PROMPTS / "stories.jsonl", "--output-tokens", 2
)  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A folder in which the demo was profiled and planned by the commands."""
    folder = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    profiled = run("fiddler-opt", "profile", "--quick", "--force", *PROFILE_FLAGS, cwd=folder)
    torch.set_num_threads(threads)  # profiling changes it
    assert profiled.returncode == 0, profiled.stderr
    profiles = ["profiles/local.machine.yaml", "profiles/tiny-mixtral.routing.yaml"]
    assert profiled.stdout.split() == profiles
    # On a machine with a GPU the driver alone takes more than the 10 MB that suffice without one.
    budget = "10MB" if "kind: cpu" in (folder / profiles[0]).read_text() else "2GB"
    flags = ("--gpu-mem", budget, "--max-seq-len", 512, "-o", "plans/demo.yaml")
    planned = run_process("fiddler-opt", "plan", "--model", DEMO, *flags, cwd=folder)
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.split() == ["plans/demo.yaml"]
    assert "predicted for" in planned.stderr
    return folder


@pytest.mark.slow  # as `make demo`
def test_profile_plan_and_run_work_together(demo):
    plan = Plan.load(demo / "plans/demo.yaml")
    assert plan.rank.gpu_memory_bytes.used <= plan.rank.gpu_memory_bytes.total
    # A GPU may well be slower than the CPU with experts as small as these.
    assert plan.rank.device == "cuda" or plan.rank.num_resident_blocks > 0
    arguments = ("--plan", "plans/demo.yaml", "Once upon a time", "--max-new-tokens", 60)
    result = run("fiddler-run", *arguments, cwd=demo)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(" there was a ")
    for words in ("time to first token", "decode", "GPU hit rate", "loading experts"):
        assert words in result.stderr


@pytest.mark.slow
def test_profiling_routing_alone_keeps_the_machine_profile(demo, tmp_path):
    """The recorded routing is the same as before."""
    folder = shutil.copytree(demo / "profiles", tmp_path / "profiles")
    machine = folder / "local.machine.yaml"
    routing = folder / "tiny-mixtral.routing.yaml"
    before = machine.read_bytes(), yaml.safe_load(routing.read_text())["sets"]
    routing.unlink()
    result = run("fiddler-opt", "profile", *PROFILE_FLAGS, "--only", "routing", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["profiles/tiny-mixtral.routing.yaml"]
    assert (machine.read_bytes(), yaml.safe_load(routing.read_text())["sets"]) == before


def test_prompts_beside_the_model_are_the_default():
    flags = parse_arguments(["profile", "--model", str(DEMO)])
    assert prompts_files(flags) == sorted(PROMPTS.iterdir())
    assert {path.stem for path in PROMPTS.iterdir()} == {"arithmetic", "programs", "stories"}


def test_shipped_profiles_give_the_shipped_plan(tmp_path):
    """Only the provenance and the model's path may differ."""
    made = tmp_path / "again.yaml"
    command = yaml.safe_load(SHIPPED_PLAN.read_text())["provenance"]["command"].split()
    command[command.index("-o") + 1] = made
    result = run("fiddler-opt", *command[1:], cwd=ROOT)
    assert result.returncode == 0, result.stderr
    shipped, again = (
        Plan.load(path).model_dump(exclude={"provenance"}) for path in (SHIPPED_PLAN, made)
    )
    assert {**again, "model": None} == {**shipped, "model": None}


@pytest.mark.slow
def test_shipped_plan_runs_from_any_folder(tmp_path):
    """The plan is named as in the README; the prompt comes from stdin."""
    arguments = "--plan", "plans/demo.yaml", "-", "--max-new-tokens", 40
    result = run_process("fiddler-run", *arguments, cwd=tmp_path, stdin="Once upon a time\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(" there was a ")


def test_shipped_model_is_found_from_any_folder(tmp_path, monkeypatch):
    """Its name in the package works, and a plan made there records that name."""
    monkeypatch.chdir(tmp_path)
    model = ("--model", "examples/tiny-mixtral")
    assert prompts_files(parse_arguments(["profile", *model])) == sorted(PROMPTS.iterdir())
    flags = ("--machine", MACHINE, "--gpu-mem", "0GB", "--max-seq-len", 512, "-o", "plans/p.yaml")
    planned = run("fiddler-opt", "plan", *model, *flags, cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert Plan.load("plans/p.yaml").model.name == "examples/tiny-mixtral"
    arguments = ("--plan", "plans/p.yaml", "Once upon a time", "--max-new-tokens", 4)
    result = run("fiddler-run", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(" there was a ")


def test_seeded_sampling_and_beam_search_run(tmp_path):
    arguments = ("--plan", SHIPPED_PLAN, "def add", "--max-new-tokens", 12)
    drawn = ("--temperature", 1.2, "--top-p", 0.9, "--seed", 3)
    outputs = [run("fiddler-run", *arguments, *drawn, cwd=tmp_path) for _ in range(2)]
    assert [result.returncode for result in outputs] == [0, 0]
    assert outputs[0].stdout == outputs[1].stdout
    flags = ("--machine", MACHINE, "--gpu-mem", "0GB", "--num-beams", 4, "-o", "beams.yaml")
    planned = run("fiddler-opt", "plan", "--model", DEMO, *flags, cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    beams = run(
        "fiddler-run", "--plan", "beams.yaml", "def add", "--max-new-tokens", 12, cwd=tmp_path
    )
    assert beams.returncode == 0, beams.stderr
    assert "(" in beams.stdout  # the parameters of some function


@pytest.mark.parametrize(
    ("command", "defaults"),
    [
        (
            ["fiddler-run"],
            [
                "temperature T",
                "the checkpoint's, else 1)",
                "top-p P",
                "1.0)",
                "the plan's)",
                "the one that the plan names)",
            ],
        ),
        (
            ["fiddler-opt", "plan"],
            ["512)", "128)", "4096)", "mistralai/Mixtral-8x7B-v0.1)", "(default: profiles)"],
        ),
        (["fiddler-opt", "profile"], ["everything in the folder `prompts` next to the model)"]),
    ],
)
def test_help_states_defaults(command, defaults):
    result = run(*command, "--help", cwd=ROOT)
    assert result.returncode == 0
    for words in defaults:
        assert words in " ".join(result.stdout.split())


def test_help_works_in_its_own_process():
    result = run_process("fiddler-opt", "--help", cwd=ROOT)
    assert result.returncode == 0
    assert "profile" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("command", ["fiddler-opt", "fiddler-run"])
def test_version_without_pytorch(tmp_path, command):
    no_torch = "sys.modules['torch'] = None"
    with started(command, "--version", cwd=tmp_path, first=no_torch) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    assert stdout == f"{command} {version('fiddler-opt')}\n"


def test_refusal_works_in_its_own_process(tmp_path):
    result = run_process("fiddler-opt", "plan", "--gpu-mem", "24", cwd=tmp_path)
    assert_refused(result, "--gpu-mem 24: a size needs a unit")
    assert files_in(tmp_path) == {}


def test_closed_stdout_is_no_error(tmp_path):
    """As in `fiddler-opt plan ... | true`; the rest of the output is dropped."""
    reading, writing = os.pipe()
    os.close(reading)
    flags = ("--model", DEMO, "--machine", MACHINE, "--gpu-mem", "0GB", "-o", "p.yaml")
    with started("fiddler-opt", "plan", *flags, cwd=tmp_path, stdout=writing) as process:
        os.close(writing)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert (tmp_path / "p.yaml").exists()


def test_commands_are_listed_if_none_is_given(tmp_path):
    result = run("fiddler-opt", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    for name in COMMANDS:
        assert name in result.stderr


def test_usage_error_in_its_own_process_exits_with_2(tmp_path):
    result = run_process("fiddler-run", "--plan", "p.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "usage: fiddler-run" in result.stderr


def test_shorter_prompts_than_the_default_are_noted(tmp_path):
    flags = ("--model", DEMO, "--machine", MACHINE, "--gpu-mem", "0GB", "--max-seq-len", 512)
    words = "note: planned for prompts of 256 tokens, half of the context of 512"
    assert words in run("fiddler-opt", "plan", *flags, cwd=tmp_path).stderr
    chosen = run("fiddler-opt", "plan", *flags, "--prompt-tokens", 256, cwd=tmp_path)
    assert chosen.returncode == 0
    assert words not in chosen.stderr
