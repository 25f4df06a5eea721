"""transformers' `generate()` on a planned model gives the tokens of the stock model."""

import random

import pytest
import torch
from conftest import demo_shape, random_plan
from seeds import spread
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StaticCache,
    TextStreamer,
    pipeline,
)

TEXTS = ["Once upon a time there was a kind bear", "def count", "3 + 4 ="]
# On a GPU the stock model would compile itself for a static cache, and then round differently.
ALWAYS = {"pad_token_id": 2, "disable_compile": True}


@pytest.fixture
def planned(place):
    return place(random_plan(demo_shape(), random.Random(7), block_neurons=64))


@pytest.mark.parametrize(
    "arguments",
    spread(
        [
            {"do_sample": False},
            {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
            {"num_beams": 4, "num_return_sequences": 2},
            {"num_beams": 4, "do_sample": True},
            {"cache_implementation": "static"},
            {"cache_implementation": "static", "num_beams": 4},
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 4},
            {"prompt_lookup_num_tokens": 3},
            {"assistant_early_exit": 3},
        ],
        3,
    ),
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True], ids=["single", "left-padded"])
def test_decoding_methods_match_stock(planned, stock, device, arguments, padded):
    if padded and ("prompt_lookup_num_tokens" in arguments or "assistant_early_exit" in arguments):
        pytest.skip("transformers offers this for single sequences only")
    model, tokenizer = planned
    texts = TEXTS if padded else TEXTS[:1]
    encoded = tokenizer(texts, return_tensors="pt", padding=True).to(device)
    arguments = {**arguments, **ALWAYS, "max_new_tokens": 8 if padded else 12}
    expected = stock.generate(**encoded, seed=11, **arguments)
    torch.manual_seed(11)
    assert torch.equal(model.generate(**encoded, **arguments), expected)


@pytest.mark.parametrize("cache_class", ["dynamic", "static"])
def test_two_turns_over_the_callers_cache_match_stock(planned, stock, device, cache_class):
    planned_model, tokenizer = planned
    first = tokenizer(TEXTS[0], return_tensors="pt").to(device)["input_ids"]
    more = tokenizer(" Then", return_tensors="pt", add_special_tokens=False).to(device)
    outputs = []
    for model in (planned_model, stock.model):
        cache = DynamicCache(config=model.config)
        if cache_class == "static":
            cache = StaticCache(config=model.config, max_cache_len=128)
        arguments = {"past_key_values": cache, "max_new_tokens": 8, "do_sample": False, **ALWAYS}
        ids = model.generate(first, **arguments)
        ids = torch.cat([ids, more["input_ids"]], dim=1)
        outputs.append(model.generate(ids, **arguments))
    assert torch.equal(*outputs)


def test_streamed_text_matches_stock(planned, stock, device, capsys):
    planned_model, tokenizer = planned
    encoded = tokenizer(TEXTS[0], return_tensors="pt").to(device)
    printed = []
    for model in (planned_model, stock.model):
        streamer = TextStreamer(tokenizer)
        model.generate(**encoded, max_new_tokens=12, do_sample=False, streamer=streamer)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[0].startswith("<s>Once upon a time")


def test_pipeline_matches_stock(planned, stock):
    model, tokenizer = planned
    arguments = {"batch_size": 3, "max_new_tokens": 8, "do_sample": False}
    texts = [
        pipeline("text-generation", model=each, tokenizer=tokenizer)(TEXTS, **arguments)
        for each in (model, stock.model)
    ]
    assert texts[0] == texts[1]


def test_experts_are_not_in_the_state_dict(planned, stock):
    model, _ = planned
    dense = {name for name in stock.model.state_dict() if ".experts." not in name}
    assert dense == set(model.state_dict())
    with pytest.raises(NotImplementedError):
        model.save_pretrained("anywhere")


def test_positional_arguments_and_configured_beams_match_stock(planned, stock):
    """Only the model's own generation config asks for the beams."""
    planned_model, tokenizer = planned
    encoded = tokenizer(TEXTS[0], return_tensors="pt").to(planned_model.device)
    ids = encoded["input_ids"]
    mask = encoded["attention_mask"]
    config = GenerationConfig(max_new_tokens=4, pad_token_id=2)
    lengths = []
    outputs = []
    with planned_model.model.layers[0].register_forward_hook(
        lambda layer, _, output: lengths.append(output.shape[0])
    ):
        for model in (planned_model, stock.model):
            model.generation_config.num_beams = 3
            try:
                output = model.generate(ids, config, LogitsProcessorList(), attention_mask=mask)
            finally:
                model.generation_config.num_beams = None
            outputs.append(output)
    assert torch.equal(*outputs)
    assert lengths[0] == 1
