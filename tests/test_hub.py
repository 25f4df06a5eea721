"""Models of the Hugging Face hub, from its client's cache: nothing is fetched here."""

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
    """A cache that holds the demo under the id someone/tiny, with links as the hub's client makes
    them; the snapshot's folder.

    `unfetched`: names of files that the model has on the hub, of which the client knows, but which
    it has not fetched.
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


def test_a_model_of_the_hub_is_checked_and_loaded_without_what_it_does_not_need(
    tmp_path, monkeypatch
):
    folder = hub_cache(tmp_path, monkeypatch, unfetched=UNFETCHED)
    plan = write_plan(tmp_path, "someone/tiny")
    problems, notes = check_plan(plan)
    assert problems == []
    assert not any("not here" in note for note in notes)
    assert load_model(plan)[1] is not None
    (folder / SHARDS[1]).resolve().write_bytes(b"x")
    problems, _ = check_plan(plan)
    assert len(problems) == 1
    assert "damaged or cut off" in problems[0]
    with pytest.raises(FiddlerError) as refusal:
        load_model(plan)
    assert str(refusal.value) == problems[0]


def test_a_model_of_the_hub_that_is_not_all_here(tmp_path, monkeypatch):
    hub_cache(tmp_path, monkeypatch, leave_out=(SHARDS[2],), unfetched=(SHARDS[2],))
    plan = write_plan(tmp_path, "someone/tiny")
    problems, notes = check_plan(plan)
    assert problems == []
    assert notes[0].startswith("the weights of someone/tiny are not here, or not all of them")
    with pytest.raises(
        FiddlerError,
        match="someone/tiny: not a folder, and not to be had from the Hugging Face hub",
    ):
        load_model(plan)


def test_weights_of_a_hugging_face_model_are_checked_if_they_are_all_here(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cache = tmp_path / "models--someone--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    folder = shutil.copytree(DEMO, cache / "snapshots" / ("0" * 40))
    plan = write_plan(tmp_path, "someone/tiny")
    assert check_plan(plan)[0] == []
    cut(folder / SHARDS[1])
    assert_listed(check_plan(plan)[0], [(folder / SHARDS[1], "damaged or cut off")])
    (folder / SHARDS[1]).unlink()  # it is still to be downloaded
    problems, notes = check_plan(plan)
    assert problems == []
    assert notes[0].startswith("the weights of someone/tiny are not here, or not all of them")
    assert_listed(
        check_plan(plan, "someone/else")[0], [("someone/else", "not a folder, and not to be had")]
    )
