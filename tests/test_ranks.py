"""Several ranks give the results of one."""

import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import yaml
from conftest import DEMO, demo_shape, random_plan
from models import Stock
from ranks import in_ranks, random_shared_plan
from seeds import seeds, spread
from test_exactness import BATCHES, TEXTS, assert_same, encode, greedy

from fiddler_run import load_model
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan
from fiddler_run.ranks import exchange, peers


@pytest.fixture(scope="module")
def loaded():
    return load_model(random_plan(demo_shape(), random.Random(0)))


@pytest.mark.parametrize("seed", seeds(2, 25))
def test_random_shares_match_stock(seed, request, loaded, stock):
    """Two or three ranks; batches of 1 to 5 sequences, left-padded or of one length."""
    model, tokenizer = loaded
    plan = random_shared_plan(demo_shape(), seed, 2 + seed % 2, (32, 128, 64)[seed % 3])
    new_tokens = 64 if request.node.get_closest_marker("slow") else 12
    with in_ranks(model, plan, DEMO):
        encoded = encode(tokenizer, BATCHES[seed % 5], model.device)
        assert_same(model, stock, encoded, new_tokens)


def test_beams_and_samples_match_stock(loaded, stock):
    model, tokenizer = loaded
    encoded = encode(tokenizer, TEXTS[:1], model.device)
    more = [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 0.8},
    ]
    with in_ranks(model, random_shared_plan(demo_shape(), 7, 2), DEMO):
        for arguments in more:
            wanted = {**greedy(8), **arguments}
            expected = stock.generate(**encoded, seed=5, **wanted)
            torch.manual_seed(5)
            assert torch.equal(model.generate(**encoded, **wanted), expected)


@pytest.mark.parametrize(
    "overrides",
    spread(
        [
            {"num_local_experts": 4, "num_experts_per_tok": 3},
            {"intermediate_size": 100},
            {"intermediate_size": 20, "num_hidden_layers": 1},
        ],
        1,
    ),
    ids=str,
)
def test_odd_shapes_match_stock(overrides, random_checkpoint, device):
    folder, shape = random_checkpoint(**overrides)
    ids = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    model, _ = load_model(random_plan(shape, random.Random(0)), folder)
    for num_ranks in (2, 3):
        with in_ranks(model, random_shared_plan(shape, num_ranks, num_ranks), folder):
            inputs = {"input_ids": ids, "attention_mask": mask}
            assert_same(model, Stock(folder, device), inputs, 8)


@torch.no_grad()
def test_prompts_in_chunks_give_the_same_bits_again(loaded):
    """In bfloat16 as well: the order of every sum is fixed."""
    for dtype in ("float32", "bfloat16"):
        plan = random_shared_plan(demo_shape(dtype), 3, 3)
        plan = plan.model_copy(update={"prefill_chunk_tokens": 7})
        model, tokenizer = load_model(random_plan(demo_shape(dtype), random.Random(0)))
        ids = encode(tokenizer, ["One bright morning " * 3], model.device)["input_ids"]
        found = []
        for _ in range(2):
            with in_ranks(model, plan, DEMO):
                logits = model(ids).logits
                found.append((logits, model.generate(ids, **greedy(4))))
        (logits, tokens), (again, tokens_again) = found
        assert torch.equal(logits, again)
        assert torch.equal(tokens, tokens_again)


def test_traffic_counts_the_blocks_of_all_ranks(loaded):
    """Whatever the shares, a token needs all blocks of its experts."""
    model, tokenizer = loaded
    plan = random_shared_plan(demo_shape(), 11, 3)
    encoded = encode(tokenizer, TEXTS[1:2], model.device)
    with in_ranks(model, plan, DEMO), torch.no_grad():
        before = model.traffic()
        model(encoded["input_ids"][:, :1])
        traffic = model.traffic() - before
        own = model.engine.resources.traffic
        model.forget_traffic()
        assert model.traffic().needed_blocks == 0
    assert traffic.needed_blocks == 6 * 2 * plan.blocks_per_expert
    assert 0 < own.needed_blocks < traffic.needed_blocks


@torch.no_grad()
def test_an_error_within_a_layer_ends_the_ranks(loaded, monkeypatch):
    """The error is raised as it is; after it, the ranks would not agree on the next layer.

    The process goes on, even if it never uses the model again.
    """
    model, tokenizer = loaded
    ids = encode(tokenizer, TEXTS[1:2], model.device)["input_ids"]
    monkeypatch.setattr(exchange, "LAYER_TIMEOUT", timedelta(seconds=1))  # the other is a thread
    monkeypatch.setattr(peers, "LEAVE_S", 0.1)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with in_ranks(model, random_shared_plan(demo_shape(), 5, 2), DEMO):
        expected = model(ids).logits
        layer = model.layers[3]
        with monkeypatch.context() as patched:
            patched.setattr(layer, "_run", lambda *_: torch.zeros(1) @ torch.zeros(2))
            with pytest.raises(RuntimeError, match="size"):
                model(ids)
        time.sleep(0.5)
        assert ended == []
        for _ in range(2):
            with pytest.raises(FiddlerError, match="a layer was interrupted, so the ranks have"):
                model(ids)
    with in_ranks(model, random_shared_plan(demo_shape(), 5, 2), DEMO):
        assert torch.equal(model(ids).logits, expected)


def test_states_of_another_dtype_are_refused_before_they_are_sent(loaded):
    model, tokenizer = loaded
    ids = encode(tokenizer, TEXTS[1:2], model.device)["input_ids"]
    with in_ranks(model, random_shared_plan(demo_shape(), 5, 2), DEMO), torch.no_grad():
        served = model.experts_modules()[0].planned
        states = torch.zeros(1, 128, dtype=torch.float64, device=model.device)
        index = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        with pytest.raises(FiddlerError, match="computes in torch.float64, but its experts are"):
            served(states, index, torch.ones(1, 2, device=model.device))
        model(ids)


def test_threads_take_turns_at_a_layer(loaded):
    model, _ = loaded
    with in_ranks(model, random_shared_plan(demo_shape(), 9, 2), DEMO):
        served = model.experts_modules()[0].planned
        states = torch.randn(6, 128, device=model.device)
        index = torch.arange(12, device=model.device).view(6, 2) % 8
        weights = torch.rand(6, 2, device=model.device)
        expected = served(states, index, weights)
        with ThreadPoolExecutor(4) as threads:
            found = threads.map(lambda _: served(states, index, weights), range(12))
            assert all(torch.equal(each, expected) for each in found)


def test_a_layer_waits_for_a_generation(loaded):
    model, tokenizer = loaded
    encoded = encode(tokenizer, TEXTS[:1], model.device)
    with in_ranks(model, random_shared_plan(demo_shape(), 9, 2), DEMO):
        served = model.experts_modules()[0].planned
        inputs = torch.randn(1, 128), torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2)
        inputs = [tensor.to(model.device) for tensor in inputs]
        expected = served(*inputs), model.generate(**encoded, **greedy(8))
        found = []

        def call_layer() -> None:
            found.extend(served(*inputs) for _ in range(40))

        beside = threading.Thread(target=call_layer, daemon=True)
        beside.start()
        for _ in range(3):
            assert torch.equal(model.generate(**encoded, **greedy(8)), expected[1])
        beside.join(timeout=60)
        assert len(found) == 40
        assert all(torch.equal(each, expected[0]) for each in found)


def test_an_interrupted_request_leaves_no_wrong_reply(loaded):
    model, tokenizer = loaded
    ids = encode(tokenizer, TEXTS[1:2], model.device)["input_ids"]
    with in_ranks(model, random_shared_plan(demo_shape(), 9, 2), DEMO), torch.no_grad():
        model.peers.request(do="count")
        model(ids)
        traffic = model.traffic()
        assert traffic.needed_blocks > model.engine.resources.traffic.needed_blocks
        model.forget_traffic()
        assert model.traffic().needed_blocks == 0


def test_blocks_of_ranks_add_up():
    plan = random_shared_plan(demo_shape(), 2, 2)
    ranks = plan.model_dump()["ranks"]
    ranks[1]["host_blocks"][4][3] += 1
    problems = [*Plan.examine(yaml.safe_dump({**plan.model_dump(), "ranks": ranks}), "p")[1]]
    assert any("expert 3 of layer 4 has 9 blocks in all, not 8" in each for each in problems)
    ranks[1]["host_blocks"][4][3] -= 1
    ranks[1]["disk_blocks"] = {layer: [0] * 8 for layer in range(6)}
    problems = Plan.examine(yaml.safe_dump({**plan.model_dump(), "ranks": ranks}), "p")[1]
    (problem,) = problems
    assert problem.startswith("p: ranks[1].disk_blocks: only for a single rank")
