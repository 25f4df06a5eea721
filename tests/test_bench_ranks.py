"""Benchmarks of a plan of several ranks, and the timelines of all of them."""

import random
from types import SimpleNamespace

import pytest
import torch
from conftest import DEMO, demo_shape, random_plan
from ranks import in_ranks, random_shared_plan
from test_exactness import TEXTS, encode, greedy

from fiddler_run import load_model
from fiddler_run.engine.timeline import Timeline, Work
from fiddler_run.errors import FiddlerError
from fiddler_run.generation.bench import bench, recording
from fiddler_run.generation.report import rates


@pytest.fixture(scope="module")
def loaded():
    return load_model(random_plan(demo_shape(), random.Random(0)))


def test_bench_times_each_rank(loaded):
    model, _ = loaded
    plan = random_shared_plan(demo_shape(), 5, 2)
    with in_ranks(model, plan, DEMO):
        result, spans = bench(model, prompt_tokens=12, output_tokens=4)
    measured = result.measured
    assert measured.traffic.needed_blocks == 3 * 6 * 2 * plan.blocks_per_expert
    assert all(each.needed_blocks > 0 for each in measured.traffic_by_rank)
    assert len(measured.traffic_by_rank) == len(spans) == 2
    own, other = spans
    assert {span.call for span in own} == {span.call for span in other} == set(range(6 * 4))
    assert result.decode.ms["exchange"] > 0
    assert [each.tokens_per_expert for each in result.other_ranks] == [1]
    assert all(rate > 0 for rate in result.other_ranks[0].bytes_per_s.values())
    shown = [str(cell) for cell in rates(plan, result).columns[0].cells]
    assert {cell.split(":")[0] for cell in shown} == {"rank 0", "rank 1"}
    # by the same clock, rank 0 has a layer's sum only after rank 1 has begun with it
    sums_s = {span.call: span.stop_s for span in own if span.name == Work.EXCHANGE}
    begun = [span for span in other if span.name == Work.RESIDENT]
    assert begun
    assert all(span.start_s < sums_s[span.call] for span in begun)
    assert all(sums_s[span.call - 1] < span.start_s for span in begun if span.call)
    assert not [span for span in other if span.name == Work.DENSE]


def test_an_interrupted_bench_ends_by_its_interrupt():
    """Within a layer, it has also ended the other ranks, which can no longer be asked."""
    others = LostPeers()
    resources = SimpleNamespace(timeline=Timeline(torch.device("cpu")))
    model = SimpleNamespace(engine=SimpleNamespace(resources=resources), peers=others)
    with pytest.raises(KeyboardInterrupt), recording(model):
        others.interrupt()
    assert not resources.timeline.on


class LostPeers:
    """Peers that can be told anything, but can be asked only until they are lost."""

    lost = False

    def interrupt(self) -> None:
        self.lost = True
        raise KeyboardInterrupt

    def request(self, **message: object) -> int:
        if self.lost:
            raise FiddlerError("a layer was interrupted, so the ranks have ended")
        return 1

    def replies(self, request: int) -> list[dict]:
        return []

    def tell(self, **message: object) -> None:
        pass


def test_ranks_stop_recording_with_an_interrupted_bench(loaded):
    """Between two layers, after which a program may go on."""
    model, tokenizer = loaded
    encoded = encode(tokenizer, TEXTS[:1], model.device)
    with in_ranks(model, random_shared_plan(demo_shape(), 5, 2), DEMO):
        with pytest.raises(KeyboardInterrupt), recording(model):
            raise KeyboardInterrupt
        model.generate(**encoded, **greedy(2))
        with recording(model) as spans:
            model.generate(**encoded, **greedy(2))
    assert {span.call for span in spans[1]} == set(range(6 * 2))
