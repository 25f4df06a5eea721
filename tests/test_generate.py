"""transformers' `generate()` on a dispatched model: each way of decoding gives the stock model's tokens."""

import random

import pytest
import torch
from conftest import DEMO, demo_shape, random_plan
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MixtralForCausalLM,
    StaticCache,
    TextStreamer,
    pipeline,
)

from fiddler_run import load_model
from fiddler_run.errors import FiddlerError
from fiddler_run.generate import Options, check_length, generate, generate_ids

TEXTS = ["Once upon a time there was a kind bear", "def count", "3 + 4 ="]


@pytest.fixture(scope="module")
def models(device):
    dispatched, tokenizer = load_model(random_plan(demo_shape(), random.Random(7)), DEMO)
    return dispatched, MixtralForCausalLM.from_pretrained(DEMO, dtype=torch.float32).to(device).eval(), tokenizer


@pytest.mark.parametrize(
    "arguments",
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
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True], ids=["single", "left-padded"])
def test_ways_of_decoding(models, device, arguments, padded):
    if padded and ("prompt_lookup_num_tokens" in arguments or "assistant_early_exit" in arguments):
        pytest.skip("transformers offers this for single sequences only")
    dispatched, stock, tokenizer = models
    encoded = tokenizer(TEXTS if padded else TEXTS[:1], return_tensors="pt", padding=True).to(device)
    outputs = []
    for model in (dispatched, stock):
        torch.manual_seed(11)
        # On a GPU the stock model would compile itself for a static cache, and then round otherwise.
        outputs.append(model.generate(**encoded, max_new_tokens=32, pad_token_id=2, disable_compile=True, **arguments))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("cache_class", ["dynamic", "static"])
def test_a_cache_of_the_callers(models, device, cache_class):
    """Two turns over one cache."""
    dispatched, stock, tokenizer = models
    outputs = []
    for model in (dispatched, stock):
        cache = (
            DynamicCache(config=model.config) if cache_class == "dynamic" else StaticCache(config=model.config, max_cache_len=128)
        )
        ids = tokenizer(TEXTS[0], return_tensors="pt").to(device)["input_ids"]
        ids = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False, disable_compile=True)
        ids = torch.cat([ids, tokenizer(" Then", return_tensors="pt", add_special_tokens=False).to(device)["input_ids"]], dim=1)
        outputs.append(model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False, disable_compile=True))
    assert torch.equal(*outputs)


def test_prompts_longer_than_a_prefill_chunk(models, device):
    dispatched, stock, tokenizer = models
    prompt = "\n".join(TEXTS * 7)
    ids = tokenizer(prompt, return_tensors="pt").to(device)["input_ids"]
    assert ids.shape[1] > dispatched.plan.prefill_chunk_tokens
    tokens = stock.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    pieces = []
    generate(dispatched, tokenizer, prompt, Options(max_new_tokens=16), pieces.append)
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_streamer(models, device, capsys):
    dispatched, stock, tokenizer = models
    encoded = tokenizer(TEXTS[0], return_tensors="pt").to(device)
    printed = []
    for model in (dispatched, stock):
        model.generate(**encoded, max_new_tokens=20, do_sample=False, streamer=TextStreamer(tokenizer))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[0].startswith("<s>Once upon a time")


def test_pipeline(models):
    dispatched, stock, tokenizer = models
    texts = [
        pipeline("text-generation", model=model, tokenizer=tokenizer)(TEXTS, batch_size=3, max_new_tokens=12, do_sample=False)
        for model in (dispatched, stock)
    ]
    assert texts[0] == texts[1]


def test_experts_are_not_in_the_module(models):
    dispatched, stock, _ = models
    assert {name for name in stock.state_dict() if ".experts." not in name} == set(dispatched.state_dict())
    with pytest.raises(NotImplementedError):
        dispatched.save_pretrained("anywhere")


def test_measured(models):
    dispatched, _, tokenizer = models
    pieces = []
    measured = generate(dispatched, tokenizer, TEXTS[0], Options(max_new_tokens=24), pieces.append)
    text = "".join(pieces)
    assert len(text) > 20
    assert measured.output_tokens == 24
    assert measured.prompt_tokens == len(tokenizer(TEXTS[0])["input_ids"])
    assert measured.ttft_s > 0
    assert measured.decode_tokens_per_s > 0
    beams = []
    generate(dispatched, tokenizer, TEXTS[0], Options(max_new_tokens=24, num_beams=3), beams.append)
    assert len(beams) == 1


def test_the_hit_rate_is_that_of_decode(models):
    """Counted by hand from the router's choices of the generated tokens."""
    dispatched, _, tokenizer = models
    plan = dispatched.plan
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"].to(dispatched.device)
    measured = generate(dispatched, tokenizer, TEXTS[0], Options(max_new_tokens=6), lambda text: None)
    output = dispatched.generate(ids, max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        routers = dispatched(output[:, :-1], output_router_logits=True).router_logits
    decoded = range(ids.shape[1], output.shape[1] - 1)  # the tokens that went in after the prompt
    found = [
        plan.resident_blocks[layer][expert]
        for layer, logits in enumerate(routers)
        for token in decoded
        for expert in logits[token].topk(2).indices.tolist()
    ]
    assert measured.traffic.hit_rate == pytest.approx(sum(found) / (len(found) * plan.blocks_per_expert))


def test_room_for_sequences():
    """The GPU's memory was counted for so many; host memory holds more."""
    plan = random_plan(demo_shape(), random.Random(1))  # 4 beams
    plan = plan.model_copy(update={"workload": plan.workload.model_copy(update={"batch_size": 2})})
    for beams, batch, words in ((8, 2, "--num-beams 8 needs"), (1, 3, "--batch-size 3 needs"), (4, 2, None), (8, 1, None)):
        options = Options(max_new_tokens=4, num_beams=beams)
        if words is None:
            check_length(8, options, plan, batch)
            continue
        with pytest.raises(FiddlerError, match=f"{words} more GPU memory than the plan gives to .; plan again with --"):
            check_length(8, options, plan, batch)
        check_length(8, options, plan.model_copy(update={"device": "host"}), batch)


@pytest.mark.parametrize(("batch", "beams"), [(1, 2), (1, 4), (1, 16), (2, 4), (4, 1), (16, 1)])
def test_batches_and_beams(models, batch, beams):
    """In one cache after the other way of decoding, and on prompts that are padded and that are not; then cut into chunks."""
    dispatched, stock, tokenizer = models
    encoded = tokenizer((TEXTS * 6)[:batch], return_tensors="pt", padding=True).to(dispatched.device)
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    expected = stock.generate(ids, attention_mask=mask, num_beams=beams, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    whole, chunked = dispatched.plan, dispatched.plan.model_copy(update={"prefill_chunk_tokens": 3})
    for plan in (whole, chunked):
        dispatched.plan = plan
        output, measured = generate_ids(
            dispatched, ids, Options(max_new_tokens=24, num_beams=beams), attention_mask=mask, min_new_tokens=24
        )
        assert torch.equal(output, expected)
        assert (measured.prompt_tokens, measured.output_tokens) == (ids.shape[1], 24)
    dispatched.plan = whole


def test_other_ways_to_call_generate(models):
    """Arguments by position; beams that only the model's own generation config asks for."""
    dispatched, stock, tokenizer = models
    encoded = tokenizer(TEXTS[0], return_tensors="pt").to(dispatched.device)
    lengths, outputs = [], []
    with dispatched.model.layers[0].register_forward_hook(lambda layer, _, output: lengths.append(output.shape[0])):
        for model in (dispatched, stock):
            model.generation_config.num_beams = 3
            try:
                config = GenerationConfig(max_new_tokens=4, pad_token_id=2)
                outputs.append(
                    model.generate(encoded["input_ids"], config, LogitsProcessorList(), attention_mask=encoded["attention_mask"])
                )
            finally:
                model.generation_config.num_beams = None
    assert torch.equal(*outputs)
    assert lengths[0] == 1


def test_seed(models):
    dispatched, _, tokenizer = models

    def sample(seed: int) -> str:
        pieces = []
        generate(dispatched, tokenizer, "3 + 4 =", Options(max_new_tokens=24, temperature=1.5, seed=seed), pieces.append)
        return "".join(pieces)

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (" \n", Options(max_new_tokens=4), "the prompt is empty"),
        ("Once " * 300, Options(max_new_tokens=4), "more than the plan's context of 256"),
        ("Once", Options(max_new_tokens=256), "more than the plan's context of 256"),
        ("Once", Options(max_new_tokens=4, chat=True), "no chat template"),
        (
            "Once",
            Options(max_new_tokens=4, num_beams=9),
            "--num-beams 9 needs more GPU memory than the plan gives to 4; plan again",
        ),
        ("caf\udce9", Options(max_new_tokens=4), "not UTF-8 text"),
    ],
)
def test_prompts_that_do_not_fit(models, prompt, options, message):
    dispatched, _, tokenizer = models
    with pytest.raises(FiddlerError, match=message):
        generate(dispatched, tokenizer, prompt, options, lambda text: None)


def test_chat_template(models):
    dispatched, _, tokenizer = models
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} Once upon a time{% endfor %}"
    try:
        pieces = []
        measured = generate(dispatched, tokenizer, "A story!", Options(max_new_tokens=8, chat=True), pieces.append)
    finally:
        tokenizer.chat_template = None
    expected = len(tokenizer("A story! Once upon a time", add_special_tokens=False)["input_ids"])
    assert measured.prompt_tokens == expected


def test_long_prompts_are_cut_as_the_plan_says(models):
    """By whoever calls `generate()`, unless it is told otherwise."""
    dispatched, stock, tokenizer = models
    encoded = tokenizer(TEXTS[0], return_tensors="pt").to(dispatched.device)
    whole = dispatched.plan
    dispatched.plan = whole.model_copy(update={"prefill_chunk_tokens": 4})
    lengths = []
    try:
        with dispatched.model.layers[0].register_forward_hook(lambda layer, inputs, output: lengths.append(output.shape[1])):
            for arguments in ({}, {"prefill_chunk_size": 5}):
                output = dispatched.generate(**encoded, max_new_tokens=2, min_new_tokens=2, do_sample=False, **arguments)
                assert torch.equal(output, stock.generate(**encoded, max_new_tokens=2, min_new_tokens=2, do_sample=False))
    finally:
        dispatched.plan = whole
    tokens = encoded["input_ids"].shape[1]  # of one sequence, as planned
    chunks = [[size] * (tokens // size) + [tokens % size] * bool(tokens % size) for size in (4, 5)]
    assert lengths == [*chunks[0], 1, *chunks[1], 1]


def test_beams_share_their_prompt(models):
    """It passes the layers once, in the plan's chunks, and its last token for each beam; sampled continuations as well."""
    dispatched, stock, tokenizer = models
    encoded = tokenizer(TEXTS, return_tensors="pt", padding=True).to(dispatched.device)
    prompts, tokens = encoded["input_ids"].shape
    for arguments in ({"num_beams": 4, "do_sample": False}, {"num_return_sequences": 4, "do_sample": True}):
        shapes = []
        with dispatched.model.layers[0].register_forward_hook(
            lambda layer, _, output, to=shapes: to.append(tuple(output.shape[:2]))
        ):
            torch.manual_seed(5)
            output = dispatched.generate(**encoded, max_new_tokens=3, min_new_tokens=3, pad_token_id=2, **arguments)
        assert shapes == [(prompts, tokens - 1), (4 * prompts, 1), (4 * prompts, 1), (4 * prompts, 1)]
        torch.manual_seed(5)
        assert torch.equal(output, stock.generate(**encoded, max_new_tokens=3, min_new_tokens=3, pad_token_id=2, **arguments))


def test_more_rows_pass_in_smaller_chunks(models):
    """So that no more tokens than planned are in the layers at once, where each beam takes the prompt by itself."""
    dispatched, stock, tokenizer = models
    encoded = tokenizer(TEXTS[:2], return_tensors="pt", padding=True).to(dispatched.device)
    whole, sizes = dispatched.plan, []
    dispatched.plan = whole.model_copy(update={"prefill_chunk_tokens": 12})
    arguments = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "pad_token_id": 2}
    try:
        with dispatched.model.layers[0].register_forward_hook(lambda layer, _, output: sizes.append(output.shape[:2].numel())):
            for more in ({}, {"num_beams": 2, "return_dict_in_generate": True}):
                output = dispatched.generate(**encoded, **arguments, **more)
                expected = stock.generate(**encoded, **arguments, **more)
                assert torch.equal(getattr(output, "sequences", output), getattr(expected, "sequences", expected))
    finally:
        dispatched.plan = whole
    assert max(sizes) == 12
