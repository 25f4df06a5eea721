"""Everything that is wrong with a plan, for its model or for this machine is listed; loading refuses by the first of it."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from conftest import DEMO, demo_shape, make_plan, set_key

from fiddler_run import host, load_model
from fiddler_run.check import Gpu, check_plan, core_problem, device_note, gpu_memory_problem, host_memory_problem, machine_problems
from fiddler_run.errors import FiddlerError
from fiddler_run.plan import Plan

SHARDS = sorted(path.name for path in DEMO.glob("*.safetensors"))
GPU_PART_IN_RAM = "its GPU part is held in host memory and computed by the CPU"


@pytest.fixture
def model(tmp_path) -> Path:
    return shutil.copytree(DEMO, tmp_path / "model")


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """The root of the system's files, of a machine with 2 GB of free memory; the cores are those of this one."""
    root = tmp_path / "root"
    (root / "proc").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemAvailable: 1953125 kB\n")
    monkeypatch.setattr(host, "ROOT", root)
    return root


def write_plan(folder: Path, **changes) -> Path:
    """A plan for the model beside it, with 4 of each expert's 8 blocks resident; `a__b=1` sets key b in a."""
    data = yaml.safe_load(make_plan(demo_shape("bfloat16"), [[4] * 8] * 6).dump())
    data["model"]["name"] = "./model"
    for path, value in changes.items():
        set_key(data, path.split("__"), value)
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:1000])


def change_config(model: Path, **values) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **values}))


def assert_listed(found: list[str], expected: list[tuple[Path, str]]) -> None:
    """As many, in this order, each of that file and with these words in it."""
    assert len(found) == len(expected), "\n".join(found)
    for line, (file, words) in zip(found, expected, strict=True):
        assert line.startswith(f"{file}: ")
        assert words in line
        assert "\n" not in line


def test_nothing_is_wrong_with_a_good_plan(tmp_path, model):
    problems, notes = check_plan(write_plan(tmp_path))
    assert problems == []
    assert all(GPU_PART_IN_RAM in note for note in notes)
    assert check_plan("plans/demo.yaml")[0] == []


def test_everything_that_is_wrong_is_listed(tmp_path, model, machine):
    """Rules of the file, its model's shape, its weights, this machine: two of each at once."""
    plan = write_plan(
        tmp_path,
        workload__max_seq_len=70,
        stream_share__1=1.5,
        resident_blocks__3__1=20,
        resident_blocks__5=[0, 0],
        gpu_memory_bytes__total=5,
        cpu_threads=4096,
        host_memory_bytes__experts=10**13,
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
            (plan, "stream_share[1]: 1.5 is not between 0 and 1"),
            (plan, "resident_blocks[3][1]: 20 is more than the 8 blocks of an expert"),
            (plan, "resident_blocks[5]: 2 numbers for 8 experts"),
            (plan, "gpu_memory_bytes.total: 5 is less than the sum of its parts"),
            (plan, f"model.num_experts is 8, but num_local_experts is 16 in {config}"),
            (plan, f"model.intermediate_size is 256, but intermediate_size is 512 in {config}"),
            (model / SHARDS[0], "damaged or cut off"),
            (model / SHARDS[1], "missing, though model.safetensors.index.json names it"),
            (plan, f"cpu_threads is 4096, but {host.num_cores()} cores are available"),
            (plan, "its experts need 10000.00 GB of host memory, and loading them 0.00, but 2.00 GB are available"),
        ],
    )


def test_wrong_keys_and_types_are_all_listed(tmp_path):
    """What is left of the file cannot be held against a model or a machine, which is said."""
    plan = write_plan(
        tmp_path, colour="red", cpu_threads=..., block_neurons="many", gpu_memory_bytes__reserve=-1, workload__max_seq_len=70
    )
    problems, notes = check_plan(plan)
    expected = ["colour: unknown key", "gpu_memory_bytes.reserve: ", "cpu_threads: missing", "block_neurons: ", "max_seq_len: 70"]
    assert_listed(problems, [(plan, words) for words in expected])
    assert "were not looked at" in notes[0]
    missing = tmp_path / "none.yaml"
    assert_listed(check_plan(missing)[0], [(missing, "cannot read: No such file")])


@pytest.mark.parametrize(
    ("changes", "damage"),
    [
        ({"resident_blocks__3__1": 20, "stream_share__1": 1.5}, lambda model: None),
        ({"cpu_threads": 4096}, lambda model: None),
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
def test_loading_refuses_by_the_first_in_the_same_words(tmp_path, model, changes, damage):
    plan = write_plan(tmp_path, **changes)
    damage(model)
    problems, _ = check_plan(plan)
    assert problems
    with pytest.raises(FiddlerError) as refusal:
        load_model(plan)
    assert str(refusal.value) == problems[0]


def test_loading_refuses_by_the_memory_that_is_free(tmp_path, model, machine):
    plan = write_plan(tmp_path)
    (machine / "proc/meminfo").write_text("MemAvailable: 1 kB\n")
    problems, _ = check_plan(plan)
    assert_listed(problems, [(plan, "its experts need 0.0")])
    with pytest.raises(FiddlerError) as refusal:
        load_model(plan)
    assert str(refusal.value) == problems[0]


def test_predictions_that_contradict_each_other_are_told(tmp_path, model):
    for changes, words in (
        ({"predicted__decode_tokens_per_s": 50.0}, "decode_ms adds up to 1000, not 20; decode_tokens_per_s is more than its bound"),
        ({"predicted__ttft_s": 3.0}, "ttft_ms adds up to 1000, not 3000"),
    ):
        problems, notes = check_plan(write_plan(tmp_path, **changes))
        assert problems == []
        assert any(words in note for note in notes)
    for shipped in ("plans/demo.yaml", "plans/rtx4090.yaml"):
        assert not any("predicted:" in note for note in check_plan(shipped)[1])


def test_numbers_at_which_a_machine_suffices():
    assert core_problem(threads=16, cores=16) is None
    assert core_problem(threads=16, cores=15).startswith("cpu_threads is 16, but 15 cores are available here")
    assert host_memory_problem("experts", 70 * 10**9, 2 * 10**9, 72 * 10**9) is None
    told = host_memory_problem("experts", 70 * 10**9, 2 * 10**9, 71_990_000_000)
    assert told.startswith("its experts need 70.00 GB of host memory, and loading them 2.00, but 71.99 GB are available")
    memory = make_plan(demo_shape(), [[0] * 8] * 6).gpu_memory_bytes.model_copy(update={"total": 24 * 10**9, "reserve": 10**9})
    assert gpu_memory_problem(memory, Gpu("RTX", 23 * 10**9, 25 * 10**9)) is None
    told = gpu_memory_problem(memory, Gpu("RTX", 22_990_000_000, 25 * 10**9))
    assert told.startswith("gpu_memory_bytes.total is 24.00 GB, but RTX has 22.99 GB free, and 23.00 are needed")


def test_what_lies_in_host_memory(machine):
    """Without a GPU its part too; 48 experts of 98,304 weights of 2 bytes, half of them resident; 8 are being read at once."""
    plan = make_plan(demo_shape("bfloat16"), [[4] * 8] * 6)
    half, reading = 24 * 196_608, 8 * 196_608
    for gpu, needed in ((Gpu("RTX", 2**31, 2**31), half + reading), (None, 2 * half + reading)):
        for lacking in (0, 1024):
            (machine / "proc/meminfo").write_text(f"MemAvailable: {(needed - lacking) // 1024} kB\n")
            assert len(machine_problems(plan, gpu, "plan")) == bool(lacking)
    memory = plan.host_memory_bytes.model_copy(update={"embedding": 10**9})
    with_embedding = plan.model_copy(update={"host_memory_bytes": memory})
    assert machine_problems(with_embedding, None, "p")[0].startswith("p: its experts and embedding need 1.01 GB of host memory")


def test_a_config_alone_is_held_against_the_shape(tmp_path, model):
    plan = write_plan(tmp_path)
    for path in model.glob("*.safetensors*"):
        path.unlink()
    problems, notes = check_plan(plan)
    assert problems == []
    assert notes[0].startswith("the weights of ./model are not here")
    change_config(model, hidden_size=64)
    assert_listed(check_plan(plan)[0], [(plan, "model.hidden_size is 128, but hidden_size is 64")])


def test_weights_of_a_hugging_face_model_are_checked_if_they_are_all_here(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cache = tmp_path / "models--someone--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    folder = shutil.copytree(DEMO, cache / "snapshots" / ("0" * 40))
    plan = write_plan(tmp_path, model__name="someone/tiny")
    assert check_plan(plan)[0] == []
    cut(folder / SHARDS[1])
    assert_listed(check_plan(plan)[0], [(folder / SHARDS[1], "damaged or cut off")])
    (folder / SHARDS[1]).unlink()  # it is still to be downloaded
    problems, notes = check_plan(plan)
    assert problems == []
    assert notes[0].startswith("the weights of someone/tiny are not here, or not all of them")
    assert_listed(check_plan(plan, "someone/else")[0], [("someone/else", "not a folder, and not to be had")])


def test_where_the_gpu_part_is_held():
    plan = make_plan(demo_shape(), [[0] * 8] * 6)
    assert device_note(plan, on_gpu=True) is None
    assert device_note(plan, on_gpu=False) == f"no CUDA device here: {GPU_PART_IN_RAM}"
    elsewhere = plan.model_copy(update={"device": "host"})
    assert device_note(elsewhere, on_gpu=False) == f"the plan is for a machine without CUDA: {GPU_PART_IN_RAM}"
    none = plan.model_copy(update={"gpu_memory_bytes": plan.gpu_memory_bytes.model_copy(update={"total": 0})})
    assert device_note(none, on_gpu=False) is None


def test_a_plan_that_breaks_rules_cannot_be_made():
    """Rules hold for plans that are no files, too."""
    plan = make_plan(demo_shape(), [[0] * 8] * 6)
    with pytest.raises(ValueError, match=r"stream_share\[1\]: 4.0 is not between 0 and 1"):
        Plan(**{**dict(plan), "stream_share": {1: 4.0}})
