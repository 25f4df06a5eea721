"""`generate`: its measurements, its seed, and the prompts it refuses."""

import random

import pytest
import torch
from conftest import demo_shape, random_plan, with_rank

from fiddler_run.errors import FiddlerError
from fiddler_run.generation.answer import generate
from fiddler_run.generation.generate import check_length
from fiddler_run.generation.sampling import Options

TEXT = "Once upon a time there was a kind bear"


@pytest.fixture
def planned(place):
    return place(random_plan(demo_shape(), random.Random(7), block_neurons=64))


def test_generate_measures_a_prompt(planned):
    pieces = []
    measured = generate(*planned, TEXT, Options(max_new_tokens=24), pieces.append)
    assert len("".join(pieces)) > 20
    assert measured.output_tokens == 24
    assert measured.prompt_tokens == len(planned[1](TEXT)["input_ids"])
    assert measured.ttft_s > 0
    assert measured.decode_tokens_per_s > 0
    beams = []
    generate(*planned, TEXT, Options(max_new_tokens=12, num_beams=3), beams.append)
    assert len(beams) == 1


def test_hit_rate_covers_decode_only(planned):
    """The test counts the router's choices for the generated tokens."""
    model, tokenizer = planned
    plan = model.plan
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"].to(model.device)
    measured = generate(model, tokenizer, TEXT, Options(max_new_tokens=6), lambda text: None)
    output = model.generate(ids, max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        routers = model(output[:, :-1], output_router_logits=True).router_logits
    decoded = range(ids.shape[1], output.shape[1] - 1)  # the tokens fed in after the prompt
    found = [
        plan.rank.resident_blocks[layer][expert]
        for layer, logits in enumerate(routers)
        for token in decoded
        for expert in logits[token].topk(2).indices.tolist()
    ]
    hit_rate = sum(found) / (len(found) * plan.blocks_per_expert)
    assert measured.traffic.hit_rate == pytest.approx(hit_rate)


@pytest.mark.parametrize(
    ("beams", "batch", "words"),
    [
        (8, 2, "--num-beams 8 needs"),
        (1, 3, "--batch-size 3 needs"),
        (4, 2, None),
        (8, 1, None),
    ],
)
def test_more_sequences_than_planned_are_refused_on_a_gpu(beams, batch, words):
    """The plan counts GPU memory for 4 beams of 2 sequences; the CPU has no such limit."""
    plan = random_plan(demo_shape(), random.Random(1))
    plan = plan.model_copy(update={"workload": plan.workload.model_copy(update={"batch_size": 2})})
    options = Options(max_new_tokens=4, num_beams=beams)
    if words is None:
        check_length(8, options, plan, batch)
        return
    message = f"{words} more GPU memory than the plan reserves for .; plan again with --"
    with pytest.raises(FiddlerError, match=message):
        check_length(8, options, plan, batch)
    check_length(8, options, with_rank(plan, device="cpu"), batch)


def test_same_seed_gives_same_sample(planned):
    def sample(seed: int) -> str:
        pieces = []
        options = Options(max_new_tokens=12, temperature=1.5, seed=seed)
        generate(*planned, "3 + 4 =", options, pieces.append)
        return "".join(pieces)

    samples = {seed: sample(seed) for seed in range(3)}
    assert sample(1) == samples[1]
    assert len(set(samples.values())) > 1


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (" \n", Options(max_new_tokens=4), "the prompt is empty"),
        (
            "Once " * 300,
            Options(max_new_tokens=4),
            "no room for an answer in",
        ),
        ("Once", Options(max_new_tokens=256), "more than the plan's context of 256"),
        ("Once", Options(max_new_tokens=4, chat=True), "no chat template"),
        (
            "Once",
            Options(max_new_tokens=4, num_beams=9),
            "--num-beams 9 needs more GPU memory than the plan reserves for 4; plan again",
        ),
        ("caf\udce9", Options(max_new_tokens=4), "not UTF-8 text"),
    ],
)
def test_unsuitable_prompts_are_refused(planned, prompt, options, message):
    with pytest.raises(FiddlerError, match=message):
        generate(*planned, prompt, options, lambda text: None)


def test_chat_template_is_applied(planned):
    model, tokenizer = planned
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} Once upon a time{% endfor %}"
    )
    try:
        options = Options(max_new_tokens=8, chat=True)
        measured = generate(model, tokenizer, "A story!", options, lambda text: None)
    finally:
        tokenizer.chat_template = None
    expected = len(tokenizer("A story! Once upon a time", add_special_tokens=False)["input_ids"])
    assert measured.prompt_tokens == expected
