"""The plan file: what is written is what is read, and what cannot be executed does not load."""

import random

import pytest
import yaml
from conftest import demo_shape, make_plan, random_plan, set_key

from fiddler_run.errors import FiddlerError
from fiddler_run.files import require_writable, write_whole
from fiddler_run.plan import Plan


@pytest.fixture
def plan() -> Plan:
    return random_plan(demo_shape(), random.Random(1))


def test_round_trip():
    rng = random.Random(0)
    for _ in range(20):
        plan = random_plan(demo_shape(rng.choice(["float32", "bfloat16"])), rng)
        assert Plan.parse(plan.dump(), "here") == plan


def test_one_layer_per_line(plan):
    lines = plan.dump().splitlines()
    for layer, row in plan.resident_blocks.items():
        assert f"  {layer}: {row}" in lines


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
        ("cpu_threads", ..., "cpu_threads: missing"),
        ("cpu_threads", "four", "cpu_threads: Input should be a valid integer"),
        ("cpu_threads", 0, "cpu_threads: Input should be greater than 0"),
        ("cpu_threads", True, "cpu_threads: Input should be a valid integer"),
        ("version", 1, "version: this release reads version 2, the file says 1"),
        ("version", ..., "version: this release reads version 2, the file says None"),
        ("model.dtype", "int4", "model.dtype: "),
        ("predicted.ttft_s", float("nan"), "predicted.ttft_s: Input should be a finite number"),
        ("resident_blocks.3.1", 20, r"resident_blocks\[3\]\[1\]: 20 is more than the 8 blocks of an expert"),
        ("resident_blocks.3.1", -1, r"resident_blocks\[3\]\[1\]: Input should be greater than or equal to 0"),
        ("resident_blocks.3", [0, 0], r"resident_blocks\[3\]: 2 numbers for 8 experts"),
        ("resident_blocks.3", ..., "resident_blocks: needs exactly the layers 0 to 5"),
        ("stream_share.1", 1.5, r"stream_share\[1\]: 1.5 is not between 0 and 1"),
        ("stream_share.1", ..., "stream_share: needs an entry for 1 token"),
        ("gpu_memory_bytes.experts", 1, "gpu_memory_bytes.experts: 1, but resident_blocks hold"),
        ("host_memory_bytes.experts", 1, "host_memory_bytes.experts: 1, but the absent blocks hold"),
        ("gpu_memory_bytes.total", 5, "gpu_memory_bytes.total: 5 is less than the sum of its parts"),
        ("gpu_memory_bytes.staging", 0, "gpu_memory_bytes.staging: 0 cannot hold one block"),
        ("workload.max_seq_len", 70, "workload.max_seq_len: 70 is less than 16 prompt"),
    ],
)
def test_names_the_key(plan, path, value, message):
    with pytest.raises(FiddlerError, match=f"^here: {message}"):
        Plan.parse(change(plan, path, value), "here")


def test_duplicate_key(plan):
    with pytest.raises(FiddlerError, match="here: not valid YAML: key 'cpu_threads' is given twice"):
        Plan.parse(plan.dump() + "cpu_threads: 3\n", "here")


@pytest.mark.parametrize("text", ["", "- 1", "just words", "a: [1", "? [1, 2]\n: 3", "a: 2026-13-45"])
def test_not_a_plan(text):
    with pytest.raises(FiddlerError, match="^here: "):
        Plan.parse(text, "here")


def test_missing_file(tmp_path):
    with pytest.raises(FiddlerError, match=r"none.yaml: cannot read: No such file"):
        Plan.load(tmp_path / "none.yaml")


def test_the_stream_share_follows_the_token_count():
    plan = make_plan(demo_shape(), [[0] * 8] * 6, share={1: 0.25, 9: 0.5, 33: 1.0})
    shares = {tokens: plan.stream_share_at(tokens) for tokens in (1, 5, 9, 21, 33, 500)}
    assert shares == {1: 0.25, 5: 0.375, 9: 0.5, 21: 0.75, 33: 1.0, 500: 1.0}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "plan.yaml"
    write_whole(target, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FiddlerError, match="No space left on device"):
        write_whole(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_unwritable_places(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "plan.yaml", "/dev/null"):
        for write in (require_writable, lambda path: write_whole(path, "text")):
            with pytest.raises(FiddlerError, match="cannot write"):
                write(place)


def test_looking_whether_a_place_is_writable_leaves_nothing(tmp_path):
    require_writable(tmp_path / "new" / "folder" / "plan.yaml")
    assert list(tmp_path.iterdir()) == []


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
