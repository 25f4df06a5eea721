"""Plan files: round trips, writing, and refusal of plans that cannot be executed."""

import random

import pytest
import yaml
from conftest import demo_shape, make_plan, random_plan, set_key
from planning import machine_profile, small_model

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan
from fiddler_run.system.files import require_writable, write_whole


@pytest.fixture
def plan() -> Plan:
    return random_plan(demo_shape(), random.Random(1))


def test_plan_round_trips():
    rng = random.Random(0)
    for _ in range(20):
        plan = random_plan(demo_shape(rng.choice(["float32", "bfloat16"])), rng)
        assert Plan.parse(plan.dump(), "here") == plan


def test_plan_file_has_one_layer_per_line(plan):
    lines = plan.dump().splitlines()
    for layer, row in plan.rank.resident_blocks.items():
        assert f"    {layer}: {row}" in lines


def change(plan: Plan, path: str, value) -> str:
    """The plan's text with one key set (or, for the value `...`, removed)."""
    data = yaml.safe_load(plan.dump())
    set_key(data, path.split("."), value)
    return yaml.safe_dump(data)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("colour", "red", "colour: unknown key"),
        ("workload.colour", "red", "workload.colour: unknown key"),
        ("ranks.0.cpu_threads", ..., r"ranks\[0\].cpu_threads: missing"),
        ("ranks.0.cpu_threads", "four", r"ranks\[0\].cpu_threads: Input should be a valid integer"),
        ("ranks.0.cpu_threads", 0, r"ranks\[0\].cpu_threads: Input should be greater than 0"),
        ("ranks.0.cpu_threads", True, r"ranks\[0\].cpu_threads: Input should be a valid integer"),
        ("version", 1, "version: this release reads version 3, but the file says 1"),
        ("version", ..., "version: this release reads version 3, but the file says None"),
        ("encoding", "int4", "encoding: int4 is unknown; known are bf16"),
        ("encoding", "bf16", "encoding: bf16 stores bfloat16, the model is float32"),
        ("budget.gpu_bytes", -1, "budget.gpu_bytes: Input should be greater than or equal to 0"),
        ("ranks", [], "ranks: List should have at least 1 item"),
        ("model.dtype", "int4", "model.dtype: "),
        ("predicted.ttft_s", float("nan"), "predicted.ttft_s: Input should be a finite number"),
        (
            "ranks.0.resident_blocks.3.1",
            20,
            r"ranks\[0\].resident_blocks\[3\]\[1\]: 20 is more than the 8 blocks of an expert",
        ),
        (
            "ranks.0.resident_blocks.3.1",
            -1,
            r"ranks\[0\].resident_blocks\[3\]\[1\]: Input should be greater than or equal to 0",
        ),
        (
            "ranks.0.resident_blocks.3",
            [0, 0],
            r"ranks\[0\].resident_blocks\[3\]: 2 numbers for 8 experts",
        ),
        (
            "ranks.0.resident_blocks.3",
            ...,
            r"ranks\[0\].resident_blocks: needs exactly the layers 0 to 5",
        ),
        (
            "ranks.0.stream_share.1",
            1.5,
            r"ranks\[0\].stream_share\[1\]: 1.5 is not between 0 and 1",
        ),
        ("ranks.0.stream_share.1", ..., r"ranks\[0\].stream_share: needs an entry for 1 token"),
        (
            "ranks.0.gpu_memory_bytes.experts",
            1,
            r"ranks\[0\].gpu_memory_bytes.experts: 1, but resident_blocks hold",
        ),
        (
            "ranks.0.host_memory_bytes.experts",
            1,
            r"ranks\[0\].host_memory_bytes.experts: 1, but the host blocks hold",
        ),
        (
            "ranks.0.gpu_memory_bytes.total",
            5,
            r"ranks\[0\].gpu_memory_bytes.total: 5 is less than the sum of its parts",
        ),
        (
            "ranks.0.gpu_memory_bytes.staging",
            0,
            r"ranks\[0\].gpu_memory_bytes.staging: 0 cannot hold one block",
        ),
        ("workload.max_seq_len", 70, "workload.max_seq_len: 70 is less than 16 prompt"),
    ],
)
def test_errors_name_the_key(plan, path, value, message):
    with pytest.raises(FiddlerError, match=f"^here: {message}"):
        Plan.parse(change(plan, path, value), "here")


def test_duplicate_key_is_refused(plan):
    with pytest.raises(FiddlerError, match="here: not valid YAML: key 'encoding' is given twice"):
        Plan.parse(plan.dump() + "encoding: bf16\n", "here")


def test_errors_of_version_2_files_name_the_command_that_remakes_them(plan):
    """Plans had their rank's keys at the top level, and machine profiles had other key names."""
    old_plan = plan.model_dump(exclude={"ranks", "encoding", "budget"}) | plan.rank.model_dump()
    machine = machine_profile(small_model()).model_dump(exclude={"kernels"})
    old_machine = {
        **{key: value for key, value in machine.items() if key != "host_expert_us"},
        "absent_expert_us": machine["host_expert_us"],
    }
    for kind, content, version, command in (
        (Plan, old_plan, 3, "fiddler-opt plan"),
        (MachineProfile, old_machine, 5, "fiddler-opt profile --only machine"),
    ):
        text = yaml.safe_dump({**content, "version": 2})
        with pytest.raises(FiddlerError) as caught:
            kind.parse(text, "old.yaml")
        assert str(caught.value).startswith(
            f"old.yaml: version: this release reads version {version}, but the file says 2; "
        )
        assert str(caught.value).endswith(f"with `{command}`")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "- 1", "just words", "a: [1", "? [1, 2]\n: 3", "a: 2026-13-45"]
)
def test_other_text_is_refused(text):
    with pytest.raises(FiddlerError, match="^here: "):
        Plan.parse(text, "here")


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(FiddlerError, match="none.yaml: no such file; make it with `fiddler-opt"):
        Plan.load(tmp_path / "none.yaml")


def test_stream_share_is_interpolated_by_token_count():
    plan = make_plan(demo_shape(), [[0] * 8] * 6, share={1: 0.25, 9: 0.5, 33: 1.0})
    shares = {tokens: plan.rank.stream_share_at(tokens) for tokens in (1, 5, 9, 21, 33, 500)}
    assert shares == {1: 0.25, 5: 0.375, 9: 0.5, 21: 0.75, 33: 1.0, 500: 1.0}


def test_unwritable_paths_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "plan.yaml", "/dev/null"):
        for write in (require_writable, lambda path: write_whole(path, "text")):
            with pytest.raises(FiddlerError, match="cannot write"):
                write(place)


def test_require_writable_leaves_nothing_behind(tmp_path):
    require_writable(tmp_path / "new" / "folder" / "plan.yaml")
    assert list(tmp_path.iterdir()) == []


def test_symlink_stays_a_symlink(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
