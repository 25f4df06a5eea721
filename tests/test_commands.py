"""The real commands: exit status, stdout, stderr, and what they leave on disk."""

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from conftest import DEMO, ROOT

import fiddler_opt.cli
import fiddler_run.cli
from fiddler_run.plan import Plan

SHIPPED_PLAN = ROOT / "plans" / "demo.yaml"
MACHINE, ROUTING = ROOT / "profiles" / "two-cores.machine.yaml", ROOT / "profiles" / "tiny-mixtral.routing.yaml"


def run(command: str, *arguments: object, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess:
    """A command in this process, from a folder: its exit status, stdout and stderr."""
    main = {"fiddler-opt": fiddler_opt.cli.main, "fiddler-run": fiddler_run.cli.main}[command]
    words = [str(argument) for argument in arguments]
    stdout, stderr = io.StringIO(), io.StringIO()
    with ExitStack() as stack:
        stack.enter_context(chdir(cwd))
        stack.enter_context(redirect_stdout(stdout))
        stack.enter_context(redirect_stderr(stderr))
        stack.enter_context(patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()))))
        stack.enter_context(patch.object(sys, "argv", [command, *words]))
        stack.enter_context(patch.dict(os.environ, COLUMNS="200"))
        try:
            status = main(words)
        except SystemExit as ended:  # argparse
            status = ended.code
    return subprocess.CompletedProcess([command, *words], status, stdout.getvalue(), stderr.getvalue())


def run_process(command: str, *arguments: object, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess:
    """The same in a process of its own, as a user starts it."""
    module, function = {
        "fiddler-opt": ("fiddler_opt.entry", "main"),
        "fiddler-run": ("fiddler_run.command", "fiddler_run"),
    }[command]
    folders = [str(ROOT), str(ROOT / "runtime"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    program = f"import sys; from {module} import {function}; sys.argv[0] = {command!r}; sys.exit({function}())"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """Exit status 1, nothing on stdout, and one line on stderr that contains `words`."""
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A folder in which the demo was profiled and planned by the commands."""
    folder = tmp_path_factory.mktemp("demo")
    profiled = run_process("fiddler-opt", "profile", "--quick", "--force", "--model", DEMO, cwd=folder)
    assert profiled.returncode == 0, profiled.stderr
    assert profiled.stdout.split() == ["profiles/local.machine.yaml", "profiles/tiny-mixtral.routing.yaml"]
    # On a machine with a GPU the driver alone takes more than the 10 MB that suffice without one.
    budget = "10MB" if "kind: host" in (folder / "profiles/local.machine.yaml").read_text() else "2GB"
    planned = run_process(
        "fiddler-opt", "plan", "--model", DEMO, "--gpu-mem", budget, "--max-seq-len", 512, "-o", "plans/demo.yaml", cwd=folder
    )
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.split() == ["plans/demo.yaml"]
    assert "predicted for" in planned.stderr
    return folder


def test_chain(demo):
    plan = Plan.load(demo / "plans/demo.yaml")
    assert plan.gpu_memory_bytes.used <= plan.gpu_memory_bytes.total
    if plan.device == "host":  # a GPU may well be slower than the CPU with experts as small as these
        assert plan.num_resident_blocks > 0
    result = run_process("fiddler-run", "--plan", "plans/demo.yaml", "Once upon a time", "--max-new-tokens", 60, cwd=demo)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(" there was a ")
    for words in ("time to first token", "decode", "GPU hit rate", "loading experts"):
        assert words in result.stderr


def test_routing_alone(demo, tmp_path):
    """It takes the machine profile that is there, and records the same."""
    folder = shutil.copytree(demo / "profiles", tmp_path / "profiles")
    machine, routing = folder / "local.machine.yaml", folder / "tiny-mixtral.routing.yaml"
    before = machine.read_bytes(), yaml.safe_load(routing.read_text())["sets"]
    routing.unlink()
    result = run("fiddler-opt", "profile", "--model", DEMO, "--only", "routing", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["profiles/tiny-mixtral.routing.yaml"]
    assert (machine.read_bytes(), yaml.safe_load(routing.read_text())["sets"]) == before


def test_the_same_plan_from_the_same_profiles(demo):
    """Golden plan: the shipped one is what the shipped profiles give, but for when and where it was made."""
    made = demo / "again.yaml"
    command = yaml.safe_load(SHIPPED_PLAN.read_text())["provenance"]["command"].split()
    command[command.index("-o") + 1] = made
    result = run("fiddler-opt", *command[1:], cwd=ROOT)
    assert result.returncode == 0, result.stderr
    shipped, again = (Plan.load(path).model_dump(exclude={"provenance"}) for path in (SHIPPED_PLAN, made))
    assert {**again, "model": None} == {**shipped, "model": None}


def test_the_shipped_plan_runs_from_any_folder(tmp_path):
    """Named as in the README, from a folder that has no plans; the prompt comes from stdin."""
    arguments = "--plan", "plans/demo.yaml", "-", "--max-new-tokens", 40
    result = run_process("fiddler-run", *arguments, cwd=tmp_path, stdin="Once upon a time\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(" there was a ")


def test_sampling_and_beams(demo):
    arguments = ("--plan", "plans/demo.yaml", "def add", "--max-new-tokens", 12)
    outputs = [
        run("fiddler-run", *arguments, "--temperature", 1.2, "--top-p", 0.9, "--seed", 3, cwd=demo),
        run("fiddler-run", *arguments, "--temperature", 1.2, "--top-p", 0.9, "--seed", 3, cwd=demo),
    ]
    assert [result.returncode for result in outputs] == [0, 0]
    assert outputs[0].stdout == outputs[1].stdout
    planned = run("fiddler-opt", "plan", "--model", DEMO, "--gpu-mem", "0GB", "--num-beams", 4, "-o", "beams.yaml", cwd=demo)
    assert planned.returncode == 0, planned.stderr
    beams = run("fiddler-run", "--plan", "beams.yaml", "def add", "--max-new-tokens", 12, cwd=demo)
    assert beams.returncode == 0, beams.stderr
    assert "(" in beams.stdout  # the parameters of some function


@pytest.mark.parametrize(
    ("command", "defaults"),
    [
        (["fiddler-run"], ["temperature T", "0.0)", "top-p P", "1.0)", "the plan's)", "the one that the plan names)"]),
        (["fiddler-opt", "plan"], ["512)", "128)", "4096)", "mistralai/Mixtral-8x7B-v0.1)", "(default: profiles)"]),
        (["fiddler-opt", "profile"], ["all that the folder `prompts` in the model's holds)"]),
    ],
)
def test_help_states_defaults(command, defaults):
    result = run(*command, "--help", cwd=ROOT)
    assert result.returncode == 0
    for words in defaults:
        assert words in " ".join(result.stdout.split())


PLAN = ("plan", "--model", DEMO, "--machine", MACHINE, "--routing", ROUTING)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpu-mem", "24"], ["--gpu-mem 24: a size needs a unit", "24GB"]),
        (["--gpu-mem", "1MB"], ["--gpu-mem 1.00 MB is too small", "kv cache"]),
        (["--gpu-mem", "900TB"], ["--gpu-mem 900.00 TB is more than"]),
        (["--gpu-mem", "0GB", "--machine", "none.yaml"], ["none.yaml: no such machine profile", "fiddler-opt profile"]),
        (["--gpu-mem", "0GB", "--routing", "none.yaml"], ["none.yaml: cannot read"]),
        (["--gpu-mem", "0GB", "--model", "./none"], ["none: no such folder", "--model"]),
        (["--gpu-mem", "0GB", "--model", "nobody/nothing"], ["nobody/nothing: not a folder", "--model"]),
        (["--gpu-mem", "0GB", "--model", "a/b/c"], ["a/b/c: neither a folder nor a Hugging Face model id"]),
        (["--gpu-mem", "0GB", "--max-seq-len", "9999"], ["--max-seq-len 9999 is more than the model's 1024"]),
        (["--gpu-mem", "0GB", "--max-seq-len", "64", "--prompt-tokens", "64"], ["--prompt-tokens 64", "exceed --max-seq-len 64"]),
        (["--gpu-mem", "0GB", "-o", "old.yaml/plan.yaml"], ["old.yaml/plan.yaml: cannot write"]),
        (["--gpu-mem", "0GB", "-o", "."], ["it is a folder"]),
        (["--gpu-mem", "0GB", "--model", "mistralai/Mixtral-8x7B-v0.1"], ["num_layers is 6", "a profile of another model"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_plan_refuses(tmp_path, flags, words):
    (tmp_path / "old.yaml").write_text("kept")
    result = run("fiddler-opt", *PLAN, "-o", "old.yaml", *flags, cwd=tmp_path)
    assert_refused(result, *words)
    assert files_in(tmp_path) == {"old.yaml": b"kept"}


def test_gpu_memory_below_what_mixtral_needs_before_any_expert(tmp_path):
    machine = ROOT / "profiles" / "rtx4090.machine.yaml"
    result = run("fiddler-opt", "plan", "--machine", machine, "--gpu-mem", "1GB", "-o", "p.yaml", cwd=tmp_path)
    assert_refused(result, "--gpu-mem 1.00 GB is too small", "non expert weights 3.21 GB")
    assert files_in(tmp_path) == {}


def test_without_a_profile_it_asks_for_one(tmp_path):
    result = run("fiddler-opt", "plan", "--gpu-mem", "24GB", cwd=tmp_path)
    assert_refused(result, "profiles/local.machine.yaml: no such machine profile; run `fiddler-opt profile` first")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("cpu:", "gpu:", ["gpu: unknown key"]),
        ("{0.0: ", "{0.0: -", ["absent_expert_us[1].0.0"]),
        ("{0.0: ", "{0.0: .nan, 1.0: ", ["absent_expert_us[1].0.0"]),
        ("{0.0: ", "{0.5: ", ["absent_expert_us[1]: needs an entry for the share 0.0"]),
        ("version: 2", "version: 7", ["reads version 2, the file says 7"]),
    ],
)
def test_damaged_machine_profiles(tmp_path, old, new, words):
    (tmp_path / "m.yaml").write_text(MACHINE.read_text().replace(old, new, 1))
    assert_refused(run("fiddler-opt", *PLAN, "--machine", "m.yaml", "--gpu-mem", "10MB", cwd=tmp_path), "m.yaml: ", *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompts", "empty.txt"], ["empty.txt: holds no prompt"]),
        (["--prompts", "none.txt"], ["none.txt: cannot read"]),
        (["--profiles", "empty.txt"], ["empty.txt/local.machine.yaml: cannot write"]),
        (["--model", "./none"], ["none: no such folder"]),
        (["--only", "machine", "--prompts", "p.txt"], ["--only machine records no routing"]),
        (["--only", "machine", "--trace", "t.npz"], ["--only machine records no routing"]),
        (["--plan", "none.yaml"], ["none.yaml: cannot read"]),
        (["--prompts", "empty.txt", "empty.txt"], ["empty.txt is given twice"]),
        (["--only", "routing"], ["profiles/local.machine.yaml: cannot read"]),
        (["--only", "routing", "--model", "mistralai/Mixtral-8x7B-v0.1"], ["recording routing needs --prompts FILE"]),
    ],
    ids=" ".join,
)
def test_profile_refuses(tmp_path, flags, words):
    (tmp_path / "empty.txt").write_text("\n")
    assert_refused(run("fiddler-opt", "profile", "--model", DEMO, *flags, cwd=tmp_path), *words)
    assert files_in(tmp_path) == {"empty.txt": b"\n"}


def edited_plan(folder: Path, **changes) -> Path:
    data = yaml.safe_load(SHIPPED_PLAN.read_text())
    data["model"]["name"] = str(DEMO)
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    path = folder / "edited.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"colour": "red"}, ["edited.yaml: colour: unknown key"]),
        ({"version": 9}, ["edited.yaml: version: this release reads version 2, the file says 9"]),
        ({"model": {"hidden_size": 64}}, ["edited.yaml: "]),
        ({"model": {"name": "./none"}}, ["none: no such folder; name the checkpoint's folder with --model"]),
        ({"cpu_threads": 4096}, ["edited.yaml: cpu_threads is 4096", "fiddler-opt profile"]),
    ],
    ids=str,
)
def test_run_refuses_plans(tmp_path, changes, words):
    result = run("fiddler-run", "--plan", edited_plan(tmp_path, **changes), "Once", cwd=tmp_path)
    assert_refused(result, *words)


def test_run_refuses_prompts(tmp_path):
    plan = edited_plan(tmp_path)
    for arguments, words in (
        (["Once", "--max-new-tokens", "5000"], ["more than the plan's context of"]),
        (["  "], ["the prompt is empty"]),
        (["Once", "--chat"], ["no chat template"]),
    ):
        assert_refused(run("fiddler-run", "--plan", plan, *arguments, cwd=tmp_path), *words)
    assert_refused(run("fiddler-run", "--plan", "none.yaml", "Once", cwd=tmp_path), "none.yaml: cannot read: No such file")


def test_run_refuses_checkpoints(tmp_path):
    broken = shutil.copytree(DEMO, tmp_path / "broken")
    shard = sorted(broken.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    plan = edited_plan(tmp_path)
    shard.write_bytes(whole[: len(whole) // 2])
    assert_refused(run("fiddler-run", "--plan", plan, "--model", broken, "Once", cwd=tmp_path), shard.name, "cut off")
    shard.unlink()
    assert_refused(run("fiddler-run", "--plan", plan, "--model", broken, "Once", cwd=tmp_path), shard.name, "missing")
    config = json.loads((DEMO / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_local_experts": 16}))
    result = run("fiddler-run", "--plan", plan, "--model", broken, "Once", cwd=tmp_path)
    assert_refused(result, "edited.yaml: model.num_experts is 8, but num_local_experts is 16", "fiddler-opt plan --model")


@pytest.mark.parametrize(
    "arguments",
    [[], ["--plan", "p.yaml"], ["--plan", "p.yaml", "x", "--top-p", "2"], ["--plan", "p.yaml", "x", "--num-beams", "0"]],
)
def test_usage_errors_exit_with_2(arguments, tmp_path):
    result = run("fiddler-run", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert "usage: fiddler-run" in result.stderr
