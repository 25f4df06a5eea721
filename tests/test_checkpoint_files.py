"""Folders as users have them: what they hold besides, what they lack, what they are called."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DEMO, demo_shape, make_plan
from damage import SHARDS, change_tensors, few_gigabytes, only, write_plan
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from fiddler_opt.inputs.model import ModelSpec
from fiddler_run import load_model
from fiddler_run.errors import FiddlerError
from fiddler_run.generation.generate import generate
from fiddler_run.generation.sampling import Options
from fiddler_run.loading.check import check_plan
from fiddler_run.models.mixtral import DEFAULTS
from fiddler_run.plan.shape import ModelShape


def texts(folder: Path, count: int = 12, dtype: str = "bfloat16", **options: object) -> str:
    """The answer of the model beside a new plan in `folder`."""
    loaded, tokenizer = load_model(write_plan(folder, dtype=dtype))
    pieces: list[str] = []
    generate(loaded, tokenizer, "Once upon a time", Options(count, **options), pieces.append)
    return "".join(pieces)


def test_weights_that_are_no_numbers(tmp_path, model):
    """They are found by the first token, in greedy decoding, too."""
    change_tensors(
        model, lambda name, t: (name, t * float("nan") if name == "model.norm.weight" else t)
    )
    assert check_plan(write_plan(tmp_path))[0] == []
    for options in ({}, {"temperature": 1.0}):
        with pytest.raises(
            FiddlerError, match="the model's logits are no numbers; check its weights"
        ):
            texts(tmp_path, **options)


def test_a_folder_for_experts_on_disk_that_does_not_exist(tmp_path):
    plan = make_plan(demo_shape("bfloat16"), [[0] * 8] * 6, on_disk=[[1] * 8] * 6)
    with pytest.raises(
        FiddlerError, match="none: no such folder for the experts that are to lie on disk"
    ):
        load_model(plan, DEMO, disk_folder=tmp_path / "none")


def test_a_second_file_of_all_weights_is_not_read(tmp_path, model):
    expected = texts(tmp_path)
    names = {name: tensor for shard in SHARDS for name, tensor in load_file(model / shard).items()}
    noise = {name: torch.randn_like(tensor) * 0.02 for name, tensor in names.items()}
    save_file(noise, model / "model.safetensors", metadata={"format": "pt"})
    problems, notes = check_plan(write_plan(tmp_path))
    assert problems == []
    assert any(
        "model.safetensors: not read, since model.safetensors.index.json names other files" in note
        for note in notes
    )
    assert texts(tmp_path) == expected


def test_all_weights_are_those_of_the_files(random_checkpoint):
    """Tied or not, in another dtype or not: what transformers loads."""
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


def test_a_config_without_a_dtype(tmp_path, model):
    config = json.loads((model / "config.json").read_text())
    del config["dtype"]
    (model / "config.json").write_text(json.dumps(config))
    spec = ModelSpec.load(str(model))
    assert (spec.shape.dtype, spec.note) == ("bfloat16", None)  # that of the weights beside it
    only(model)
    spec = ModelSpec.load(str(model))
    assert spec.shape.dtype == "bfloat16"
    assert spec.note.endswith("config.json names no dtype: bfloat16 is assumed")


def test_defaults_are_those_of_transformers(model):
    stock = MixtralConfig()
    assert {key: getattr(stock, key) for key in DEFAULTS} == DEFAULTS
    config = json.loads((model / "config.json").read_text())
    config.update(num_attention_heads=16)
    nothing = {**config, "num_key_value_heads": None}  # transformers refuses it as well
    with pytest.raises(FiddlerError, match="key 'num_key_value_heads' is None"):
        ModelSpec.from_config(nothing, "m", "here")
    del config["num_key_value_heads"], config["max_position_embeddings"]
    spec = ModelSpec.from_config(config, "m", "here")
    assert spec.sizes.num_key_value_heads == stock.num_key_value_heads
    assert spec.max_position_embeddings == stock.max_position_embeddings


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mixtral.Q4_K_M.gguf", "a GGUF file; --model takes a checkpoint folder"),
        ("weights.bin", "a file; --model takes a checkpoint folder"),
        ("x" * 300, "cannot read: File name too long"),
        ("a\0b", "cannot read: "),
    ],
)
def test_names_that_are_no_folder(tmp_path, name, words):
    if len(name) < 100 and "\0" not in name:
        (tmp_path / name).write_bytes(b"GGUF")
    problems, _ = check_plan(write_plan(tmp_path), str(tmp_path / name))
    assert len(problems) == 1
    assert words in problems[0]


def test_a_folder_whose_name_is_no_text(tmp_path):
    folder = shutil.copytree(DEMO, tmp_path / "caf\udce9")
    problems, _ = check_plan(write_plan(tmp_path), str(folder))
    assert len(problems) == 1
    assert problems[0].endswith(
        "the folder's name is not UTF-8, so that transformers cannot read it; rename it"
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
def test_memory_that_a_plan_does_not_count(tmp_path, model, change, monkeypatch):
    """Edited by hand: a context, beams or a staging ring that no memory holds is found before
    loading.
    """
    few_gigabytes(tmp_path, monkeypatch)
    path = write_plan(tmp_path, **change)
    problems, _ = check_plan(path)
    assert len(problems) == 1
    with pytest.raises(FiddlerError) as refusal:
        load_model(path)
    assert str(refusal.value) == problems[0]


def test_no_shape_takes_all_memory():
    """A list of a billion rows would."""
    with pytest.raises(ValueError, match="num_layers"):
        ModelShape(**{**demo_shape().model_dump(), "num_layers": 10**9})
