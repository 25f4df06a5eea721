"""The step that decodes one token of each sequence: the stock model's, bit for bit."""

import random

import pytest
import torch
from conftest import DEMO, demo_shape, random_plan
from transformers import DynamicCache, MixtralForCausalLM, StaticCache

from fiddler_run import load_model
from fiddler_run.cache import KeyValueCache
from fiddler_run.decode import DecodeStep

TEXTS = ["Once upon a time there was a kind bear", "3 + 4 ="]


@pytest.fixture(scope="module")
def dispatched():
    return load_model(random_plan(demo_shape("bfloat16"), random.Random(3)), DEMO)


def caches(model) -> dict:
    return {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=64),
        "ours": lambda: KeyValueCache(6, 2, model.config.num_key_value_heads, 64, 32, model.dtype, model.device),
    }


def by_hand(model, forward, encoded, cache, steps: int = 6) -> list[torch.Tensor]:
    """Logits of a prompt and of greedy steps after it."""
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    kept = []
    for _ in range(steps):
        kept.append(
            forward(model, input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1:]
        )
        ids, mask = kept[-1].argmax(dim=-1), torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = positions[:, -1:] + 1
    return kept


@pytest.mark.parametrize("padded", [False, True], ids=["single", "left-padded"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "ours"])
@torch.no_grad()
def test_equal_to_the_whole_model(dispatched, kind, padded, device, monkeypatch):
    """Logits that a caller keeps are not overwritten by later steps."""
    model, tokenizer = dispatched
    steps, step_forward = [], DecodeStep.__call__
    monkeypatch.setattr(DecodeStep, "__call__", lambda self, **named: steps.append(1) or step_forward(self, **named))
    encoded = tokenizer(TEXTS if padded else TEXTS[:1], return_tensors="pt", padding=True).to(device)
    make_cache = caches(model)[kind]
    step = by_hand(model, type(model).forward, encoded, make_cache())
    assert len(steps) == 5  # all but the prompt
    whole = by_hand(model, MixtralForCausalLM.forward, encoded, make_cache())
    assert all(torch.equal(*pair) for pair in zip(step, whole, strict=True))


@torch.no_grad()
def test_positions_follow_from_the_cache(dispatched, device):
    model, tokenizer = dispatched
    ids = tokenizer(TEXTS[0], return_tensors="pt").to(device)["input_ids"]
    one_by_one = DynamicCache(config=model.config)
    logits = [model(input_ids=ids[:, i : i + 1], past_key_values=one_by_one).logits for i in range(ids.shape[1])]
    stock = DynamicCache(config=model.config)
    expected = [MixtralForCausalLM.forward(model, ids[:, i : i + 1], past_key_values=stock).logits for i in range(ids.shape[1])]
    assert all(torch.equal(*pair) for pair in zip(logits, expected, strict=True))


@torch.no_grad()
def test_what_only_the_whole_model_does(dispatched, device):
    """Further outputs, a loss, tuples, and hooks on parts that the step takes apart."""
    model, tokenizer = dispatched
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
    assert len(seen) == 6  # the prompt's and the token's


@torch.no_grad()
def test_weights_that_change_afterwards(device):
    model, tokenizer = load_model(random_plan(demo_shape(), random.Random(3)), DEMO)
    encoded = tokenizer(TEXTS[:1], return_tensors="pt").to(device)
    by_hand(model, type(model).forward, encoded, DynamicCache(config=model.config))
    for layer in model.model.layers:  # elsewhere in memory
        layer.self_attn.v_proj.weight = torch.nn.Parameter(layer.self_attn.v_proj.weight * 0.5, requires_grad=False)
    model.to(device)
    step, whole = (
        by_hand(model, forward, encoded, DynamicCache(config=model.config))
        for forward in (type(model).forward, MixtralForCausalLM.forward)
    )
    assert all(torch.equal(*pair) for pair in zip(step, whole, strict=True))


def small_cache() -> KeyValueCache:
    """2 layers, 3 sequences, 2 heads, 4 tokens of 2 numbers each."""
    return KeyValueCache(2, 3, 2, 4, 2, torch.float32, torch.device("cpu"))


PROMPT = torch.arange(24.0).view(3, 2, 2, 2)  # 2 tokens of such a cache


def test_cache_stays_where_it_is():
    cache = small_cache()
    keys, values = cache.update(PROMPT, -PROMPT, 1)
    where = keys.data_ptr(), values.data_ptr()
    assert torch.equal(keys, PROMPT)
    assert cache.get_seq_length(1) == 2
    cache.layers[1].reorder_cache(torch.tensor([2, 2, 0]))
    keys, values = cache.update(torch.ones(3, 2, 1, 2), torch.zeros(3, 2, 1, 2), 1)
    assert torch.equal(keys[:, :, :2], PROMPT[[2, 2, 0]])
    assert torch.equal(values[:, :, :2], -PROMPT[[2, 2, 0]])
    assert torch.equal(keys[:, :, 2], torch.ones(3, 2, 2))
    cache.reset()
    assert cache.get_seq_length(1) == 0
    keys, values = cache.update(PROMPT[:2], PROMPT[:2], 1)
    assert (keys.data_ptr(), values.data_ptr()) == where
    assert torch.equal(keys, PROMPT[:2])


@pytest.mark.parametrize("more", [torch.cat([PROMPT, PROMPT]), torch.cat([PROMPT] * 3, dim=2)], ids=["sequences", "tokens"])
def test_more_than_the_cache_has_room_for(more):
    cache, dynamic = small_cache(), DynamicCache()
    for states in (more, more[:, :, :1]):
        assert all(
            torch.equal(*pair) for pair in zip(cache.update(states, -states, 0), dynamic.update(states, -states, 0), strict=True)
        )


def test_cropped_after_there_was_no_room():
    """As assisted decoding does with tokens that it takes back."""
    cache, dynamic = small_cache(), DynamicCache()
    for states in (PROMPT, PROMPT[:, :, :1], PROMPT):
        cache.update(states, -states, 0)
        dynamic.update(states, -states, 0)
    for each in (cache, dynamic):
        each.layers[0].crop(-2)
    states = PROMPT[:, :, :1] + 100
    assert all(
        torch.equal(*pair) for pair in zip(cache.update(states, -states, 0), dynamic.update(states, -states, 0), strict=True)
    )


def test_one_token_too_many():
    cache, dynamic = small_cache(), DynamicCache()
    for states in (PROMPT, PROMPT, PROMPT[:, :, :1], PROMPT):
        assert all(
            torch.equal(*pair) for pair in zip(cache.update(states, -states, 0), dynamic.update(states, -states, 0), strict=True)
        )


def test_generations_share_the_cache(dispatched, device):
    """But one whose cache is handed out, or that brings its own."""
    model, tokenizer = dispatched
    ids = tokenizer(TEXTS[0], return_tensors="pt").to(device)["input_ids"]
    first = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert model.cache.get_seq_length() == ids.shape[1] + 11
    model.cache.reset()
    for arguments in ({"return_dict_in_generate": True}, {"past_key_values": DynamicCache()}, {"use_cache": False}):
        output = model.generate(ids, max_new_tokens=12, do_sample=False, **arguments)
        assert torch.equal(getattr(output, "sequences", output), first)
        assert model.cache.get_seq_length() == 0
