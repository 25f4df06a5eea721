"""Refusals of the commands: one line that names the cause, exit status 1, no file touched."""

import json
import shutil

import pytest
from command_line import MACHINE, ROUTING, assert_refused, edited_plan, files_in, run
from conftest import DEMO, ROOT

PLAN = ("plan", "--model", DEMO, "--machine", MACHINE, "--routing", ROUTING)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpu-mem", "24"], ["--gpu-mem 24: a size needs a unit", "24GB"]),
        (["--gpu-mem", "1MB"], ["--gpu-mem 1.00 MB is too small", "KV cache"]),
        (["--gpu-mem", "900TB"], ["--gpu-mem 900.00 TB is more than"]),
        (
            ["--gpu-mem", "0GB", "--machine", "none.yaml"],
            ["none.yaml: no such file", "fiddler-opt profile"],
        ),
        (["--gpu-mem", "0GB", "--routing", "none.yaml"], ["none.yaml: no such file"]),
        (["--gpu-mem", "0GB", "--model", "./none"], ["none: no such folder", "--model"]),
        (
            ["--gpu-mem", "0GB", "--model", "nobody/nothing"],
            ["nobody/nothing: neither a folder", "--model"],
        ),
        (
            ["--gpu-mem", "0GB", "--model", "a/b/c"],
            ["a/b/c: neither a folder nor a Hugging Face model id"],
        ),
        (
            ["--gpu-mem", "0GB", "--max-seq-len", "9999"],
            ["--max-seq-len 9999 is more than the model's 1024"],
        ),
        (
            ["--gpu-mem", "0GB", "--max-seq-len", "64", "--prompt-tokens", "64"],
            ["--prompt-tokens 64", "exceed --max-seq-len 64"],
        ),
        (["--gpu-mem", "0GB", "-o", "old.yaml/plan.yaml"], ["old.yaml/plan.yaml: cannot write"]),
        (["--gpu-mem", "0GB", "-o", "."], ["it is a folder"]),
        (
            ["--gpu-mem", "0GB", "--model", "mistralai/Mixtral-8x7B-v0.1"],
            ["num_layers is 6", "a profile of another model"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_plan_refuses_bad_flags(tmp_path, flags, words):
    (tmp_path / "old.yaml").write_text("kept")
    result = run("fiddler-opt", *PLAN, "-o", "old.yaml", *flags, cwd=tmp_path)
    assert_refused(result, *words)
    assert files_in(tmp_path) == {"old.yaml": b"kept"}


def test_plan_refuses_gpu_memory_below_the_dense_weights(tmp_path):
    """The embedding is in host memory; all other dense weights are counted."""
    machine = ROOT / "profiles" / "rtx4090.machine.yaml"
    flags = ("--machine", machine, "--gpu-mem", "1GB", "-o", "p.yaml")
    result = run("fiddler-opt", "plan", *flags, cwd=tmp_path)
    assert_refused(result, "--gpu-mem 1.00 GB is too small", "non-expert weights 2.95 GB")
    assert files_in(tmp_path) == {}


def test_plan_without_a_machine_profile_asks_for_one(tmp_path):
    result = run("fiddler-opt", "plan", "--gpu-mem", "24GB", cwd=tmp_path)
    assert_refused(
        result,
        "profiles/local.machine.yaml: no such file; make it with `fiddler-opt profile",
    )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("cpu:", "gpu:", ["gpu: unknown key"]),
        ("{0.0: ", "{0.0: -", ["host_expert_us[1].0.0"]),
        ("{0.0: ", "{0.0: .nan, 1.0: ", ["host_expert_us[1].0.0"]),
        ("{0.0: ", "{0.5: ", ["host_expert_us[1]: needs an entry for the share 0.0"]),
        ("version: 5", "version: 7", ["reads version 5, but the file says 7"]),
    ],
)
def test_plan_refuses_damaged_machine_profiles(tmp_path, old, new, words):
    (tmp_path / "m.yaml").write_text(MACHINE.read_text().replace(old, new, 1))
    assert_refused(
        run("fiddler-opt", *PLAN, "--machine", "m.yaml", "--gpu-mem", "10MB", cwd=tmp_path),
        "m.yaml: ",
        *words,
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompts", "empty.txt"], ["empty.txt: holds no prompt"]),
        (["--prompts", "none.txt"], ["none.txt: cannot read"]),
        (["--profiles", "empty.txt"], ["empty.txt/local.machine.yaml: cannot write"]),
        (["--model", "./none"], ["none: no such folder"]),
        (["--only", "model", "--quick"], ["--only model does not time the machine; remove"]),
        (["--only", "routing", "--ranks", "3"], ["--only routing does not time the machine"]),
        (["--only", "machine", "--prompts", "p.txt"], ["--only machine does not record routing"]),
        (["--only", "machine", "--trace", "t.npz"], ["--only machine does not record routing"]),
        (["--plan", "none.yaml"], ["none.yaml: no such file"]),
        (["--prompts", "empty.txt", "empty.txt"], ["empty.txt is given twice"]),
        (["--only", "routing"], ["profiles/local.machine.yaml: no such file; make it with"]),
        (
            ["--only", "routing", "--model", "mistralai/Mixtral-8x7B-v0.1"],
            ["recording routing needs --prompts FILE"],
        ),
    ],
    ids=" ".join,
)
def test_profile_refuses_bad_flags(tmp_path, flags, words):
    (tmp_path / "empty.txt").write_text("\n")
    assert_refused(run("fiddler-opt", "profile", "--model", DEMO, *flags, cwd=tmp_path), *words)
    assert files_in(tmp_path) == {"empty.txt": b"\n"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"colour": "red"}, ["edited.yaml: colour: unknown key"]),
        ({"version": 9}, ["edited.yaml: version: ", "reads version 3, but the file says 9"]),
        ({"model__hidden_size": 64}, ["edited.yaml: "]),
        (
            {"model__name": "./none"},
            ["none: no such folder; name the checkpoint's folder with --model"],
        ),
        (
            {"ranks__0__cpu_threads": 4096},
            ["edited.yaml: cpu_threads is 4096", "fiddler-opt profile"],
        ),
    ],
    ids=str,
)
def test_run_refuses_bad_plans(tmp_path, changes, words):
    result = run("fiddler-run", "--plan", edited_plan(tmp_path, **changes), "Once", cwd=tmp_path)
    assert_refused(result, *words)


def test_run_refuses_bad_prompts(tmp_path):
    plan = edited_plan(tmp_path)
    for arguments, words in (
        (["Once", "--max-new-tokens", "5000"], ["more than the plan's context of"]),
        (["  "], ["the prompt is empty"]),
        (["Once", "--chat"], ["no chat template"]),
    ):
        assert_refused(run("fiddler-run", "--plan", plan, *arguments, cwd=tmp_path), *words)
    assert_refused(
        run("fiddler-run", "--plan", "none.yaml", "Once", cwd=tmp_path),
        "none.yaml: no such file; make it with `fiddler-opt plan`",
    )


def test_run_refuses_bad_checkpoints(tmp_path):
    broken = shutil.copytree(DEMO, tmp_path / "broken")
    shard = sorted(broken.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    plan = edited_plan(tmp_path)
    shard.write_bytes(whole[: len(whole) // 2])
    assert_refused(
        run("fiddler-run", "--plan", plan, "--model", broken, "Once", cwd=tmp_path),
        shard.name,
        "truncated",
    )
    shard.unlink()
    assert_refused(
        run("fiddler-run", "--plan", plan, "--model", broken, "Once", cwd=tmp_path),
        shard.name,
        "missing",
    )
    config = json.loads((DEMO / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_local_experts": 16}))
    result = run("fiddler-run", "--plan", plan, "--model", broken, "Once", cwd=tmp_path)
    assert_refused(
        result,
        f"edited.yaml: model.num_experts is 8, but {broken}/config.json implies 16",
        "fiddler-opt plan --model",
    )
