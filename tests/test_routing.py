"""Counting router choices: exactly those of stock transformers, every token once a layer."""

from itertools import combinations

import pytest
import torch
from conftest import DEMO, demo_shape, make_plan
from planning import small_model
from transformers import AutoTokenizer, MixtralForCausalLM

from fiddler_opt.routing import Routing, RoutingProfile
from fiddler_opt.trace_routing import encode_prompts, read_prompts, record_routing
from fiddler_run import load_model
from fiddler_run.errors import FiddlerError

PROMPTS = ["Once upon a time there was a fox.", "12 + 30 = 42", "def add(a, b):\n    return a + b"]


@pytest.fixture(scope="module")
def profile() -> RoutingProfile:
    shape = demo_shape()
    model, tokenizer = load_model(make_plan(shape, [[3] * 8] * 6), DEMO)
    encoded = encode_prompts(tokenizer, PROMPTS, 1024, "prompts")
    profile = record_routing(model, shape, encoded, "prompts", "test", lambda: None)
    assert not any(module._forward_pre_hooks for module in model.experts_modules())
    return profile


def test_counts_are_those_of_stock_transformers(profile):
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    stock = MixtralForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    activations = [[0] * 8 for _ in range(6)]
    pairs = [dict.fromkeys(combinations(range(8), 2), 0) for _ in range(6)]
    tokens = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens += ids.shape[1]
        with torch.no_grad():
            routers = stock(ids, output_router_logits=True).router_logits
        for layer, logits in enumerate(routers):
            for token in logits:
                first, second = sorted(token.topk(2).indices.tolist())
                activations[layer][first] += 1
                activations[layer][second] += 1
                pairs[layer][first, second] += 1
    assert profile.recorded.tokens == tokens
    assert profile.activations == dict(enumerate(activations))
    assert profile.pairs == {layer: list(counts.values()) for layer, counts in enumerate(pairs)}


def test_round_trip(profile):
    assert RoutingProfile.parse(profile.dump(), "here") == profile


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_prompts: 3", "num_prompts: x", "recorded.num_prompts"),
        ("  2: [", "  7: [", "activations: needs exactly the layers 0 to 5"),
        ("tokens: ", "tokens: 1", r"activations\[0\]: adds up to"),
    ],
)
def test_inconsistent_profiles_do_not_load(profile, old, new, message):
    with pytest.raises(FiddlerError, match=message):
        RoutingProfile.parse(profile.dump().replace(old, new), "here")


def test_probabilities(profile):
    model = small_model(num_layers=6, num_experts=8)
    routing = Routing.from_profile(profile, model, "file")
    for layer in range(6):
        assert sum(routing.expert[layer]) == pytest.approx(2)
        assert sum(routing.pair[layer].values()) == pytest.approx(1)
        for expert in range(8):
            assert sum(p for pair, p in routing.pair[layer].items() if expert in pair) == pytest.approx(
                routing.expert[layer][expert]
            )


def test_uniform_probabilities():
    routing = Routing.uniform(small_model(num_experts=8))
    assert routing.expert[0] == [0.25] * 8
    assert sum(routing.pair[0].values()) == pytest.approx(1)


def test_a_profile_of_another_model_is_refused(profile):
    with pytest.raises(FiddlerError, match="model.num_layers is 6, but small has 2: a profile of another model"):
        Routing.from_profile(profile, small_model(), "file")


def test_a_prompt_longer_than_the_context():
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    with pytest.raises(FiddlerError, match="file: prompt 2 has 301 tokens, more than the model's context of 256; shorten it"):
        encode_prompts(tokenizer, ["short", "1" * 300], 256, "file")


def test_read_prompts(tmp_path):
    plain, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_text("one\n\n two\n")
    lines.write_text('{"prompt": "a\\nb"}\n"c"\n{"text": "d"}\n')
    assert read_prompts(plain) == ["one", " two"]
    assert read_prompts(lines) == ["a\nb", "c", "d"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n  \n", "p.txt: holds no prompt"),
        ("p.jsonl", '"fine"\n{"prompt": 3}\n', "p.jsonl:2: no text"),
        ("p.jsonl", "{oops\n", "p.jsonl:1: not JSON"),
        ("p.jsonl", "[1]\n", "p.jsonl:1: no text"),
    ],
)
def test_bad_prompt_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(FiddlerError, match=message):
        read_prompts(tmp_path / name)
