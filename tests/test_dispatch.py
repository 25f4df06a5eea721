"""How a layer divides its experts' blocks, and what becomes of memory and devices around it."""

import gc
import random
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEMO, demo_shape, make_plan, random_plan

from fiddler_run import load_model
from fiddler_run.arena import Arena, ExpertStore
from fiddler_run.checkpoint import Checkpoint
from fiddler_run.dispatch import Expert, ExpertCall, LayerDispatch, expert_groups
from fiddler_run.errors import FiddlerError
from fiddler_run.executors import _takes_long
from fiddler_run.load import _warm_up
from fiddler_run.staging import StagedBlocks
from fiddler_run.timeline import Timeline
from fiddler_run.transfer import StagingRing

CPU = torch.device("cpu")


def split(share: float, absent: list[int], tokens: int, seed: int = 0):
    blocks = [torch.empty(count, 6) for count in absent]
    dispatch = LayerDispatch(0, [torch.empty(0, 6)] * len(absent), blocks, lambda _: share, None)
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(len(absent), generator=generator)[:2] for _ in range(tokens)])
    groups = expert_groups(index.numpy(), torch.rand(tokens, 2).numpy(), len(absent))
    return dispatch._split(groups)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.27, 0.5, 0.93, 1.0])
def test_a_layer_streams_its_share_to_half_a_block(share):
    rng = random.Random(1)
    for seed in range(200):
        calls = split(share, [rng.randint(0, 16) for _ in range(8)], rng.choice([1, 2, 9]), seed)
        streamed, absent = sum(call.num_streamed for call in calls), sum(call.expert.num_absent for call in calls)
        assert abs(streamed - share * absent) <= 0.5
        assert all(0 <= call.num_streamed <= call.expert.num_absent for call in calls)


@pytest.mark.parametrize(("tokens", "favour", "streamed"), [(300, 3.0, 12), (300, 1.0, 8), (256, 3.0, 8)])
def test_long_prompts_may_be_divided_otherwise(tokens, favour, streamed):
    """Also what is copied ahead of them."""
    nothing, blocks = [torch.empty(0, 6)] * 4, [torch.zeros(16, 6)] * 4
    layer, following = (LayerDispatch(number, nothing, blocks, lambda _: 0.5, Executors()) for number in range(2))
    layer.next = following
    layer.prompts_favour_link = following.prompts_favour_link = favour
    layer(torch.zeros(tokens, 2), torch.arange(2 * tokens).view(tokens, 2) % 4, torch.ones(tokens, 2))
    given, ahead = layer.executors.given, layer.executors.ahead
    assert [call.num_streamed for call in given] == [streamed] * 4
    assert [call.num_streamed for call in ahead] == ([streamed] * 4 if tokens > 256 else [])


class Executors:
    """Note what they are given."""

    def __init__(self):
        self.timeline, self.given, self.ahead = Timeline(CPU), [], []
        self.lock = threading.RLock()

    def routes(self, tokens):
        return False

    def receive(self, *tensors):
        return tensors

    def run(self, calls, host_states, hidden_states, top_k_index, top_k_weights):
        self.given = calls
        return hidden_states

    def stream_ahead(self, calls):
        self.ahead = calls


def test_streamed_blocks_are_computed_before_resident_ones():
    """Which makes room for the next copy; later they take turns."""
    done, ring = [], StagingRing(4, 6, torch.float32, CPU)
    resident, absent = torch.full((1, 6), 1.0), torch.full((5, 6), 2.0)
    rows, weights = np.arange(3), np.ones(3, dtype=np.float32)
    calls = [ExpertCall(Expert(resident, absent, absent[:0]), 3 * number, rows, weights, 5) for number in range(2)]

    def apply(blocks: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        done.append((int(blocks[0, 0]), len(blocks)))
        return blocks.sum() * states

    staged, states = StagedBlocks(ring, apply, Timeline(CPU)), torch.ones(3, 2)
    output = staged.compute(calls, states, torch.tensor([[0, 1]] * 3), torch.ones(3, 2))
    assert done == [(2, 2), (1, 1), (2, 2), (1, 1), (2, 1), (2, 2), (2, 2), (2, 1)]
    assert torch.equal(output, torch.full((3, 2), 2 * 6 * (1.0 + 5 * 2.0)))


def test_a_model_that_goes_gives_its_memory_back():
    model, tokenizer = load_model(random_plan(demo_shape("bfloat16"), random.Random(2)), DEMO)
    with torch.no_grad():
        model(**tokenizer("Once", return_tensors="pt").to(model.device))
    arena = weakref.ref(model.store._host_arena)
    del model
    gc.collect()
    assert arena() is None


def test_loading_can_be_interrupted():
    plan = make_plan(demo_shape("bfloat16"), [[0] * 8] * 6)
    checkpoint, read = Checkpoint.of_experts(DEMO, plan.model), []

    class Counting:
        def expert(self, layer, expert):
            read.append((layer, expert))
            time.sleep(0.01)
            return checkpoint.expert(layer, expert)

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ExpertStore(plan, CPU, Path()).load(Counting(), interrupt)
    assert len(read) < 48


def test_a_converted_model_is_refused(device):
    model, tokenizer = load_model(random_plan(demo_shape("bfloat16"), random.Random(3)), DEMO)
    for convert in (model.float, model.half, model.double, lambda: model.to(torch.float32)):
        with pytest.raises(FiddlerError, match=r"the experts are bfloat16 and stay so; for torch.float"):
            convert()
    with pytest.raises(FiddlerError, match="a loaded model stays where its plan has put it"):
        model.to("meta")
    model.bfloat16()
    model.to(device)
    assert model(**tokenizer("Once", return_tensors="pt").to(device)).logits.isfinite().all()


def test_strided_states_and_no_states(device):
    model, _ = load_model(random_plan(demo_shape("bfloat16"), random.Random(4)), DEMO)
    experts = model.experts_modules()[0]
    states = torch.randn(128, 5, device=device).bfloat16().T
    index, weights = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]], device=device).T, torch.rand(2, 5, device=device).T
    plain = experts.dispatch(states.contiguous(), index.contiguous(), weights.contiguous())
    assert torch.equal(experts.dispatch(states, index, weights), plain)
    assert experts.dispatch(states[:0], index[:0], weights[:0]).shape == (0, 128)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loaded_in_inference_mode_it_runs_outside(dtype, device):
    with torch.inference_mode():
        model, tokenizer = load_model(make_plan(demo_shape(dtype), [[2] * 8] * 6, share={1: 0.5}), DEMO)
    with torch.no_grad():
        assert model(**tokenizer("Once", return_tensors="pt").to(device)).logits.isfinite().all()


def test_without_huge_pages_there_is_still_memory(monkeypatch):
    monkeypatch.setattr("fiddler_run.arena.mmap.MADV_HUGEPAGE", -1, raising=False)
    assert Arena(2, 10, torch.float32, CPU).blocks.shape == (2, 10)


def test_a_timeline_does_not_stay_on():
    """Whatever happens while it records: marking every span costs time."""
    timeline, kept = Timeline(CPU), []

    def record() -> None:
        with timeline.recording() as spans:
            kept.append(spans)
            timeline.begin("CPU", "blocks")
            timeline.end("CPU", "blocks")
            raise KeyError

    with pytest.raises(KeyError):
        record()
    assert not timeline.on
    assert [len(spans) for spans in kept] == [1]


def test_a_model_of_the_shortest_context_is_warmed_up():
    """One token in, one out."""
    plan = make_plan(demo_shape("bfloat16"), [[4] * 8] * 6)
    workload = plan.workload.model_copy(update={"prompt_tokens": 1, "output_tokens": 1, "max_seq_len": 2, "num_beams": 1})
    model, _ = load_model(plan.model_copy(update={"workload": workload}), DEMO)
    _warm_up(model)
    assert model.executors.traffic.needed_blocks > 0


def test_a_span_belongs_to_the_call_in_which_it_began():
    timeline = Timeline(CPU)
    with timeline.recording() as spans:
        timeline.enter(4)
        timeline.begin("CPU", "blocks")
        timeline.enter(5)
        timeline.end("CPU", "blocks")
    (span,) = spans
    assert (span.layer, span.call) == (4, 0)


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
def test_a_ring_gives_what_is_asked_for_whatever_was_copied_ahead(slots):
    rng = random.Random(slots)
    blocks = torch.arange(60.0).view(20, 3).bfloat16()
    ring, timeline = StagingRing(slots, 3, torch.bfloat16, CPU), Timeline(CPU)
    assert 1 <= ring.at_once <= slots

    def pieces() -> list[torch.Tensor]:
        starts = [rng.randrange(20 - ring.at_once) for _ in range(rng.randint(1, 6))]
        return [blocks[start : start + rng.randint(1, ring.at_once)] for start in starts]

    for _ in range(200):
        asked = pieces()
        if rng.random() < 0.8:
            longer = [blocks[piece.storage_offset() // 3 :][: ring.at_once] for piece in asked]
            ring.stream_ahead(rng.choice([asked, longer, asked[1:], pieces()]), timeline)
        found = []
        for arriving in ring.stream(asked, timeline):
            with arriving as staged:
                found.append(staged.clone())
        assert all(torch.equal(*pair) for pair in zip(found, asked, strict=True))


def test_how_long_a_gpu_may_wait():
    """By what the CPU has to do in all, in tokens times experts."""

    def call(tokens: int, resident: int, absent: int, streamed: int, on_disk: int = 0) -> ExpertCall:
        expert = Expert(*(torch.empty(count, 6) for count in (resident, absent, on_disk)))
        return ExpertCall(expert, 0, np.zeros(tokens, dtype=np.int64), np.zeros(tokens, dtype=np.float32), streamed)

    assert not _takes_long([call(512, 0, 4, 0)])
    assert _takes_long([call(513, 0, 4, 0)])
    assert not _takes_long([call(2000, 3, 13, 10)])
    assert _takes_long([call(100, 0, 4, 0)] * 6)
    assert not _takes_long([call(10**6, 4, 0, 0), call(10**6, 0, 4, 4)])
    assert _takes_long([call(1, 3, 0, 0, on_disk=1)])


def test_a_ring_goes_on_after_an_error():
    blocks = torch.arange(60.0).view(20, 3).bfloat16()
    ring, timeline = StagingRing(4, 3, torch.bfloat16, CPU), Timeline(CPU)
    pieces = list(blocks.split(2))

    def staged(stop: int | None = None) -> torch.Tensor:
        found = []
        for number, arriving in enumerate(ring.stream(pieces, timeline)):
            with arriving as piece:
                if number == stop:
                    raise KeyboardInterrupt
                found.append(piece.clone())
        return torch.cat(found)

    for stop in range(len(pieces)):
        with pytest.raises(KeyboardInterrupt):
            staged(stop)
        assert torch.equal(staged(), blocks)
