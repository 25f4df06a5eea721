"""All problems of a plan, its model and this machine are listed; loading raises the first."""

import shutil

import pytest
from command_line import run
from conftest import demo_shape, make_plan
from damage import SHARDS, assert_listed, change_config, cut, simulate_2_gb, write_plan

from fiddler_run import load_model
from fiddler_run.errors import FiddlerError
from fiddler_run.loading.check import (
    check_plan,
)
from fiddler_run.plan.schema import Plan
from fiddler_run.system import host

GPU_PART_IN_RAM = "the GPU part is kept in host memory and computed by the CPU"


def test_good_plan_has_no_problems(tmp_path, model):
    problems, notes = check_plan(write_plan(tmp_path))
    assert problems == []
    assert all(GPU_PART_IN_RAM in note for note in notes)
    assert check_plan("plans/demo.yaml")[0] == []


def test_all_problems_are_listed(tmp_path, model, monkeypatch):
    """The file's rules, the model's shape, its weights and this machine give two or more each."""
    simulate_2_gb(tmp_path, monkeypatch)
    plan = write_plan(
        tmp_path,
        workload__max_seq_len=70,
        ranks__0__stream_share__1=1.5,
        ranks__0__resident_blocks__3__1=20,
        ranks__0__resident_blocks__5=[0, 0],
        ranks__0__gpu_memory_bytes__total=5,
        ranks__0__cpu_threads=4096,
        ranks__0__host_memory_bytes__experts=10**13,
    )
    change_config(model, num_local_experts=16, intermediate_size=512)
    cut(model / SHARDS[0])
    (model / SHARDS[1]).unlink()
    problems, _ = check_plan(plan)
    config = model / "config.json"
    assert_listed(
        problems,
        [
            (plan, "workload.max_seq_len: 70 is less than 16 prompt + 64 output tokens"),
            (plan, "ranks[0].stream_share[1]: 1.5 is not between 0 and 1"),
            (plan, "ranks[0].resident_blocks[3][1]: 20 is more than the 8 blocks of an expert"),
            (plan, "ranks[0].resident_blocks[5]: 2 numbers for 8 experts"),
            (plan, "ranks[0].gpu_memory_bytes.total: 5 is less than the sum of its parts"),
            (plan, f"model.num_experts is 8, but {config} implies 16"),
            (plan, f"model.intermediate_size is 256, but {config} implies 512"),
            (model / SHARDS[0], "damaged or truncated"),
            (model / SHARDS[1], "missing, though model.safetensors.index.json names it"),
            (plan, f"cpu_threads is 4096, but {host.num_cores()} cores are available"),
            (
                plan,
                (
                    "its experts need 10000.00 GB of host memory, plus 0.00 GB while loading, but"
                    " 2.00 GB is available"
                ),
            ),
        ],
    )


def test_wrong_keys_and_types_are_all_listed(tmp_path):
    """The file is then not checked against model and machine, and a note says so."""
    plan = write_plan(
        tmp_path,
        colour="red",
        ranks__0__cpu_threads=...,
        block_neurons="many",
        ranks__0__gpu_memory_bytes__reserve=-1,
        workload__max_seq_len=70,
    )
    problems, notes = check_plan(plan)
    expected = [
        "colour: unknown key",
        "block_neurons: ",
        "ranks[0].gpu_memory_bytes.reserve: ",
        "ranks[0].cpu_threads: missing",
        "max_seq_len: 70",
    ]
    assert_listed(problems, [(plan, words) for words in expected])
    assert "were not checked" in notes[0]
    missing = tmp_path / "none.yaml"
    assert_listed(check_plan(missing)[0], [(missing, "no such file; make it with")])


@pytest.mark.parametrize(
    ("changes", "damage"),
    [
        (
            {"ranks__0__resident_blocks__3__1": 20, "ranks__0__stream_share__1": 1.5},
            lambda model: None,
        ),
        ({"ranks__0__cpu_threads": 4096}, lambda model: None),
        ({}, lambda model: change_config(model, num_local_experts=16, hidden_size=64)),
        ({}, lambda model: change_config(model, model_type="llama")),
        ({}, lambda model: change_config(model, rms_norm_eps="small")),
        ({}, lambda model: change_config(model, vocab_size=512)),
        ({}, lambda model: cut(model / SHARDS[1])),
        ({}, lambda model: (model / SHARDS[0]).unlink()),
        ({}, lambda model: (model / "model.safetensors.index.json").unlink()),
        ({}, shutil.rmtree),
    ],
)
def test_loading_raises_the_first_problem(tmp_path, model, changes, damage):
    plan = write_plan(tmp_path, **changes)
    damage(model)
    problems, _ = check_plan(plan)
    assert problems
    with pytest.raises(FiddlerError) as refusal:
        load_model(plan)
    assert str(refusal.value) == problems[0]


def test_contradictory_predictions_are_noted(tmp_path, model):
    for changes, words in (
        (
            {"predicted__decode_tokens_per_s": 50.0},
            "decode_ms adds up to 1000, not 20; decode_tokens_per_s exceeds its bound",
        ),
        ({"predicted__ttft_s": 3.0}, "ttft_ms adds up to 1000, not 3000"),
    ):
        problems, notes = check_plan(write_plan(tmp_path, **changes))
        assert problems == []
        assert any(words in note for note in notes)
    for shipped in ("plans/demo.yaml", "plans/rtx4090.yaml"):
        assert not any("predicted:" in note for note in check_plan(shipped)[1])


def test_config_without_weights_is_checked_against_the_shape(tmp_path, model):
    plan = write_plan(tmp_path)
    for path in model.glob("*.safetensors*"):
        path.unlink()
    problems, notes = check_plan(plan)
    assert problems == []
    assert notes[0].startswith("the weights of ./model are missing or incomplete")
    change_config(model, hidden_size=64)
    config = model / "config.json"
    assert_listed(
        check_plan(plan)[0], [(plan, f"model.hidden_size is 128, but {config} implies 64")]
    )


def test_invalid_plan_cannot_be_constructed():
    plan = make_plan(demo_shape(), [[0] * 8] * 6)
    rank = plan.rank.model_copy(update={"stream_share": {1: 4.0}})
    with pytest.raises(ValueError, match=r"ranks\[0\].stream_share\[1\]: 4.0 is not between"):
        Plan(**{**dict(plan), "ranks": [rank]})


def test_dry_run_lists_all_problems(tmp_path, model):
    """One problem per line on stdout; their number on stderr."""
    plan = write_plan(tmp_path)
    fits = run("fiddler-run", "--plan", plan, "--dry-run", cwd=tmp_path)
    assert (fits.returncode, fits.stdout) == (0, f"{plan} fits its model and this machine\n")
    change_config(model, hidden_size=64)
    cut(model / SHARDS[1])
    stopped = run("fiddler-run", "--plan", plan, "--dry-run", cwd=tmp_path)
    assert stopped.returncode == 1
    assert stopped.stdout.splitlines() == check_plan(plan)[0]
    assert stopped.stderr.endswith(f"{plan}: cannot run here: 2 problems, listed above\n")
    for weights in model.glob("*.safetensors*"):
        weights.unlink()
    change_config(model, hidden_size=128)
    unseen = run("fiddler-run", "--plan", plan, "--dry-run", cwd=tmp_path)
    assert unseen.stdout == f"{plan} fits its model's config.json and this machine\n"
    assert "note: the weights of ./model are missing or incomplete" in unseen.stderr
