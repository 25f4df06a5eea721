"""Chunked prefill, batches and beams give the tokens of stock transformers."""

import random
from collections.abc import Iterator

import pytest
import torch
from conftest import demo_shape, random_plan
from seeds import spread

from fiddler_run.generation.answer import generate
from fiddler_run.generation.generate import generate_ids
from fiddler_run.generation.sampling import Options

TEXTS = ["Once upon a time there was a kind bear", "def count", "3 + 4 ="]


@pytest.fixture
def planned(place):
    return place(random_plan(demo_shape(), random.Random(7), block_neurons=64))


@pytest.fixture
def shapes(planned) -> Iterator[list[tuple[int, int]]]:
    """Collects (sequences, tokens) of each pass through the first layer."""
    found = []
    layer = planned[0].model.layers[0]
    with layer.register_forward_hook(lambda _, __, output: found.append(tuple(output.shape[:2]))):
        yield found


def set_chunk(model, tokens: int) -> None:
    model.plan = model.plan.model_copy(update={"prefill_chunk_tokens": tokens})


def test_prompt_longer_than_a_chunk_matches_stock(planned, stock, device):
    model, tokenizer = planned
    prompt = "\n".join(TEXTS * 7)
    encoded = tokenizer(prompt, return_tensors="pt").to(device)
    tokens = encoded["input_ids"].shape[1]
    assert tokens > model.plan.prefill_chunk_tokens
    expected = stock.generate(**encoded, max_new_tokens=8, do_sample=False)[0, tokens:]
    pieces = []
    generate(model, tokenizer, prompt, Options(max_new_tokens=8), pieces.append)
    assert "".join(pieces) == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("batch", "beams"), spread([(1, 2), (1, 4), (1, 16), (2, 4), (4, 1), (16, 1)], 2)
)
def test_batches_and_beams_match_stock(planned, stock, batch, beams):
    """With padded and unpadded prompts, in the plan's chunks and in small ones, in one KV cache."""
    model, tokenizer = planned
    texts = (TEXTS * 6)[:batch]
    encoded = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
    ids = encoded["input_ids"]
    mask = encoded["attention_mask"]
    new_tokens = 8
    arguments = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    expected = stock.generate(ids, mask, num_beams=beams, **arguments)
    options = Options(max_new_tokens=new_tokens, num_beams=beams)
    for chunk in (model.plan.prefill_chunk_tokens, 3):
        set_chunk(model, chunk)
        output, measured = generate_ids(
            model, ids, options, attention_mask=mask, min_new_tokens=new_tokens
        )
        assert torch.equal(output, expected)
        assert (measured.prompt_tokens, measured.output_tokens) == (ids.shape[1], new_tokens)


def test_generate_uses_the_plans_chunk_size(planned, stock, shapes):
    """An explicit `prefill_chunk_size` takes precedence."""
    model, tokenizer = planned
    encoded = tokenizer(TEXTS[0], return_tensors="pt").to(model.device)
    set_chunk(model, 4)
    greedy = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    expected = stock.generate(**encoded, **greedy)
    for arguments in ({}, {"prefill_chunk_size": 5}):
        assert torch.equal(model.generate(**encoded, **greedy, **arguments), expected)
    tokens = encoded["input_ids"].shape[1]  # of one sequence, as planned
    chunks = [[size] * (tokens // size) + [tokens % size] * bool(tokens % size) for size in (4, 5)]
    assert [length for _, length in shapes] == [*chunks[0], 1, *chunks[1], 1]


@pytest.mark.parametrize(
    "arguments",
    [{"num_beams": 4, "do_sample": False}, {"num_return_sequences": 4, "do_sample": True}],
    ids=str,
)
def test_beams_share_the_prefill_of_their_prompt(planned, stock, shapes, arguments):
    """The prompt passes once, and its last token once per beam; likewise for sampled sequences."""
    model, tokenizer = planned
    encoded = tokenizer(TEXTS, return_tensors="pt", padding=True).to(model.device)
    prompts, tokens = encoded["input_ids"].shape
    arguments = {**arguments, "max_new_tokens": 3, "min_new_tokens": 3, "pad_token_id": 2}
    torch.manual_seed(5)
    output = model.generate(**encoded, **arguments)
    assert shapes == [(prompts, tokens - 1), *[(4 * prompts, 1)] * 3]
    assert torch.equal(output, stock.generate(**encoded, seed=5, **arguments))


def test_more_sequences_pass_in_smaller_chunks(planned, stock, shapes):
    """No pass has more tokens than planned, also where every beam prefills its own prompt."""
    model, tokenizer = planned
    encoded = tokenizer(TEXTS[:2], return_tensors="pt", padding=True).to(model.device)
    set_chunk(model, 12)
    greedy = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "pad_token_id": 2}
    for arguments in ({}, {"num_beams": 2, "return_dict_in_generate": True}):
        output = model.generate(**encoded, **greedy, **arguments)
        expected = stock.model.generate(**encoded, **greedy, **arguments)
        tokens = [getattr(each, "sequences", each) for each in (output, expected)]
        assert torch.equal(*tokens)
    assert max(sequences * tokens for sequences, tokens in shapes) == 12
