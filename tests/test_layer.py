"""A layer: the split of its blocks, its inputs, and its timeline."""

import random
import threading

import pytest
import torch
from conftest import DEMO, demo_shape, make_plan, random_plan

from fiddler_run import load_model
from fiddler_run.engine.calls import ExpertCalls, sorted_choices
from fiddler_run.engine.layer import ExpertsLayer
from fiddler_run.engine.timeline import Timeline
from fiddler_run.plan.split import fading, scale_odds

CPU = torch.device("cpu")


def split(share: float, host: list[int], tokens: int, seed: int = 0) -> ExpertCalls:
    blocks = [torch.empty(count, 6) for count in host]
    layer = ExpertsLayer(0, [torch.empty(0, 6)] * len(host), blocks, lambda _: share, None)
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(len(host), generator=generator)[:2] for _ in range(tokens)])
    return layer.split(sorted_choices(index.numpy(), torch.rand(tokens, 2).numpy(), len(host)))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.27, 0.5, 0.93, 1.0])
def test_layer_streams_its_share_to_half_a_block(share):
    rng = random.Random(1)
    for seed in range(200):
        calls = split(share, [rng.randint(0, 16) for _ in range(8)], rng.choice([1, 2, 9]), seed)
        assert abs(calls.num_streamed.sum() - share * calls.num_host.sum()) <= 0.5
        assert ((calls.num_streamed >= 0) & (calls.num_streamed <= calls.num_host)).all()
        assert (calls.num_on_cpu == calls.num_host - calls.num_streamed).all()


def test_odds_are_scaled_and_faded():
    assert scale_odds(0.3, 1.0) == 0.3
    assert scale_odds(0.5, 3.0) == pytest.approx(0.75)
    assert scale_odds(0.2, 4.0) == pytest.approx(0.5)
    assert scale_odds(0.0, 9.0) == 0.0
    assert scale_odds(1.0, 0.1) == 1.0
    assert [fading(2.0, tokens, 16) for tokens in (1, 4, 16)] == pytest.approx([2.0, 2**0.5, 1.0])
    assert fading(2.0, 99, 16) == 1.0


class Engine:
    """A stand-in engine that records the calls of its prefill path."""

    def __init__(self):
        self.timeline = Timeline(CPU)
        self.calls = None
        self.prefetched = []
        self.lock = threading.RLock()
        self.resources = self.decode = self.prefill = self

    def takes(self, tokens):
        return False

    def receive(self, *tensors):
        return tensors

    def run(self, calls, host_states, hidden_states, top_k_index, top_k_weights, next_runs):
        self.calls = calls
        self.prefetched = next_runs.counts if next_runs else []
        return hidden_states


@pytest.mark.parametrize(
    ("tokens", "odds", "streamed"), [(300, 3.0, 12), (300, 1.0, 8), (256, 3.0, 8)]
)
def test_prefill_odds_apply_to_long_prompts_only(tokens, odds, streamed):
    """Prefetched blocks have the same odds."""
    engine = Engine()
    nothing = [torch.empty(0, 6)] * 4
    blocks = [torch.zeros(16, 6)] * 4
    layers = [ExpertsLayer(n, nothing, blocks, lambda _: 0.5, engine) for n in range(2)]
    layers[0].next = layers[1]
    for layer in layers:
        layer.prefill_odds = odds
    index = torch.arange(2 * tokens).view(tokens, 2) % 4
    layers[0](torch.zeros(tokens, 2), index, torch.ones(tokens, 2))
    assert engine.calls.num_streamed.tolist() == [streamed] * 4
    expected = [streamed] * 4 if tokens > 256 else []
    assert engine.prefetched == expected


def test_layer_takes_strided_and_empty_states(device):
    model, _ = load_model(random_plan(demo_shape("bfloat16"), random.Random(4)), DEMO)
    layer = model.layers[0]
    states = torch.randn(128, 5, device=device).bfloat16().T
    index = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]], device=device).T
    weights = torch.rand(2, 5, device=device).T
    plain = layer(states.contiguous(), index.contiguous(), weights.contiguous())
    assert torch.equal(layer(states, index, weights), plain)
    assert layer(states[:0], index[:0], weights[:0]).shape == (0, 128)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_model_loaded_in_inference_mode_runs_outside_it(dtype, device):
    with torch.inference_mode():
        plan = make_plan(demo_shape(dtype), [[2] * 8] * 6, share={1: 0.5})
        model, tokenizer = load_model(plan, DEMO)
    with torch.no_grad():
        assert model(**tokenizer("Once", return_tensors="pt").to(device)).logits.isfinite().all()


def test_timeline_stops_recording_after_an_error():
    """Recording must not stay on: marking every span costs time."""
    timeline = Timeline(CPU)
    kept = []

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


def test_span_belongs_to_the_call_in_which_it_began():
    timeline = Timeline(CPU)
    with timeline.recording() as spans:
        timeline.enter(4)
        timeline.begin("CPU", "blocks")
        timeline.enter(5)
        timeline.end("CPU", "blocks")
    (span,) = spans
    assert (span.layer, span.call) == (4, 0)
