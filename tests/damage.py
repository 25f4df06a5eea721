"""Damage to copies of the demo checkpoint, and plans next to them."""

import json
from collections.abc import Callable
from pathlib import Path

import yaml
from conftest import DEMO, demo_shape, make_plan, set_key

from fiddler_run.system import host

SHARDS = sorted(path.name for path in DEMO.glob("*.safetensors"))
INDEX = "model.safetensors.index.json"


def write_plan(
    folder: Path, name: str = "./model", dtype: str = "bfloat16", **changes: object
) -> Path:
    """Writes a plan for the model `name`, with 4 of each expert's 8 blocks resident.

    `a__b=1` sets key b in a.
    """
    data = yaml.safe_load(make_plan(demo_shape(dtype), [[4] * 8] * 6).dump())
    data["model"]["name"] = name
    for path, value in changes.items():
        set_key(data, path.split("__"), value)
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_config(model: Path, **values: object) -> None:
    change_json(model / "config.json", **values)


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:1000])


def change_tensors(model: Path, change: Callable) -> None:
    """Replaces each tensor by `change(name, tensor)`: a name and a tensor, or None to remove it."""
    from safetensors.torch import load_file, save_file

    weight_map = {}
    for shard in SHARDS:
        changed = [change(name, tensor) for name, tensor in load_file(model / shard).items()]
        tensors = {name: tensor.contiguous() for name, tensor in filter(None, changed)}
        save_file(tensors, model / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def change_experts(model: Path, change: Callable) -> None:
    """Like `change_tensors`, for the tensors of experts only."""
    change_tensors(model, lambda name, t: change(name, t) if ".experts." in name else (name, t))


def replace_weights(model: Path, *names: str) -> None:
    """Replaces all weight files by files of these names."""
    for path in model.glob("model*"):
        path.unlink()
    for name in names:
        (model / name).write_bytes(b"weights")


def simulate_2_gb(folder: Path, monkeypatch) -> Path:
    """Simulates a machine with 2 GB of free memory; returns the root of its system files.

    Its cores are those of this machine.
    """
    root = folder / "root"
    (root / "proc").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemAvailable: 1953125 kB\n")
    monkeypatch.setattr(host, "ROOT", root)
    return root


def assert_listed(found: list[str], expected: list[tuple[Path, str]]) -> None:
    """Asserts that the lines, in order, begin with these files and contain these words."""
    assert len(found) == len(expected), "\n".join(found)
    for line, (file, words) in zip(found, expected, strict=True):
        assert line.startswith(f"{file}: ")
        assert words in line
        assert "\n" not in line
