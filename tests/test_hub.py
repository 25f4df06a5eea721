"""Models in the cache of the Hugging Face hub's client; nothing is downloaded."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from conftest import DEMO
from damage import SHARDS, assert_listed, cut, write_plan

from fiddler_run import load_model
from fiddler_run.errors import FiddlerError
from fiddler_run.loading.check import check_plan


def hub_cache(
    root: Path, monkeypatch, leave_out: tuple[str, ...] = (), unfetched: tuple[str, ...] = ()
) -> Path:
    """Makes a cache with the demo as someone/tiny; returns the snapshot's folder.

    Files are links, as the hub's client makes them. `unfetched`: names of files that the client
    has listed but not downloaded.
    """
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "0" * 40
    cache = root / "models--someone--tiny"
    snapshot = cache / "snapshots" / commit
    for folder in (cache / "refs", cache / "blobs", cache / "trees", snapshot):
        folder.mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    sizes = {}
    for path in DEMO.iterdir():
        if path.is_file() and path.name not in leave_out and path.suffix != ".py":
            blob = cache / "blobs" / f"blob-{path.name}"
            shutil.copy(path, blob)
            (snapshot / path.name).symlink_to(blob)
            sizes[path.name] = path.stat().st_size
    files = {
        name: {"size": size, "blob_id": f"blob-{name}"}
        for name, size in {**sizes, **dict.fromkeys(unfetched, 9)}.items()
    }
    (cache / "trees" / f"{commit}.json").write_text(
        json.dumps({"format_version": 1, "files": files})
    )
    return snapshot


UNFETCHED = (".gitattributes", "NOTES.md", "consolidated.safetensors", "params.json")


def test_hub_model_loads_without_files_that_it_does_not_need(tmp_path, monkeypatch):
    folder = hub_cache(tmp_path, monkeypatch, unfetched=UNFETCHED)
    plan = write_plan(tmp_path, "someone/tiny")
    problems, notes = check_plan(plan)
    assert problems == []
    assert not any("missing or incomplete" in note for note in notes)
    assert load_model(plan)[1] is not None
    (folder / SHARDS[1]).resolve().write_bytes(b"x")
    problems, _ = check_plan(plan)
    assert len(problems) == 1
    assert "damaged or truncated" in problems[0]
    with pytest.raises(FiddlerError) as refusal:
        load_model(plan)
    assert str(refusal.value) == problems[0]


def test_incomplete_hub_model_is_noted_and_not_loaded(tmp_path, monkeypatch):
    hub_cache(tmp_path, monkeypatch, leave_out=(SHARDS[2],), unfetched=(SHARDS[2],))
    plan = write_plan(tmp_path, "someone/tiny")
    problems, notes = check_plan(plan)
    assert problems == []
    assert notes[0].startswith("the weights of someone/tiny are missing or incomplete")
    with pytest.raises(
        FiddlerError,
        match="someone/tiny: neither a folder nor available from the Hugging Face hub",
    ):
        load_model(plan)


def test_weights_of_a_hub_model_are_checked_if_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cache = tmp_path / "models--someone--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    folder = shutil.copytree(DEMO, cache / "snapshots" / ("0" * 40))
    plan = write_plan(tmp_path, "someone/tiny")
    assert check_plan(plan)[0] == []
    cut(folder / SHARDS[1])
    assert_listed(check_plan(plan)[0], [(folder / SHARDS[1], "damaged or truncated")])
    (folder / SHARDS[1]).unlink()  # not downloaded yet
    problems, notes = check_plan(plan)
    assert problems == []
    assert notes[0].startswith("the weights of someone/tiny are missing or incomplete")
    assert_listed(
        check_plan(plan, "someone/else")[0], [("someone/else", "neither a folder nor available")]
    )


def test_machine_is_checked_before_a_download(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    plan = write_plan(tmp_path, "someone/not-in-the-cache", ranks__0__cpu_threads=4096)
    with pytest.raises(FiddlerError, match="cpu_threads is 4096"):
        load_model(plan)
