"""Recorded routing matches stock transformers: every token once per layer, by phase."""

from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import DEMO, demo_shape, make_plan
from planning import small_model
from seeds import spread
from transformers import AutoTokenizer, MixtralForCausalLM

from fiddler_opt.inputs.routing import Routing
from fiddler_opt.inputs.routing_profile import RoutingProfile
from fiddler_opt.measure.prompts import encode_prompts
from fiddler_opt.measure.routing import RoutingJob, RoutingRecorder, RoutingTrace, routing_profile
from fiddler_run import load_model
from fiddler_run.errors import FiddlerError

PROMPTS = {
    "stories.txt": [
        "Once upon a time there was a fox.",
        "Long ago there was a curious bear named Pip. " * 8,
    ],
    "code.jsonl": ["12 + 30 = 42", "def add(a, b):\n    return a + b", "x = 1\n" * 48],
}
SHAPE = demo_shape()
OUTPUT_TOKENS = 40
MAX_SEQ_LEN = 256
PAIRS = list(combinations(range(8), 2))


@pytest.fixture(scope="module")
def model():
    return load_model(make_plan(SHAPE, [[3] * 8] * 6), DEMO)[0]


@pytest.fixture(scope="module")
def job() -> RoutingJob:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    sets = {
        name: encode_prompts(tokenizer, prompts, MAX_SEQ_LEN, name)
        for name, prompts in PROMPTS.items()
    }
    return RoutingJob(SHAPE, sets, OUTPUT_TOKENS, MAX_SEQ_LEN)


@pytest.fixture(scope="module")
def trace(model, job) -> RoutingTrace:
    recorder = RoutingRecorder(job)
    assert list(recorder.run(model)) == [1, 2, 3, 4, 5]
    return recorder.trace()


@pytest.fixture(scope="module")
def profile(trace) -> RoutingProfile:
    return routing_profile(trace, SHAPE, "test", OUTPUT_TOKENS)


def stock_counts(stock: MixtralForCausalLM, prompts: list[list[int]]) -> dict[str, dict]:
    """One set's counts by stock transformers.

    It generates the continuation, then routes prompt and continuation in one forward pass.
    """

    def rows(length: int) -> dict[int, list[int]]:
        return {layer: [0] * length for layer in range(6)}

    phases = {
        phase: {
            "tokens": 0,
            "followers": 0,
            "activations": rows(8),
            "pairs": rows(len(PAIRS)),
            "reuse": rows(8),
        }
        for phase in ("prefill", "decode")
    }
    for ids in prompts:
        new = min(OUTPUT_TOKENS, MAX_SEQ_LEN - len(ids))
        with torch.no_grad():
            output = stock.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=new)
            routers = stock(output[:, :-1], output_router_logits=True).router_logits
        for position in range(output.shape[1] - 1):
            counts = phases["prefill" if position < len(ids) else "decode"]
            counts["tokens"] += 1
            counts["followers"] += position > 0
            for layer, logits in enumerate(routers):
                chosen = sorted(logits[position].topk(2).indices.tolist())
                before = logits[position - 1].topk(2).indices.tolist() if position > 0 else []
                counts["pairs"][layer][PAIRS.index(tuple(chosen))] += 1
                for expert in chosen:
                    counts["activations"][layer][expert] += 1
                    counts["reuse"][layer][expert] += expert in before
    return {"prompts": len(prompts), **phases}


def test_counts_match_stock_transformers(profile, job):
    stock = MixtralForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    lengths = [len(ids) for prompts in job.sets.values() for ids in prompts]
    assert any(length > 128 for length in lengths)  # prefilled in two chunks
    # the context limit ends this continuation
    assert any(length > MAX_SEQ_LEN - OUTPUT_TOKENS for length in lengths)
    found = profile.model_dump()["sets"]
    assert found == {name: stock_counts(stock, prompts) for name, prompts in job.sets.items()}
    assert all(part["decode"]["tokens"] > 40 for part in found.values())


@pytest.mark.parametrize("done", spread([4, 1], 1))
def test_recording_resumes_where_it_stopped(model, job, trace, tmp_path, done):
    file = tmp_path / "part.npz"
    first = RoutingRecorder(job)
    for so_far in first.run(model):
        if so_far == done:
            first.trace().save(file)
            break
    second = RoutingRecorder(job, job.resume(file))
    assert second.done == done
    assert list(second.run(model)) == list(range(done + 1, 6))
    second.trace().save(file)
    trace.save(tmp_path / "whole.npz")
    assert file.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert RoutingJob(SHAPE, job.sets, OUTPUT_TOKENS + 1, MAX_SEQ_LEN).resume(file) is None
    assert job.resume(tmp_path / "none.npz") is None


def test_saved_trace_gives_the_same_counts(trace, profile, tmp_path):
    trace.save(tmp_path / "trace.npz")
    loaded = RoutingTrace.load(tmp_path / "trace.npz")
    assert routing_profile(loaded, SHAPE, "test", OUTPUT_TOKENS) == profile
    assert (loaded.experts.dtype, loaded.experts.shape[1:]) == (np.uint8, (6, 2))
    assert loaded.set_names == list(PROMPTS)


def test_counts_of_one_to_three_experts_per_token():
    """Three tokens, the last two of one sequence, that choose 1 to 3 of 4 experts in a layer."""
    for experts, pairs, reuse in (
        ([[0], [3], [3]], {}, [0, 0, 0, 1]),
        ([[2, 0], [1, 0], [0, 1]], {0: [2, 1, 0, 0, 0, 0]}, [1, 1, 0, 0]),
        ([[2, 0, 1], [3, 1, 0], [1, 2, 3]], {}, [0, 1, 0, 1]),  # pairs need two experts
    ):
        top_k = len(experts[0])
        shape = SHAPE.model_copy(
            update={"num_layers": 1, "num_experts": 4, "num_experts_per_tok": top_k}
        )
        trace = RoutingTrace(
            experts=np.array(experts, dtype=np.uint8)[:, None, :],
            prompt=np.array([0, 1, 1], dtype=np.int32),
            decode=np.array([False, False, False]),
            prompt_sets=np.array([0, 0], dtype=np.int32),
            set_names=["set"],
            fingerprint="",
        )
        part = routing_profile(trace, shape, "test", 1).sets["set"]
        chosen = [sum(expert in row for row in experts) for expert in range(4)]
        assert part.prefill.model_dump() == {
            "tokens": 3,
            "followers": 1,
            "activations": {0: chosen},
            "pairs": pairs,
            "reuse": {0: reuse},
        }
        assert part.decode.tokens == 0


def test_hooks_are_removed_after_an_interrupt(model, job, monkeypatch):
    def fails(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(model.lm_head, "forward", fails)
    recorder = RoutingRecorder(job)
    with pytest.raises(KeyboardInterrupt):
        next(recorder.run(model))
    assert recorder.done == len(recorder.trace().experts) == 0
    assert not any(module._forward_pre_hooks for module in model.experts_modules())


def test_other_files_are_refused(trace, tmp_path):
    file = tmp_path / "t.npz"
    trace.save(file)
    whole = file.read_bytes()
    middle = len(whole) // 2
    np.savez(tmp_path / "other.npz", experts=trace.experts)
    np.save(tmp_path / "single.npy", trace.experts)
    RoutingTrace(**{**vars(trace), "prompt": trace.prompt + 1}).save(file)
    contents = {
        "empty": b"",
        "cut": whole[:middle],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
        "text": b"version: 2\n",
        "another archive": (tmp_path / "other.npz").read_bytes(),
        "an array": (tmp_path / "single.npy").read_bytes(),
        "inconsistent arrays": file.read_bytes(),
    }
    for name, content in contents.items():
        file.write_bytes(content)
        with pytest.raises(
            FiddlerError, match="t.npz: not a routing trace: .+; remove it, and record one with"
        ) as caught:
            RoutingTrace.load(file)
        assert "\n" not in str(caught.value), name
    with pytest.raises(FiddlerError, match="none.npz: cannot read: No such file"):
        RoutingTrace.load(tmp_path / "none.npz")


def test_decode_routing_defaults_to_prefill_routing(model):
    recorder = RoutingRecorder(
        RoutingJob(SHAPE, {"p": [[5, 6, 7]]}, output_tokens=1, max_seq_len=4)
    )
    list(recorder.run(model))
    profile = routing_profile(recorder.trace(), SHAPE, "test", 1)
    assert (profile.sets["p"].prefill.tokens, profile.sets["p"].decode.tokens) == (3, 0)
    assert RoutingProfile.parse(profile.dump(), "here") == profile
    routing = Routing.from_profile(profile, small_model(num_layers=6, num_experts=8), "file")
    assert routing.decode == routing.prefill
