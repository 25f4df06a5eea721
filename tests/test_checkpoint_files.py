"""Checkpoint folders as users have them: extra files, missing keys, unusual names."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DEMO, demo_shape, make_plan
from damage import SHARDS, change_tensors, replace_weights, simulate_2_gb, write_plan
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from fiddler_opt.inputs.model import ModelSpec
from fiddler_run import load_model
from fiddler_run.errors import FiddlerError
from fiddler_run.generation.answer import generate
from fiddler_run.generation.sampling import Options
from fiddler_run.loading.check import check_plan
from fiddler_run.plan.shape import ModelShape


def generated(folder: Path, count: int = 12, dtype: str = "bfloat16", **options: object) -> str:
    """Writes a plan into `folder`; returns the answer of the model next to it."""
    loaded, tokenizer = load_model(write_plan(folder, dtype=dtype))
    pieces: list[str] = []
    generate(loaded, tokenizer, "Once upon a time", Options(count, **options), pieces.append)
    return "".join(pieces)


def test_nan_weights_are_refused_at_the_first_token(tmp_path, model):
    """In greedy decoding and in sampling."""
    change_tensors(
        model, lambda name, t: (name, t * float("nan") if name == "model.norm.weight" else t)
    )
    assert check_plan(write_plan(tmp_path))[0] == []
    for options in ({}, {"temperature": 1.0}):
        with pytest.raises(FiddlerError, match="the model's logits are NaN; check its weights"):
            generated(tmp_path, **options)


def test_missing_folder_for_disk_blocks_is_refused(tmp_path):
    plan = make_plan(demo_shape("bfloat16"), [[0] * 8] * 6, on_disk=[[1] * 8] * 6)
    with pytest.raises(FiddlerError, match="none: no such folder for the experts on disk"):
        load_model(plan, DEMO, disk_folder=tmp_path / "none")


def test_weights_outside_the_index_are_not_read(tmp_path, model):
    expected = generated(tmp_path)
    names = {name: tensor for shard in SHARDS for name, tensor in load_file(model / shard).items()}
    noise = {name: torch.randn_like(tensor) * 0.02 for name, tensor in names.items()}
    save_file(noise, model / "model.safetensors", metadata={"format": "pt"})
    problems, notes = check_plan(write_plan(tmp_path))
    assert problems == []
    assert any(
        "model.safetensors: not read, because model.safetensors.index.json names other files"
        in note
        for note in notes
    )
    assert generated(tmp_path) == expected


def test_dense_weights_match_transformers(random_checkpoint):
    """With tied embeddings and with an explicit head_dim, too."""
    for overrides in ({}, {"tie_word_embeddings": True}, {"head_dim": 16}):
        folder, shape = random_checkpoint(**overrides)
        loaded, _ = load_model(make_plan(shape, [[0] * 8] * 2), folder)
        stock = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        ours = loaded.state_dict()
        assert set(ours) == {name for name in stock if ".experts." not in name}
        assert all(torch.equal(tensor.cpu(), stock[name]) for name, tensor in ours.items())
        assert torch.equal(
            loaded.model.rotary_emb.inv_freq.cpu(),
            MixtralForCausalLM(loaded.config).model.rotary_emb.inv_freq,
        )


def test_dtype_defaults_to_that_of_the_weights(tmp_path, model):
    config = json.loads((model / "config.json").read_text())
    del config["dtype"]
    (model / "config.json").write_text(json.dumps(config))
    spec = ModelSpec.load(str(model))
    assert (spec.shape.dtype, spec.note) == ("bfloat16", None)  # as the weights
    replace_weights(model)
    spec = ModelSpec.load(str(model))
    assert spec.shape.dtype == "bfloat16"
    assert spec.note.endswith("config.json names no dtype: bfloat16 is assumed")


def test_absent_keys_are_read_as_transformers_reads_them(model):
    config = json.loads((model / "config.json").read_text())
    config.update(num_attention_heads=16, num_key_value_heads=4)
    per_token = ModelSpec.from_config(config, "m", "here").sizes.kv_bytes_per_token
    with pytest.raises(FiddlerError, match="'num_key_value_heads' expected int, got NoneType"):
        ModelSpec.from_config({**config, "num_key_value_heads": None}, "m", "here")
    del config["num_key_value_heads"], config["max_position_embeddings"]
    spec = ModelSpec.from_config(config, "m", "here")
    assert MixtralConfig(**config).num_key_value_heads == 8
    assert spec.sizes.kv_bytes_per_token == per_token * 2
    assert spec.max_position_embeddings == MixtralConfig().max_position_embeddings


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mixtral.Q4_K_M.gguf", "a GGUF file; --model takes a checkpoint folder"),
        ("weights.bin", "a file; --model takes a checkpoint folder"),
        ("x" * 300, "cannot read: File name too long"),
        ("a\0b", "cannot read: "),
    ],
)
def test_model_paths_that_are_no_folder_are_refused(tmp_path, name, words):
    if len(name) < 100 and "\0" not in name:
        (tmp_path / name).write_bytes(b"GGUF")
    problems, _ = check_plan(write_plan(tmp_path), str(tmp_path / name))
    assert len(problems) == 1
    assert words in problems[0]


def test_folder_name_that_is_not_utf8_is_refused(tmp_path):
    folder = shutil.copytree(DEMO, tmp_path / "caf\udce9")
    problems, _ = check_plan(write_plan(tmp_path), str(folder))
    assert len(problems) == 1
    assert problems[0].endswith(
        "the folder's name is not UTF-8, so transformers cannot read it; rename it"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"workload__max_seq_len": 10**9},
        {"workload__num_beams": 10**9},
        {"workload__batch_size": 10**6, "workload__max_seq_len": 10**6},
        {
            "ranks__0__gpu_memory_bytes__staging": 10**15,
            "ranks__0__gpu_memory_bytes__total": 2 * 10**15,
        },
    ],
    ids=str,
)
def test_plans_that_no_memory_holds_are_refused(tmp_path, model, change, monkeypatch):
    """A plan edited by hand may ask for a context, beams or a staging ring of any size."""
    simulate_2_gb(tmp_path, monkeypatch)
    path = write_plan(tmp_path, **change)
    problems, _ = check_plan(path)
    assert len(problems) == 1
    with pytest.raises(FiddlerError) as refusal:
        load_model(path)
    assert str(refusal.value) == problems[0]


def test_absurd_shape_is_refused():
    """A list of a billion rows would take all memory."""
    with pytest.raises(ValueError, match="num_layers"):
        ModelShape(**{**demo_shape().model_dump(), "num_layers": 10**9})
