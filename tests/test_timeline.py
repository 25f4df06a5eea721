"""The spans of a timeline, phase times computed from them, and exported traces."""

import json

import pytest
import torch
from conftest import demo_shape, make_plan

from fiddler_run.engine.calls import Traffic
from fiddler_run.engine.timeline import Lane, Span, Timeline, write_trace
from fiddler_run.generation.phase_times import _rates, phase_times


def test_phase_times_by_hand():
    """Two layers with 10 s from router to router.

    The CPU works from 1 to 5, the link from 3 to 6, resident experts from 4 to 7, the exchange from
    6.5 to 7.5, the dense part from 8 to 10.
    """
    spans = [
        Span("Python", "wait for the router", 0, 0, -1.0, 0.0),
        Span("Python", "wait for the router", 1, 1, 9.0, 10.0),
        Span("CPU", "blocks", 0, 0, 1.0, 5.0),
        Span("link", "copy", 0, 0, 3.0, 4.0),
        Span("link", "copy", 0, 0, 3.5, 6.0),
        Span("GPU", "resident", 0, 0, 4.0, 7.0),
        Span("GPU", "exchange", 0, 0, 6.5, 7.5),
        Span("GPU", "dense", 0, 0, 8.0, 12.0),
    ]
    plan = make_plan(demo_shape().model_copy(update={"num_layers": 2}), [[4] * 8] * 2)
    traffic = Traffic(resident_blocks=12, streamed_blocks=6, cpu_blocks=14)
    whole = phase_times(plan, spans, [traffic], 25.0, 1, 2)
    of_one_layer = {"host": 5e3, "resident": 1e3, "exchange": 0.5e3, "dense": 3.5e3}
    of_two = {part: 2 * ms for part, ms in of_one_layer.items()} | {"head": 5e3}
    assert whole.ms == pytest.approx(of_two)
    at_work = {"CPU": 8e3, "link": 6e3, "resident": 6e3, "dense": 4e3, "streamed": 0.0, "idle": 3e3}
    assert whole.at_work_ms == pytest.approx(at_work)
    blocks_per_s = {"CPU": 14 / 4, "link": 6 / 3, "host": 20 / 5, "resident": 12 / 3}
    bytes_per_s = {name: rate * plan.block_bytes for name, rate in blocks_per_s.items()}
    assert whole.bytes_per_s == pytest.approx(bytes_per_s)
    assert whole.tokens_per_expert == 2 * 2 * 2 / (32 / 8)


def test_rates_are_those_of_the_rank():
    spans = [Span("CPU", "blocks", 0, 0, 0.0, 2.0), Span("CPU", "wait for the router", 0, 0, 0, 0)]
    plan = make_plan(demo_shape(), [[4] * 8] * 6)
    traffic = [Traffic(cpu_blocks=24), Traffic(cpu_blocks=8)]
    own, other = (phase_times(plan, spans, traffic, 1.0, 1, 1, rank) for rank in (0, 1))
    assert own.bytes_per_s["CPU"] == 24 * plan.block_bytes / 2
    assert other.bytes_per_s["CPU"] == 8 * plan.block_bytes / 2
    # one layer and token chose two experts, whose blocks are in both ranks
    called = (24 + 8) / plan.blocks_per_expert
    assert own.tokens_per_expert == other.tokens_per_expert == 2 / called


def test_blocks_read_in_place_give_no_resident_rate():
    """One kernel computes them with the resident blocks, which cannot be timed separately."""
    spans = [
        Span("CPU", "blocks", 0, 0, 0.0, 6.0),
        Span("link", "in place", 0, 0, 1.0, 5.0),
        Span("link", "in place", 0, 0, 7.0, 8.0),
    ]
    traffic = Traffic(resident_blocks=9, streamed_blocks=25, cpu_blocks=36)
    found = _rates(spans, traffic, block_bytes=10)
    assert found == {"link": 250 / 5, "CPU": 360 / 6, "host": 610 / 7}
    assert _rates([], traffic, block_bytes=10) == {}
    # Without a GPU, the CPU computes the resident blocks, too.
    assert _rates(spans[:1], traffic, block_bytes=10)["CPU"] == 450 / 6


def test_timeline_keeps_nothing_while_off():
    timeline = Timeline(torch.device("cpu"))
    timeline.begin("CPU", "blocks")
    with timeline.recording() as spans:
        timeline.end("CPU", "blocks")  # it began before
        timeline.enter(3)
        timeline.begin("CPU", "blocks")
        timeline.end("CPU", "blocks")
        timeline.begin("link", "copy")  # never ends
    (span,) = spans
    assert (span.lane, span.name, span.layer, span.call) == ("CPU", "blocks", 3, 0)
    assert 0 <= span.start_s <= span.stop_s


def test_trace_has_the_format_of_trace_viewers(tmp_path):
    spans = [[], [Span("link", "copy", 2, 9, 1e-3, 3e-3)]]
    write_trace(spans, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {
        (event["name"], event["pid"], event.get("tid")): event["args"]["name"]
        for event in events
        if event["ph"] == "M"
    }
    assert [names["thread_name", 1, row] for row in range(len(Lane))] == list(Lane)
    assert names["process_name", 1, None] == "rank 1"
    (copy,) = [event for event in events if event["ph"] == "X"]
    assert names["thread_name", copy["pid"], copy["tid"]] == "link"
    assert (copy["pid"], copy["name"], copy["ts"]) == (1, "copy", 1e3)
    assert copy["dur"] == pytest.approx(2e3)
