"""The step that decodes one token of each sequence: the stock model's, bit for bit."""

import random

import pytest
import torch
from conftest import DEMO, demo_shape, random_plan
from transformers import DynamicCache, MixtralForCausalLM, StaticCache
from transformers.models.mixtral import modeling_mixtral as mixtral

from fiddler_run import load_model
from fiddler_run.cache import KeyValueCache
from fiddler_run.decode import DecodeStep
from fiddler_run.errors import FiddlerError

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


def rolled(linear: torch.nn.Linear) -> torch.nn.Linear:
    """Another module with other weights."""
    other = torch.nn.Linear(
        linear.in_features, linear.out_features, bias=False, dtype=linear.weight.dtype, device=linear.weight.device
    )
    other.weight = torch.nn.Parameter(linear.weight.roll(5, dims=0), requires_grad=False)
    return other


class Wrapped(torch.nn.Module):
    """A layer inside another one, as adapters make them."""

    def __init__(self, base: torch.nn.Module):
        super().__init__()
        self.base = base

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.base(states).roll(1, dims=-1)


class OtherLayer(mixtral.MixtralDecoderLayer):
    """Of which nothing is known."""

    def forward(self, hidden_states, **named):
        return super().forward(hidden_states, **named) * 0.5


def other_parameter(model) -> None:
    for layer in model.model.layers:
        weight = layer.self_attn.o_proj.weight
        layer.self_attn.o_proj.weight = torch.nn.Parameter(weight.roll(7, dims=0), requires_grad=False)


def other_data(model) -> None:
    for layer in model.model.layers:
        norm = layer.post_attention_layernorm
        norm.weight.data = norm.weight.data * torch.randn(128, generator=torch.Generator().manual_seed(1)).to(norm.weight.device)


def other_router(model) -> None:
    for layer in model.model.layers:
        router = layer.mlp.gate
        router.weight = torch.nn.Parameter(router.weight.flip(0).clone(), requires_grad=False)


def other_class(model) -> None:
    layer = model.model.layers[4]
    layer.__class__ = OtherLayer


REPLACEMENTS = {
    "head": lambda model: model.set_output_embeddings(rolled(model.get_output_embeddings())),
    "wrapped head": lambda model: setattr(model, "lm_head", Wrapped(model.lm_head)),
    "o_proj": lambda model: setattr(model.model.layers[0].self_attn, "o_proj", rolled(model.model.layers[0].self_attn.o_proj)),
    "wrapped q_proj": lambda model: setattr(
        model.model.layers[0].self_attn, "q_proj", Wrapped(model.model.layers[0].self_attn.q_proj)
    ),
    "a parameter": other_parameter,
    "a parameter's data": other_data,
    "router": other_router,
    "layer of another class": other_class,
    "fewer layers": lambda model: setattr(model.model, "layers", model.model.layers[:4]),
    "more rows of the embedding": lambda model: model.resize_token_embeddings(800, mean_resizing=False),
    "final norm": lambda model: setattr(model.model, "norm", Wrapped(model.model.norm)),
}


@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_what_is_replaced_after_a_generation_is_used(replacement, device):
    """Prompt and decode follow, as transformers' own forward pass does."""
    model, tokenizer = load_model(random_plan(demo_shape(), random.Random(3)), DEMO)
    encoded = tokenizer(TEXTS[0], return_tensors="pt").to(device)
    arguments = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    before = model.generate(**encoded, **arguments)
    REPLACEMENTS[replacement](model)
    after = model.generate(**encoded, **arguments)
    with model.model.layers[0].register_forward_hook(lambda *_: None):  # which only transformers' own forward pass calls
        expected = model.generate(**encoded, **arguments)
    assert torch.equal(after, expected)
    assert replacement == "more rows of the embedding" or not torch.equal(after, before)


def test_an_embedding_in_host_memory_is_not_resized():
    plan = random_plan(demo_shape(), random.Random(3))
    in_host = plan.host_memory_bytes.model_copy(update={"embedding": 1})
    model, _ = load_model(plan.model_copy(update={"host_memory_bytes": in_host}), DEMO)
    with pytest.raises(FiddlerError, match="the plan keeps the embedding in host memory"):
        model.resize_token_embeddings(800)


def test_gradients_are_refused_in_words(dispatched, device):
    model, tokenizer = dispatched
    states = model.model.embed_tokens(tokenizer(TEXTS[0], return_tensors="pt").to(device)["input_ids"]).clone().requires_grad_()
    with pytest.raises(FiddlerError, match="experts in blocks compute no gradients"):
        model(inputs_embeds=states)
    with torch.no_grad():
        model(inputs_embeds=states)


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
