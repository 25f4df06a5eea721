"""The step that decodes one token per sequence matches the stock model bit for bit."""

import random

import pytest
import torch
from captures import record_on_any_device
from conftest import DEMO, demo_shape, random_plan
from transformers import DynamicCache, MixtralForCausalLM, StaticCache

from fiddler_run import load_model
from fiddler_run.errors import FiddlerError
from fiddler_run.generation.cache import KeyValueCache
from fiddler_run.generation.decode_step import DecodeStep

TEXTS = ["Once upon a time there was a kind bear", "3 + 4 ="]


@pytest.fixture(scope="module")
def planned():
    model, tokenizer = load_model(random_plan(demo_shape("bfloat16"), random.Random(3)), DEMO)
    record_on_any_device(model)
    return model, tokenizer


def caches(model) -> dict:
    config = model.config
    return {
        "dynamic": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=64),
        "ours": lambda: KeyValueCache(config, 2, 64),
    }


def greedy_logits(model, forward, encoded, cache, steps: int = 6) -> list[torch.Tensor]:
    """Logits of a prompt and of greedy steps after it."""
    ids = encoded["input_ids"]
    mask = encoded["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    kept = []
    for _ in range(steps):
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        output = forward(model, **inputs, past_key_values=cache)
        kept.append(output.logits[:, -1:])
        ids = kept[-1].argmax(dim=-1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = positions[:, -1:] + 1
    return kept


@pytest.mark.parametrize("padded", [False, True], ids=["single", "left-padded"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "ours"])
@torch.no_grad()
def test_decode_step_matches_stock_forward(planned, kind, padded, device, monkeypatch):
    """Later steps must not overwrite logits that a caller keeps."""
    model, tokenizer = planned
    steps = []
    run_step = DecodeStep.__call__

    def count_step(self, **named):
        output = run_step(self, **named)
        steps.append(output is not None)
        return output

    monkeypatch.setattr(DecodeStep, "__call__", count_step)
    texts = TEXTS if padded else TEXTS[:1]
    encoded = tokenizer(texts, return_tensors="pt", padding=True).to(device)
    make_cache = caches(model)[kind]
    step = greedy_logits(model, type(model).forward, encoded, make_cache())
    assert steps == [True] * 5  # every pass but the prompt's
    whole = greedy_logits(model, MixtralForCausalLM.forward, encoded, make_cache())
    assert all(torch.equal(*pair) for pair in zip(step, whole, strict=True))


@torch.no_grad()
def test_positions_default_to_the_cache_length(planned, device):
    model, tokenizer = planned
    ids = tokenizer(TEXTS[0], return_tensors="pt").to(device)["input_ids"]
    tokens = ids.split(1, dim=1)
    cache = DynamicCache(config=model.config)
    logits = [model(input_ids=token, past_key_values=cache).logits for token in tokens]
    cache = DynamicCache(config=model.config)
    whole = MixtralForCausalLM.forward
    expected = [whole(model, token, past_key_values=cache).logits for token in tokens]
    assert all(torch.equal(*pair) for pair in zip(logits, expected, strict=True))


@torch.no_grad()
def test_options_of_the_full_forward_pass_are_supported(planned, device):
    """Further outputs, a loss, tuples, and hooks on modules that the decode step splits."""
    model, tokenizer = planned
    ids = tokenizer(TEXTS[1], return_tensors="pt").to(device)["input_ids"]
    last = {"input_ids": ids[:, -1:]}

    def after_the_rest(**arguments):
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :-1], past_key_values=cache)
        return model(**last, past_key_values=cache, **arguments)

    plain = after_the_rest()
    assert len(after_the_rest(output_hidden_states=True).hidden_states) == 7
    assert len(after_the_rest(output_router_logits=True).router_logits) == 6
    assert after_the_rest(labels=last["input_ids"]).loss is not None
    assert torch.equal(after_the_rest(return_dict=False)[0], plain.logits)
    seen = []
    for part in (model.model.layers[2], model.model.layers[3].mlp, model.model.layers[4].self_attn):
        with part.register_forward_hook(lambda *_: seen.append(1)):
            assert torch.equal(after_the_rest().logits, plain.logits)
    assert len(seen) == 6  # three hooks, each for the prompt and the token


@torch.no_grad()
def test_changed_weights_are_used(device):
    model, tokenizer = load_model(random_plan(demo_shape(), random.Random(3)), DEMO)
    record_on_any_device(model)
    encoded = tokenizer(TEXTS[:1], return_tensors="pt").to(device)
    greedy_logits(model, type(model).forward, encoded, DynamicCache(config=model.config))
    for layer in model.model.layers:  # the new weights have other addresses
        projection = layer.self_attn.v_proj
        projection.weight = torch.nn.Parameter(projection.weight * 0.5, requires_grad=False)
    model.to(device)
    step, whole = (
        greedy_logits(model, forward, encoded, DynamicCache(config=model.config))
        for forward in (type(model).forward, MixtralForCausalLM.forward)
    )
    assert all(torch.equal(*pair) for pair in zip(step, whole, strict=True))


def test_gradients_are_refused(planned, device):
    model, tokenizer = planned
    ids = tokenizer(TEXTS[0], return_tensors="pt").to(device)["input_ids"]
    states = model.model.embed_tokens(ids).clone().requires_grad_()
    with pytest.raises(FiddlerError, match="the experts do not support gradients"):
        model(inputs_embeds=states)
    with torch.no_grad():
        model(inputs_embeds=states)


def test_generations_share_the_cache(planned, device):
    """Except one that returns its cache, brings its own, or uses none."""
    model, tokenizer = planned
    ids = tokenizer(TEXTS[0], return_tensors="pt").to(device)["input_ids"]
    first = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert model.cache.get_seq_length() == ids.shape[1] + 11
    model.cache.reset()
    for arguments in (
        {"return_dict_in_generate": True},
        {"past_key_values": DynamicCache()},
        {"use_cache": False},
    ):
        output = model.generate(ids, max_new_tokens=12, do_sample=False, **arguments)
        assert torch.equal(getattr(output, "sequences", output), first)
        assert model.cache.get_seq_length() == 0
