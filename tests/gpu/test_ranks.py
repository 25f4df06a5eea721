"""Two ranks, each with a GPU of its own, that exchange by NCCL."""

import random
import signal

import pytest
import torch
from conftest import DEMO, demo_shape, make_plan, with_rank
from ranks import shared_plan
from test_exactness import TEXTS, encode, greedy
from test_rank_failures import assert_one_line, started

if torch.cuda.device_count() < 2:
    pytest.skip("needs two CUDA devices", allow_module_level=True)

from fiddler_run import load_model
from fiddler_run.generation.perplexity import perplexity
from fiddler_run.plan.schema import Plan

TOLERANCE = 2e-2  # of logits of a whole model in bfloat16, relative


def two_ranks(dtype: str) -> Plan:
    plan = make_plan(demo_shape(dtype), [[3] * 8] * 6, share={1: 0.4}, threads=2)
    plan = shared_plan(with_rank(plan, cpu_pinned=False), 2, random.Random(1))
    ranks = [rank.model_copy(update={"cpu_threads": 2}) for rank in plan.ranks]
    return plan.model_copy(update={"ranks": ranks})


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_gpus_give_the_logits_of_one(dtype):
    """In bfloat16, layers take the decode path, and decode steps are CUDA graphs."""
    alone, tokenizer = load_model(make_plan(demo_shape(dtype), [[3] * 8] * 6), DEMO)
    encoded = encode(tokenizer, TEXTS[:1], alone.device)
    expected = alone(**encoded).logits
    tokens = alone.generate(**encoded, **greedy(16))
    ids = tokenizer(" ".join(TEXTS))["input_ids"]
    whole = perplexity(alone, tokenizer, ids)
    both, _ = load_model(two_ranks(dtype), DEMO)
    try:
        found = both(**encoded).logits
        again = both(**encoded).logits
        generated = both.generate(**encoded, **greedy(16))
        # recordings of two sizes in turn, with prompts in between
        several = encode(tokenizer, TEXTS[:3], both.device)
        both.generate(**several, **greedy(2))  # the cache grows
        turns = [
            [both.generate(**each, **greedy(16)) for each in (encoded, several)] for _ in range(2)
        ]
        assert all(map(torch.equal, *turns))
        shared = perplexity(both, tokenizer, ids)
        by_two = both.traffic()
    finally:
        both.peers.close()
    tolerance = 1e-4 if dtype == "float32" else TOLERANCE
    assert (found - expected).norm() <= tolerance * expected.norm()
    assert torch.equal(found, again)
    assert by_two.needed_blocks > 0
    assert shared.value == pytest.approx(whole.value, rel=1e-3)
    if dtype == "float32":
        assert torch.equal(generated, tokens)


@torch.no_grad()
def test_a_rank_without_a_gpu_gives_the_logits_of_one():
    """They exchange by gloo, through page-locked memory of the rank that has a GPU."""
    alone, tokenizer = load_model(make_plan(demo_shape(), [[3] * 8] * 6), DEMO)
    encoded = encode(tokenizer, TEXTS[:1], alone.device)
    expected = alone(**encoded).logits
    tokens = alone.generate(**encoded, **greedy(16))
    both, _ = load_model(without_second_gpu(two_ranks("float32")), DEMO)
    try:
        assert (both(**encoded).logits - expected).norm() <= 1e-4 * expected.norm()
        assert torch.equal(both.generate(**encoded, **greedy(16)), tokens)
    finally:
        both.peers.close()


def without_second_gpu(plan: Plan) -> Plan:
    """The plan with all blocks of rank 1 in host memory."""
    first, second = plan.ranks
    memory = second.gpu_memory_bytes
    host = {
        layer: [sum(counts) for counts in zip(second.resident_blocks[layer], row, strict=True)]
        for layer, row in second.host_blocks.items()
    }
    host_bytes = second.host_memory_bytes.experts + memory.experts
    update = {
        "gpu_memory_bytes": memory.model_copy(update=dict.fromkeys(type(memory).model_fields, 0)),
        "host_memory_bytes": second.host_memory_bytes.model_copy(update={"experts": host_bytes}),
        "stream_share": {1: 0.0},
        "resident_blocks": {layer: [0] * len(row) for layer, row in host.items()},
        "host_blocks": host,
    }
    return Plan.model_validate(
        {
            **plan.model_dump(),
            "ranks": [first.model_dump(), second.model_copy(update=update).model_dump()],
        }
    )


def test_a_killed_rank_ends_a_run_on_gpus(tmp_path):
    """Rank 0 then waits for its GPU, which waits for the other's."""
    plan_file = tmp_path / "plan.yaml"
    two_ranks("bfloat16").save(plan_file)
    run = started(plan_file)
    run.wait_for_output()
    run.kill_other()
    status, lines = run.end()
    assert status == 1, lines
    assert_one_line(lines, f"was ended by {signal.SIGKILL.name}")
