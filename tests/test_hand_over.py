"""Layers and whole models on the decode path, with a simulated GPU."""

import random

import pytest
import torch
from conftest import DEMO, demo_shape, make_plan
from hand_over import CPU, HIDDEN, Layer, make_engine
from stream import Stream, SynchronousStream
from transformers import DynamicCache

from fiddler_run import load_model
from fiddler_run.engine.calls import Traffic
from fiddler_run.engine.engine import ExpertEngine
from fiddler_run.engine.layer import ExpertsLayer
from fiddler_run.engine.timeline import Span, Work
from fiddler_run.engine.tuning import RouterSizes, measure_token
from fiddler_run.generation.model import PlannedModel
from fiddler_run.kernels.library import library
from fiddler_run.kernels.table import Kernels

if library() is None:
    pytest.skip("the kernel is not built", allow_module_level=True)


def _simulated(
    num_layers: int, seed: int
) -> tuple[Stream, tuple[ExpertEngine, ExpertEngine], list[Layer]]:
    """A simulated GPU; an engine without it, and one with it; and random layers."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    stream = Stream()
    layers = [Layer(rng, 0.4) for _ in range(num_layers)]
    for layer in layers:
        stream.by_address |= layer.by_address
    return stream, (make_engine(), make_engine(stream)), layers


def test_recorded_layers_take_the_jobs_of_their_step():
    """Whatever jobs came before: their numbers are not part of a recording."""
    stream, engines, layers = _simulated(4, seed=5)
    index = torch.stack([torch.randperm(6)[:2] for _ in range(3)])
    inputs = torch.randn(3, HIDDEN).bfloat16(), index, torch.rand(3, 2)
    for _ in range(3):
        layers[0].on(engines[1])(*inputs)
    found = []
    layers[0].on(engines[1]).begin_step()
    for number, layer in enumerate(layers, 1):
        output, before, after = layer.on(engines[1]).record(number, *inputs)
        before()  # as before and after the launch of a graph
        after()
        found.append(output)
    stream.finish()
    engines[1].resources.jobs.finish()
    assert engines[1].resources.jobs.last == 3 + 4
    for layer, got in zip(layers, found, strict=True):
        want = layer.on(engines[0])(*inputs).float()
        assert (got.float() - want).norm() <= 1e-2 * want.norm()


def test_python_queues_layers_ahead():
    """The next layer is queued while one is computed; results match the prefill path."""
    stream, engines, layers = _simulated(12, seed=4)
    index = [torch.stack([torch.randperm(6)[:2] for _ in range(3)]) for _ in layers]
    weights = torch.rand(3, 2)
    states = [torch.randn(3, HIDDEN).bfloat16() for _ in layers]

    def run(engine: ExpertEngine) -> tuple[list[torch.Tensor], Traffic, list[Span]]:
        resources = engine.resources
        resources.forget_traffic()
        with resources.timeline.recording() as spans:
            outputs = [
                layer.on(engine)(x, chosen, weights)
                for layer, x, chosen in zip(layers, states, index, strict=True)
            ]
            stream.finish()
            resources.jobs.finish()
        return outputs, resources.traffic, spans

    expected, traffic, _ = run(engines[0])
    for _ in range(3):
        found, same_traffic, spans = run(engines[1])
        assert same_traffic == traffic
        for got, want in zip(found, expected, strict=True):
            assert (got.float() - want.float()).norm() <= 1e-2 * want.float().norm()
        for work in (Work.ROUTER, Work.BLOCKS):
            assert [span.layer for span in spans if span.name == work] == [0] * 12
        assert all(span.stop_s >= span.start_s for span in spans)
    assert stream.max_pending >= 5  # one layer queues four


def test_interrupt_leaves_no_job_pending(monkeypatch):
    torch.manual_seed(5)
    stream = Stream()
    engine = make_engine(stream)
    layer = Layer(random.Random(5), 0.4, engine=engine)
    stream.by_address |= layer.by_address
    states = torch.randn(1, HIDDEN).bfloat16()
    index = torch.tensor([[0, 3]])
    weights = torch.rand(1, 2)
    for broken in ("publish_inputs", "wait_for_table", "expert_gemv", "wait", "combine"):
        with monkeypatch.context() as patch:

            def interrupt(*_):
                raise KeyboardInterrupt

            patch.setattr(stream, broken, interrupt)
            with pytest.raises(KeyboardInterrupt):
                layer.layer(states, index, weights)
            assert not len(engine.resources.jobs)
        found = [layer.layer(states, index, weights) for _ in range(2)]
        stream.finish()
        engine.resources.jobs.finish()
        assert torch.equal(*found)


def test_interrupted_wait_leaves_the_job_to_be_abandoned(monkeypatch):
    engine = make_engine()
    layer = Layer(random.Random(5), 0.4, engine=engine)
    cpu = engine.resources.kernels.cpu
    abandoned = []

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cpu, "abandon", abandoned.append)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            layer.layer(torch.randn(1, HIDDEN).bfloat16(), torch.tensor([[0, 3]]), torch.rand(1, 2))
    engine.resources.abandon()
    assert len(abandoned) == 1
    assert not len(engine.resources.jobs)


def test_measured_blocks_match_computed_blocks():
    torch.manual_seed(6)
    stream = Stream()
    engine = make_engine(stream)
    rng = random.Random(6)
    shares = (0.0, 0.2, 0.5, 0.8, 1.0)
    layers = [Layer(rng, share, engine=engine) for share in shares]
    for layer in layers:
        stream.by_address |= layer.by_address
    resources = engine.resources
    router = RouterSizes(num_experts=6, top_k=2, hidden_size=HIDDEN)
    for number in range(3):
        resources.forget_traffic()
        measured = measure_token([layer.layer for layer in layers], resources, router, number)
        traffic = resources.traffic
        assert sum(each.streamed for each in measured) == traffic.streamed_blocks > 0
        assert sum(each.on_cpu for each in measured) == traffic.cpu_blocks > 0
        assert all((each.cpu_s > 0) == (each.on_cpu > 0) for each in measured)
        assert all((each.link_s > 0) == (each.streamed > 0) for each in measured)
        assert all(each.both_s >= max(each.cpu_s, each.link_s) for each in measured)
    stream.finish()


def use_decode_path(model: PlannedModel, stream: Stream) -> ExpertEngine:
    """Moves a loaded model's layers to a new engine with these GPU kernels, and returns it."""
    cpu = model.engine.resources.kernels.cpu
    engine = ExpertEngine(model.plan.block_format, Kernels(cpu, stream, cpu.apply), CPU, 3)
    store = model.store
    share_at = model.plan.rank.stream_share_at
    for rows in (store.resident, store.host):
        blocks = [block for row in rows for expert in row for block in expert]
        stream.by_address |= {block.data_ptr(): block for block in blocks}
    places = zip(store.resident, store.host, strict=True)
    model.set_layers(
        [ExpertsLayer(number, *each, share_at, engine) for number, each in enumerate(places)]
    )
    return engine


def test_model_on_the_decode_path_matches_the_prefill_path():
    """In bfloat16, for every layer of every step."""
    plan = make_plan(demo_shape("bfloat16"), [[3] * 8] * 6, share={1: 0.4}, threads=2)
    model, tokenizer = load_model(plan, DEMO)
    text = "Once upon a time there was a brave owl named Ruby."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    ids = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=2)

    @torch.no_grad()
    def logits() -> torch.Tensor:
        return torch.cat([model(ids).logits, *one_by_one()], dim=1).float()

    def one_by_one() -> list[torch.Tensor]:
        cache = DynamicCache(config=model.config)
        return [
            model(input_ids=ids[:, n : n + 1], past_key_values=cache).logits
            for n in range(ids.shape[1])
        ]

    model.engine.resources.forget_traffic()
    expected = logits()
    needed = model.engine.resources.traffic.needed_blocks
    stream = SynchronousStream(delay_s=0.0, encoding=plan.block_format)
    engine = use_decode_path(model, stream)
    found = logits()
    engine.resources.jobs.finish()
    stream.thread.shutdown()
    traffic = engine.resources.traffic
    assert min(traffic.resident_blocks, traffic.streamed_blocks, traffic.cpu_blocks) > 0
    assert traffic.needed_blocks == pytest.approx(needed, rel=0.05)
    assert (found - expected).norm() <= 0.05 * expected.norm()
    same = (found.argmax(dim=-1) == expected.argmax(dim=-1)).float().mean()
    assert same > 0.95
