"""Long prompts, batches and beams: cut as the plan says, and still the stock tokens."""

import random
from collections.abc import Iterator

import pytest
import torch
from conftest import demo_shape, random_plan

from fiddler_run.generation.generate import generate, generate_ids
from fiddler_run.generation.sampling import Options

TEXTS = ["Once upon a time there was a kind bear", "def count", "3 + 4 ="]


@pytest.fixture
def planned(place):
    return place(random_plan(demo_shape(), random.Random(7), block_neurons=64))


@pytest.fixture
def shapes(planned) -> Iterator[list[tuple[int, int]]]:
    """The sequences and tokens of each pass through the first layer."""
    found = []
    layer = planned[0].model.layers[0]
    with layer.register_forward_hook(lambda _, __, output: found.append(tuple(output.shape[:2]))):
        yield found


def set_chunk(model, tokens: int) -> None:
    model.plan = model.plan.model_copy(update={"prefill_chunk_tokens": tokens})


def test_prompts_longer_than_a_prefill_chunk(planned, stock, device):
    model, tokenizer = planned
    prompt = "\n".join(TEXTS * 7)
    encoded = tokenizer(prompt, return_tensors="pt").to(device)
    tokens = encoded["input_ids"].shape[1]
    assert tokens > model.plan.prefill_chunk_tokens
    expected = stock.generate(**encoded, max_new_tokens=8, do_sample=False)[0, tokens:]
    pieces = []
    generate(model, tokenizer, prompt, Options(max_new_tokens=8), pieces.append)
    assert "".join(pieces) == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize(("batch", "beams"), [(1, 2), (1, 4), (1, 16), (2, 4), (4, 1), (16, 1)])
def test_batches_and_beams(planned, stock, batch, beams):
    """In one cache after the other way of decoding, and on prompts that are padded and that are
    not; then cut into chunks.
    """
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


def test_long_prompts_are_cut_as_the_plan_says(planned, stock, shapes):
    """By whoever calls `generate()`, unless it is told otherwise."""
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
def test_beams_share_their_prompt(planned, stock, shapes, arguments):
    """It passes the layers once, in the plan's chunks, and its last token for each beam; sampled
    continuations as well.
    """
    model, tokenizer = planned
    encoded = tokenizer(TEXTS, return_tensors="pt", padding=True).to(model.device)
    prompts, tokens = encoded["input_ids"].shape
    arguments = {**arguments, "max_new_tokens": 3, "min_new_tokens": 3, "pad_token_id": 2}
    torch.manual_seed(5)
    output = model.generate(**encoded, **arguments)
    assert shapes == [(prompts, tokens - 1), *[(4 * prompts, 1)] * 3]
    assert torch.equal(output, stock.generate(**encoded, seed=5, **arguments))


def test_more_rows_pass_in_smaller_chunks(planned, stock, shapes):
    """So that no more tokens than planned are in the layers at once, where each beam takes the
    prompt by itself.
    """
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
