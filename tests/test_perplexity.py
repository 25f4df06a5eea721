"""Perplexity: that of the stock model, for every placement and encoding."""

import json
import math
import random

import pytest
import torch
import yaml
from conftest import DEMO, ROOT, demo_shape, random_plan
from ranks import in_ranks, shared_plan

from fiddler_opt.inputs.machine_parts import KernelLimits
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.workload import plan_workload
from fiddler_opt.solve.memory import activation_bytes, chunk_candidates
from fiddler_run import cli
from fiddler_run.encodings.lossless12 import Lossless12
from fiddler_run.errors import FiddlerError
from fiddler_run.generation.perplexity import HEAD_TOKENS, _windows, perplexity

LINES = (DEMO / "prompts" / "stories.jsonl").read_text().splitlines()
TEXT = "\n".join(json.loads(line)["prompt"] for line in LINES)


def encoded(tokenizer) -> list[int]:
    return tokenizer(TEXT)["input_ids"][:600]


def test_windows_cover_the_text_once():
    assert list(_windows([1, 5, 6, 7, 8, 9], 3, 1)) == [[1, 5, 6], [1, 7, 8], [1, 9]]
    assert list(_windows([5, 6, 7], 2, 1)) == [[5, 6]]  # a lone token is not predicted
    assert list(_windows([1], 3, 1)) == []


@pytest.mark.parametrize("chunk", [128, 50])
def test_matches_stock(place, stock, chunk):
    """In float32, whatever the placement and the chunk."""
    plan = random_plan(demo_shape(), random.Random(chunk), block_neurons=64)
    model, tokenizer = place(plan.model_copy(update={"prefill_chunk_tokens": chunk}))
    ids = encoded(tokenizer)
    losses = []
    for window in _windows(ids, plan.workload.max_seq_len, tokenizer.bos_token_id):
        inputs = torch.tensor([window], device=model.device)
        logits = stock.logits(inputs, torch.ones_like(inputs))[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, inputs[0, 1:], reduction="none"))
    nats = torch.cat(losses).double()
    found = perplexity(model, tokenizer, ids)
    assert found.value == pytest.approx(math.exp(nats.mean()), rel=1e-4)
    assert found.tokens == len(nats) == 599
    assert found.standard_error == pytest.approx(
        found.value * float(nats.std()) / math.sqrt(len(nats)), rel=1e-3
    )
    assert found.bits_per_byte == pytest.approx(
        float(nats.sum()) / math.log(2) / len(tokenizer.decode(ids[1:]).encode()), rel=1e-3
    )


def test_same_digits_in_both_encodings(place):
    """The weights are the same bits, and so are the results."""
    found = []
    for encoding in ["bf16", *(["lossless12"] if Lossless12.available() else [])]:
        plan = random_plan(demo_shape("bfloat16"), random.Random(4), 64, 1, encoding=encoding)
        model, tokenizer = place(plan)
        found.append(perplexity(model, tokenizer, encoded(tokenizer)))
    assert f"{found[0].value:.3f}" == f"{found[-1].value:.3f}"


def test_same_digits_in_two_ranks(place):
    plan = random_plan(demo_shape(), random.Random(6), block_neurons=64)
    model, tokenizer = place(plan)
    ids = encoded(tokenizer)[:200]
    alone = perplexity(model, tokenizer, ids)
    with in_ranks(model, shared_plan(plan, 2, random.Random(7)), DEMO):
        shared = perplexity(model, tokenizer, ids)
    assert f"{shared.value:.4f}" == f"{alone.value:.4f}"


@pytest.mark.parametrize("file", sorted((ROOT / "profiles").glob("*.model.yaml")))
def test_logits_fit_into_the_smallest_plan(file):
    """In bfloat16, in float32, and their softmax."""
    model = ModelSpec.load(yaml.safe_load(file.read_text())["model"]["name"])
    workload = plan_workload({}, model)
    smallest = min(chunk_candidates(workload))
    planned = activation_bytes(model, KernelLimits.of_runtime(), workload, smallest)
    assert HEAD_TOKENS * model.vocab_size * (2 + 4 + 4) <= planned


def test_bytes_are_those_of_the_whole_text(place):
    """Windows of 256 tokens end within characters of four bytes, of a token each."""
    model, tokenizer = place(random_plan(demo_shape(), random.Random(1), block_neurons=64))
    text = "\N{GRINNING FACE}" * 200
    found = perplexity(model, tokenizer, tokenizer(text)["input_ids"])
    assert found.windows > 1
    nats = math.log(found.value) * found.tokens
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-6)


@pytest.mark.parametrize(("factor", "outcome"), [(math.nan, None), (1e4, math.inf)])
def test_values_out_of_range_are_told(place, factor, outcome):
    model, tokenizer = place(random_plan(demo_shape(), random.Random(1), block_neurons=64))
    ids = encoded(tokenizer)[:20]
    weight = model.lm_head.weight
    before = weight.detach().clone()
    try:
        weight.data.mul_(factor)
        if outcome is None:
            with pytest.raises(FiddlerError, match="not numbers|NaN|nan"):
                perplexity(model, tokenizer, ids)
        else:
            assert perplexity(model, tokenizer, ids).value == outcome
    finally:
        weight.data.copy_(before)


def test_short_text_is_refused(place):
    model, tokenizer = place(random_plan(demo_shape(), random.Random(1), block_neurons=64))
    with pytest.raises(FiddlerError, match="fewer than two tokens"):
        perplexity(model, tokenizer, [1])


def test_command_prints_one_line(tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text(TEXT[:400])
    assert cli.main(["--plan", "plans/demo.yaml", "--perplexity", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("perplexity ")
    assert "bits per byte" in out
    with pytest.raises(SystemExit):
        cli.main(["--plan", "plans/demo.yaml", "--perplexity", str(file), "Once"])
