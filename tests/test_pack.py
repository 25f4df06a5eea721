"""`fiddler-opt pack`: the packed checkpoint holds the same weights, and runs like the original."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from command_line import assert_refused, files_in, run
from conftest import DEMO, demo_shape, random_plan
from damage import change_config, change_experts, write_plan
from models import open_checkpoint

from fiddler_run import load_model
from fiddler_run.encodings.lossless12 import Lossless12
from fiddler_run.errors import FiddlerError
from fiddler_run.weights import packing
from fiddler_run.weights.tensor_files import INDEX

if not Lossless12.available():
    pytest.skip("needs a C++ compiler", allow_module_level=True)

FORMAT = Lossless12(hidden_size=128, block_neurons=64)


def packed(source: Path, folder: Path, *words: str) -> Path:
    """The folder of `source`, packed. stderr contains `words`."""
    result = run("fiddler-opt", "pack", source, "-o", "packed", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "packed\n"
    for word in words:
        assert word in result.stderr
    return folder / "packed"


@pytest.fixture(scope="module")
def demo_packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    return packed(DEMO, folder, "48 experts: 9.44 MB -> 7.39 MB; all were read back")


def names(folder: Path) -> list[str]:
    """The tensors that the index names."""
    return list(json.loads((folder / INDEX).read_text())["weight_map"])


def assert_same_weights(folder: Path, original: Path) -> None:
    found, expected = map(open_checkpoint, (folder, original))
    for layer in range(6):
        for expert in range(8):
            pairs = zip(found.expert(layer, expert), expected.expert(layer, expert), strict=True)
            assert all(
                torch.equal(one.view(torch.int16), two.view(torch.int16)) for one, two in pairs
            )
    dense = [name for name in names(original) if ".experts." not in name]
    assert all(torch.equal(found.read(name), expected.read(name)) for name in dense)


def test_packed_weights_are_the_original_ones(demo_packed):
    assert_same_weights(demo_packed, DEMO)
    assert len(names(demo_packed)) == len(names(DEMO)) - 2 * 48
    files = files_in(demo_packed)
    assert not [name for name in files if "partial" in name]
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert files.get(name) == (files_in(DEMO).get(name))


def test_stored_blocks_are_those_of_the_encoding(demo_packed):
    weights = open_checkpoint(demo_packed)
    blocks = torch.empty((4, FORMAT.block_bytes), dtype=torch.uint8)
    assert FORMAT.encode(blocks, *weights.expert(2, 3), first_neuron=0) == []
    assert torch.equal(weights.blocks(2, 3, FORMAT), blocks)
    assert weights.blocks(2, 3, Lossless12(128, 128)) is None
    assert open_checkpoint(DEMO).blocks(2, 3, FORMAT) is None


@pytest.mark.parametrize("encoding", ["lossless12", "bf16"])
@pytest.mark.parametrize("neurons", [64, 128])
def test_plans_run_from_a_packed_checkpoint(demo_packed, encoding, neurons, device):
    """Whatever their encoding and blocks."""
    plan = random_plan(demo_shape("bfloat16"), random.Random(1), neurons, encoding=encoding)

    def logits(folder: Path) -> torch.Tensor:
        model, tokenizer = load_model(plan, folder)
        inputs = tokenizer("One bright morning", return_tensors="pt").to(device)
        with torch.no_grad():
            return model(**inputs).logits

    assert torch.equal(logits(demo_packed), logits(DEMO))


def test_a_packed_checkpoint_can_be_planned_checked_and_packed(demo_packed, tmp_path):
    flags = ("--machine", "profiles/two-cores.machine.yaml", "--gpu-mem", "0GB", "-o", "p.yaml")
    result = run("fiddler-opt", "plan", "--model", demo_packed, *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    checked = run("fiddler-run", "--plan", "p.yaml", "--dry-run", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert_same_weights(packed(demo_packed, tmp_path), DEMO)


def test_experts_with_unusual_weights_are_stored_unchanged(model, tmp_path):
    torch.manual_seed(0)

    def change(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        if ".layers.1." in name and ".experts.5.w3." in name:
            scale = 10.0 ** torch.empty_like(tensor, dtype=torch.float32).uniform_(-30, 30)
            tensor = (tensor * scale).bfloat16()
        return name, tensor

    change_experts(model, change)
    folder = packed(model, tmp_path, "note: 1 of them have too many unusual weights")
    of_layer = [name for name in names(folder) if name.startswith("layers.1.")]
    assert sum(".experts.5." in name for name in of_layer) == 3
    assert sum(".experts.4." in name for name in of_layer) == 1
    assert_same_weights(folder, model)
    plan = random_plan(demo_shape("bfloat16"), random.Random(1), 64, encoding="lossless12")
    load_model(plan, folder)


def test_damaged_blocks_are_refused(demo_packed, tmp_path):
    folder = shutil.copytree(demo_packed, tmp_path / "model")
    file = folder / "experts-00004.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    plan = random_plan(demo_shape("bfloat16"), random.Random(1), 64, encoding="lossless12")
    with pytest.raises(
        FiddlerError, match=r"experts-00004.safetensors: tensor .*lossless12 is damaged"
    ):
        load_model(plan, folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"lossless12"', '"lossless99"', "the metadata name no known encoding"),
        ('"block_neurons":"64"', '"block_neurons":"65"', "encoding lossless12: 65 is not a mult"),
        ('"block_neurons":"64"', '"block_neurons":"0" ', "the metadata name no valid sizes"),
        ('"hidden_size":"128"', '"hidden_size":"192"', "stored unlike the files next to it"),
    ],
)
def test_damaged_metadata_are_refused(demo_packed, tmp_path, old, new, message):
    folder = shutil.copytree(demo_packed, tmp_path / "model")
    file = folder / "experts-00004.safetensors"
    content = file.read_bytes()
    assert old.encode() in content
    file.write_bytes(content.replace(old.encode(), new.encode(), 1))
    result = run("fiddler-run", "--plan", write_plan(tmp_path), "--dry-run", cwd=tmp_path)
    assert result.returncode == 1
    assert f"{file}: {message}" in result.stdout


@pytest.mark.parametrize("size", [192, 320])
def test_a_config_of_other_experts_is_refused(demo_packed, tmp_path, size):
    folder = shutil.copytree(demo_packed, tmp_path / "model")
    change_config(folder, intermediate_size=size)
    plan = write_plan(tmp_path, model__intermediate_size=size)
    result = run("fiddler-run", "--plan", plan, "--dry-run", cwd=tmp_path)
    assert result.returncode == 1
    implied = f"but config.json implies 128 x {size} in bfloat16"
    assert f"{folder}: the packed experts are 128 x 256 in bfloat16, {implied}" in result.stdout


def test_tensors_that_no_layer_reads_are_left_out(model, tmp_path):
    """Whatever their dtype: transformers once stored masks and positions."""
    from safetensors.torch import load_file, save_file

    index = json.loads((model / INDEX).read_text())
    file = index["weight_map"]["lm_head.weight"]
    more = {"model.position_ids": torch.arange(9), "model.layers.6.bias": torch.tensor(1.0)}
    save_file(load_file(model / file) | more, model / file, {"format": "pt"})
    index["weight_map"] |= dict.fromkeys([*more, "model.gone"], file)
    (model / INDEX).write_text(json.dumps(index))
    folder = packed(model, tmp_path)
    assert set(names(folder)).isdisjoint({*more, "model.gone"})
    load_model(random_plan(demo_shape("bfloat16"), random.Random(1), 64), folder)


def test_files_can_be_read_like_others(demo_packed):
    modes = {path.stat().st_mode for path in demo_packed.iterdir()}
    assert len(modes) == 1


def test_nothing_is_overwritten(demo_packed, tmp_path, model):
    before = files_in(demo_packed)
    result = run("fiddler-opt", "pack", DEMO, "-o", demo_packed, cwd=tmp_path)
    assert_refused(result, f"{demo_packed}: not empty; name a new folder with -o")
    assert files_in(demo_packed) == before
    (tmp_path / "mine").write_text("mine")
    for name, reason in (("mine", "mine: a file"), ("", ".: not empty"), ("a\0b", "cannot write")):
        assert_refused(run("fiddler-opt", "pack", DEMO, "-o", name, cwd=tmp_path), reason)
    assert (tmp_path / "mine").read_text() == "mine"
    change_config(model, torch_dtype="float16", dtype="float16")
    result = run("fiddler-opt", "pack", model, "-o", "p", cwd=tmp_path)
    assert_refused(result, "lossless12 cannot store the float16 weights")
    assert not (tmp_path / "p").exists()


def test_a_full_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2, 1, 1))
    result = run("fiddler-opt", "pack", DEMO, "-o", "p", cwd=tmp_path)
    assert_refused(result, "p: 0.01 GB are needed, but 0.00 GB are free")
    (tmp_path / "mine").mkdir()
    result = run("fiddler-opt", "pack", DEMO, "-o", "mine/a/b", cwd=tmp_path)
    assert result.returncode == 1
    assert [*tmp_path.rglob("*")] == [tmp_path / "mine"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, FiddlerError])
def test_an_interrupted_pack_leaves_no_checkpoint(tmp_path, monkeypatch, error):
    """And can be repeated."""
    settle = packing._settle

    def interrupted(path: Path) -> None:
        settle(path)
        if "00003" in path.name:
            raise error("stop")

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_settle", interrupted)
        result = run("fiddler-opt", "pack", DEMO, "-o", "packed", cwd=tmp_path)
    assert result.returncode == (130 if error is KeyboardInterrupt else 1)
    assert not (tmp_path / "packed").exists()
    assert_same_weights(packed(DEMO, tmp_path), DEMO)


def test_a_wrong_byte_on_disk_is_found(tmp_path, monkeypatch):
    save = packing.save_file

    def wrong(tensors: dict, path: Path, metadata: dict) -> None:
        save(tensors, path, metadata)
        content = bytearray(path.read_bytes())
        content[-1000] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(packing, "save_file", wrong)
    result = run("fiddler-opt", "pack", DEMO, "-o", "p", cwd=tmp_path)
    assert result.returncode == 1
    assert "differs from the original after writing" in result.stderr
    assert files_in(tmp_path) == {}
