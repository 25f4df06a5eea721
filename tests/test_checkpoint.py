"""Checkpoints are checked before loading; errors name the file or tensor."""

import json
import os
import shutil

import pytest
import torch
from conftest import DEMO, demo_shape, make_plan, with_rank
from safetensors.torch import load_file, save_file

from fiddler_run import load_model
from fiddler_run.errors import FiddlerError
from fiddler_run.loading.load import ModelLoader
from fiddler_run.plan.rank import HostMemory
from fiddler_run.weights.checkpoint import DummyWeights
from fiddler_run.weights.store import ExpertStore

SHARDS = sorted(path.name for path in DEMO.glob("*.safetensors"))


def plan(**overrides):
    shape = demo_shape("bfloat16").model_copy(update=overrides)
    return make_plan(shape, [[0] * shape.num_experts] * shape.num_layers)


def assert_refused(folder, message, plan=plan()):  # noqa: B008 - a plan is immutable
    with pytest.raises(FiddlerError, match=message) as refusal:
        load_model(plan, folder)
    assert "\n" not in str(refusal.value)


def test_demo_is_sharded_and_small():
    assert len(SHARDS) > 1
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 12_000_000
    config = json.loads((DEMO / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"], config["dtype"]) == (
        8,
        2,
        "bfloat16",
    )
    assert config["num_hidden_layers"] >= 6
    assert config["num_key_value_heads"] < config["num_attention_heads"]


def test_missing_shard_is_refused(model):
    (model / SHARDS[1]).unlink()
    assert_refused(
        model, f"{SHARDS[1]}: missing, though model.safetensors.index.json names it; download"
    )


@pytest.mark.parametrize("keep", [0, 5, 1000, 500_000])
def test_truncated_shard_is_refused(model, keep):
    shard = model / SHARDS[0]
    shard.write_bytes(shard.read_bytes()[:keep])
    assert_refused(model, rf"{SHARDS[0]}: damaged or truncated .*; download or pack it again")


def test_folder_without_weights_is_refused(model):
    for path in model.glob("model*"):
        path.unlink()
    assert_refused(model, "contains neither model.safetensors.index.json nor model.safetensors")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_damaged_json_is_refused(model, name):
    (model / name).write_text("{")
    assert_refused(model, f"{name}: cannot read")


def test_missing_config_is_refused(model):
    (model / "config.json").unlink()
    assert_refused(model, "config.json: missing")


def test_missing_tokenizer_is_refused(model):
    for path in model.glob("tokenizer*"):
        path.unlink()
    assert_refused(model, "no tokenizer")


def test_missing_folder_is_refused(tmp_path):
    assert_refused(tmp_path / "none", "none: no such folder")


@pytest.mark.parametrize("key", ["block_sparse_moe.experts.3.w2", "self_attn.q_proj"])
def test_missing_tensor_is_refused(model, key):
    index_file = model / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    name = f"model.layers.2.{key}.weight"
    file = index["weight_map"].pop(name)
    index_file.write_text(json.dumps(index))
    tensors = load_file(model / file)
    del tensors[name]
    save_file(tensors, model / file, metadata={"format": "pt"})
    assert_refused(model, f"tensor {name} is missing")


def test_expert_of_wrong_shape_is_refused(model):
    index = json.loads((model / "model.safetensors.index.json").read_text())
    name = "model.layers.2.block_sparse_moe.experts.3.w2.weight"
    file = model / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = torch.zeros(128, 255, dtype=torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})
    assert_refused(model, rf"{name} has shape \[128, 255\], but config.json implies \[128, 256\]")


def test_shard_copied_over_another_is_refused(model):
    shutil.copy(model / SHARDS[0], model / SHARDS[1])
    assert_refused(
        model, f"{SHARDS[1]}: tensor .* is missing; download or pack the checkpoint again"
    )


@pytest.mark.parametrize(("key", "value"), [("num_key_value_heads", 4), ("vocab_size", 512)])
def test_dense_tensors_of_wrong_shape_are_refused(model, key, value):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, key: value}))
    assert_refused(model, "has shape .*, but config.json implies")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "[]", "expected a JSON object, found list"),
        ("model.safetensors.index.json", '{"weight_map": []}', "has no weight_map"),
        ("config.json", None, "transformers cannot use it"),
    ],
)
def test_json_of_wrong_type_is_refused(model, name, text, message):
    if text is None:
        config = json.loads((model / name).read_text())
        text = json.dumps({**config, "rms_norm_eps": "small"})
    (model / name).write_text(text)
    assert_refused(model, f"{name}: {message}")


def test_single_file_checkpoint_loads(model):
    tensors = {
        name: tensor for shard in SHARDS for name, tensor in load_file(model / shard).items()
    }
    for path in model.glob("model*"):
        path.unlink()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    loaded, tokenizer = load_model(plan(), model)
    encoded = tokenizer("Once", return_tensors="pt").to(loaded.device)
    assert loaded.generate(**encoded, max_new_tokens=3).shape[1] > 2


def test_weights_are_never_rounded(random_checkpoint):
    folder, shape = random_checkpoint()
    narrow = shape.model_copy(update={"dtype": "bfloat16"})
    assert_refused(
        folder,
        "is F32, which the plan's bfloat16 cannot hold without loss",
        make_plan(narrow, [[0] * 8] * 2),
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"num_layers": 5},
            "model.num_layers is 5, but .*config.json implies 6; make a plan for this model",
        ),
        ({"num_experts": 4}, "model.num_experts is 4, but .*config.json implies 8"),
        ({"intermediate_size": 512}, "model.intermediate_size is 512"),
    ],
)
def test_plan_of_another_model_is_refused(overrides, message):
    assert_refused(DEMO, message, plan(**overrides))


def test_unknown_architecture_is_refused(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert_refused(model, "model_type is 'llama', which has no experts")


def test_plan_beyond_host_memory_is_refused():
    shape = demo_shape("bfloat16")
    plan = make_plan(shape, [[0] * 8] * 6)
    huge = with_rank(plan, host_memory_bytes=HostMemory(experts=10**15, embedding=0))
    assert_refused(
        DEMO,
        "its experts need 1000000.00 GB of host memory, plus .* GB while loading.*, but .* GB is"
        " available",
        huge,
    )


def test_plan_with_more_threads_than_cores_is_refused():
    shape = demo_shape("bfloat16")
    assert_refused(
        DEMO,
        "cpu_threads is 4096, but .* cores are available",
        make_plan(shape, [[0] * 8] * 6, threads=4096),
    )


def test_file_that_shrinks_while_it_is_read_is_refused(model):
    """The error of a loading thread is raised in the main thread."""
    loader = ModelLoader(plan(), model)
    shard = model / SHARDS[1]
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(FiddlerError, match="truncated while it was read"):
        ExpertStore(loader.plan, torch.device("cpu"), DEMO).load(loader.weights)


def test_dummy_weights_do_not_depend_on_the_placement():
    shape = demo_shape("float32")
    logits = []
    for resident, share in ((0, 0.0), (8, 0.0), (3, 0.6)):
        model, _ = load_model(
            make_plan(shape, [[resident] * 8] * 6, share={1: share}), DEMO, load_format="dummy"
        )
        with torch.no_grad():
            logits.append(model(torch.arange(20, device=model.device).unsqueeze(0)).logits)
    assert all(torch.allclose(each, logits[0], rtol=1e-4, atol=1e-4) for each in logits)
    weights = DummyWeights(shape, torch.float32)
    assert not torch.equal(weights.expert(0, 0)[0], weights.expert(0, 1)[0])
    assert torch.equal(weights.expert(5, 7)[2], DummyWeights(shape, torch.float32).expert(5, 7)[2])
