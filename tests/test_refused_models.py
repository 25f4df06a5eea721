"""Checkpoints that cannot run: check, loading and the planner refuse them in the same words."""

import pytest
import torch
from conftest import DEMO
from damage import (
    INDEX,
    SHARDS,
    change_config,
    change_experts,
    change_json,
    change_tensors,
    replace_weights,
    write_plan,
)
from seeds import spread
from transformers import MixtralForCausalLM

from fiddler_opt.inputs.model import ModelSpec
from fiddler_run import load_model
from fiddler_run.errors import FiddlerError
from fiddler_run.loading.check import check_plan

FIRST_EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
GENERATION = "generation_config.json"
FLOAT32 = 'set "dtype": "float32" in config.json and plan again'
FLOAT16 = 'set "dtype": "float16" in config.json and plan again'


def stack_experts(model) -> None:
    """Stores one expert's gate where newer checkpoints store all experts' gate and up."""

    def stacked(name, tensor):
        if not name.endswith("experts.0.w1.weight"):
            return None
        layer = name.removesuffix("block_sparse_moe.experts.0.w1.weight")
        return f"{layer}mlp.experts.gate_up_proj", tensor

    change_experts(model, stacked)


def cut_vocabulary(model) -> None:
    tables = ("lm_head.weight", "model.embed_tokens.weight")
    change_tensors(model, lambda name, t: (name, t[:300] if name in tables else t))
    change_config(model, vocab_size=300)


def quantise_awq(model) -> None:
    change_experts(model, lambda name, t: (name.replace("w1.weight", "w1.qweight"), t))


def truncate_tokenizer(model) -> None:
    (model / "tokenizer.json").write_text((DEMO / "tokenizer.json").read_text()[:2000])


TENSORS = {
    "quantised by its config": (
        lambda model: change_config(model, quantization_config={"quant_method": "awq"}),
        "quantization_config says that the weights are quantised ('awq'); name the original",
    ),
    "AWQ tensors": (
        quantise_awq,
        "these weights are quantised; name the original, unquantised checkpoint",
    ),
    "fp8 tensors": (
        lambda model: change_experts(model, lambda name, t: (name, t.to(torch.float8_e4m3fn))),
        "is F8_E4M3: quantised; name the original",
    ),
    "4-bit tensors": (
        lambda model: change_experts(model, lambda n, t: (n, t.to(torch.uint8).view(-1, 1))),
        "is U8: quantised; name the original",
    ),
    "stacked experts": (
        stack_experts,
        "tensor model.layers.0.mlp.experts.gate_up_proj has shape [256, 128], but config.json",
    ),
    "float32 weights, bfloat16 config": (
        lambda model: change_tensors(model, lambda name, t: (name, t.float())),
        f"is F32, which the plan's bfloat16 cannot hold without loss; {FLOAT32}",
    ),
    "float16 weights, bfloat16 config": (
        lambda model: change_tensors(model, lambda name, t: (name, t.half())),
        f"is F16, which the plan's bfloat16 cannot hold without loss; {FLOAT16}",
    ),
}
FILES = {
    "PyTorch pickles": (
        lambda model: replace_weights(model, "pytorch_model.bin"),
        "but weights as PyTorch pickles; --model names",
    ),
    "Mistral's own format": (
        lambda model: replace_weights(model, "consolidated.safetensors"),
        "but weights in Mistral's own format; --model names",
    ),
    "a GGUF file": (
        lambda model: replace_weights(model, "mixtral.Q4_K_M.gguf"),
        "but a GGUF file; --model names",
    ),
    "no index": (
        lambda model: (model / INDEX).unlink(),
        "but safetensors files without an index; --model names",
    ),
    "an index that names a file outside the folder": (
        lambda model: change_json(
            model / INDEX, weight_map={FIRST_EXPERT: "../model/" + SHARDS[0]}
        ),
        "is not the name of a file next to it; download or pack the checkpoint again",
    ),
    "an index with a number for a file name": (
        lambda model: change_json(model / INDEX, weight_map={FIRST_EXPERT: 7}),
        "'7' is not the name of a file next to it",
    ),
    "a deeply nested index": (
        lambda model: (model / INDEX).write_text('{"weight_map":' * 100_000),
        "nested too deeply",
    ),
    "an adapter": (
        lambda model: (model / "adapter_config.json").write_text("{}"),
        "adapters are not applied; merge the adapter",
    ),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), "no tokenizer, neither"),
    "a truncated tokenizer": (truncate_tokenizer, "tokenizer.json: cannot read: not JSON"),
    "a truncated generation config": (
        lambda model: (model / GENERATION).write_text('{"eos_'),
        "cannot read: not JSON",
    ),
    "a list as generation config": (
        lambda model: (model / GENERATION).write_text("[2]"),
        "expected a JSON object",
    ),
}
VALUES = {
    "a string as end token": (
        lambda model: change_json(model / GENERATION, eos_token_id="</s>"),
        "generation_config.json: eos_token_id: ",
    ),
    "a negative temperature": (
        lambda model: change_json(model / GENERATION, do_sample=True, temperature=-1.0),
        "generation_config.json: temperature: ",
    ),
    "NaN in config.json": (
        lambda model: change_config(model, rms_norm_eps=float("nan")),
        "config.json: cannot read: not JSON: NaN is not a number",
    ),
    "a tokenizer of another model": (
        cut_vocabulary,
        "the tokenizer does not belong to this model: in a simple text, the prompt contains",
    ),
    "an odd head_dim": (
        lambda model: change_config(model, head_dim=7),
        "config.json: transformers cannot use it: ",
    ),
    "more experts per token than experts": (
        lambda model: change_config(model, num_experts_per_tok=9),
        "config.json: transformers cannot use it: k not in range for dimension",
    ),
    "a billion layers": (
        lambda model: change_config(model, num_hidden_layers=10**9),
        "key 'num_hidden_layers' is 1000000000, expected a number up to 1000",
    ),
    "a list as dtype": (
        lambda model: change_config(model, dtype=["bfloat16"]),
        "dtype ['bfloat16'] is not supported",
    ),
}
REFUSED = {**TENSORS, **FILES, **VALUES}


@pytest.mark.parametrize("kind", spread(REFUSED, 16))
def test_check_and_loading_refuse_alike(tmp_path, model, kind):
    damage, words = REFUSED[kind]
    damage(model)
    plan = write_plan(tmp_path)
    problems, _ = check_plan(plan)
    assert problems
    assert words in problems[0]
    assert "\n" not in problems[0]
    with pytest.raises(FiddlerError) as refusal:
        load_model(plan)
    assert str(refusal.value) == problems[0]


@pytest.mark.parametrize(
    "kind",
    [
        "quantised by its config",
        "AWQ tensors",
        "fp8 tensors",
        "a billion layers",
    ],
)
def test_planner_refuses_them_too(model, kind):
    damage, words = REFUSED[kind]
    damage(model)
    with pytest.raises(FiddlerError) as refusal:
        ModelSpec.load(str(model))
    assert words in str(refusal.value)


def test_dense_weights_of_a_wider_dtype_are_cast_as_by_transformers(tmp_path, model):
    change_tensors(model, lambda name, t: (name, t.float() if "norm" in name else t))
    plan = write_plan(tmp_path)
    problems, notes = check_plan(plan)
    assert problems == []
    assert "13 tensors outside the experts are stored in a wider dtype than bfloat16" in notes[0]
    ours, _ = load_model(plan)
    stock = MixtralForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(each.cpu(), stock[name]) for name, each in ours.state_dict().items())


def test_wrong_value_is_listed_once(tmp_path, model):
    """The tokenizer's class reads config.json as well, which must not add a second problem."""
    change_config(model, initializer_range=True)
    problems, _ = check_plan(write_plan(tmp_path))
    assert len(problems) == 1
    assert "config.json: transformers cannot use it" in problems[0]
