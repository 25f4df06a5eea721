"""Benchmarks of a plan: their figures add up, and they need no checkpoint."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import DEMO, demo_shape, make_plan
from test_commands import SHIPPED_PLAN, assert_refused, edited_plan, files_in, run

from fiddler_run import load_model
from fiddler_run.bench import _phase, _rates, bench
from fiddler_run.dispatch import Traffic
from fiddler_run.kernels.cpu import library
from fiddler_run.report import rates
from fiddler_run.timeline import LANES, Span, Timeline, write_trace


def test_figures_add_up():
    plan = make_plan(demo_shape("bfloat16"), [[4] * 8] * 6, share={1: 0.5})
    model, _ = load_model(plan, DEMO)
    result, spans = bench(model, prompt_tokens=12, output_tokens=7)
    blocks, steps = plan.blocks_per_expert, 6
    measured = result.measured
    assert (measured.prompt_tokens, measured.output_tokens) == (12, 7)
    assert measured.traffic.needed_blocks == steps * 6 * 2 * blocks  # layers, experts of a token
    assert measured.traffic.resident_blocks == steps * 6 * 2 * 4
    assert measured.traffic.streamed_blocks == measured.traffic.cpu_blocks == steps * 6 * 2 * 2
    assert measured.prefill_traffic.needed_blocks > 6 * 2 * blocks
    for phase in (result.prefill, result.decode):
        assert set(phase.ms) == {"absent", "resident", "dense", "head"}
        assert all(part >= 0 for part in [*phase.ms.values(), *phase.at_work_ms.values()])
        assert max(phase.at_work_ms.values()) <= sum(phase.ms.values())
        assert set(phase.bytes_per_s) >= {"link", "CPU", "absent"}
        assert all(rate > 0 for rate in phase.bytes_per_s.values())
    assert (result.prefill.passes, result.prefill.tokens_per_pass) == (1, 12)
    assert (result.decode.passes, result.decode.tokens_per_pass, result.decode.tokens_per_expert) == (1, 1, 1)
    assert 1 < result.prefill.tokens_per_expert <= 12
    assert ("CPU" in result.bare_bytes_per_s) == (library() is not None)
    assert result.stream_share == {}
    assert "for one token" not in rates(plan, result).caption
    assert result.prompts_favour_link == 1
    assert "with long prompts" not in rates(plan, result).caption
    shared = rates(plan, replace(result, stream_share={0: 0.2, 3: 0.4}, prompts_favour_link=1.25)).caption
    assert "for one token the link has 30%, by layer 20% to 40% (plan: " in shared
    assert "with long prompts the link has 1.25 times the plan's blocks" in shared
    calls = {span.call for span in spans}
    assert calls == set(range(6 * (1 + steps)))
    assert {span.lane for span in spans} == set(LANES)
    assert all(span.layer == span.call % 6 for span in spans)


def test_batches_beams_and_chunks():
    plan = make_plan(demo_shape("bfloat16"), [[4] * 8] * 6)
    workload = plan.workload.model_copy(update={"num_beams": 2, "batch_size": 2})
    plan = plan.model_copy(update={"prefill_chunk_tokens": 5, "workload": workload})
    model, _ = load_model(plan, DEMO)
    result, spans = bench(model, prompt_tokens=12, output_tokens=4, num_beams=2, batch_size=2)
    assert {span.call for span in spans} == set(range(6 * (3 + 1 + 3)))  # chunks of all but the last token, that, and steps
    assert (result.prefill.passes, result.prefill.tokens_per_pass) == (4, (2 * 11 + 4) / 4)
    assert (result.decode.passes, result.decode.tokens_per_pass) == (1, 4)
    step_ms = sum(result.decode.ms.values())
    assert step_ms > 0
    assert result.measured.decode_tokens_per_s > 0
    assert 1 <= result.decode.tokens_per_expert <= 4
    needed = result.measured.prefill_traffic.needed_blocks / plan.blocks_per_expert
    assert result.prefill.tokens_per_expert == pytest.approx((2 * 11 + 4) * 2 * 6 / needed)


def test_parts_of_the_time():
    """Two layers, from router to router 10 s: the CPU 1 to 5, the link 3 to 6, resident 4 to 7, the dense part 8 to 10."""
    spans = [Span("host", "wait for the router", layer, layer, start, start + 1.0) for layer, start in ((0, -1.0), (1, 9.0))]
    spans += [Span("CPU", "blocks", 0, 0, 1.0, 5.0), Span("link", "copy", 0, 0, 3.0, 4.0), Span("link", "copy", 0, 0, 3.5, 6.0)]
    spans += [Span("GPU", "resident", 0, 0, 4.0, 7.0), Span("GPU", "dense", 0, 0, 8.0, 12.0)]
    plan = make_plan(demo_shape().model_copy(update={"num_layers": 2}), [[4] * 8] * 2)
    traffic = Traffic(resident_blocks=12, streamed_blocks=6, cpu_blocks=14)
    whole = _phase(plan, spans, traffic, 25.0, 1, 2)
    assert whole.ms == pytest.approx({"absent": 10e3, "resident": 2e3, "dense": 8e3, "head": 5e3})  # of one layer, times two
    at_work = {"CPU": 8e3, "link": 6e3, "resident": 6e3, "dense": 4e3, "streamed": 0.0, "idle": 4e3}
    assert whole.at_work_ms == pytest.approx(at_work)
    rates = {"CPU": 14 / 4, "link": 6 / 3, "absent": 20 / 5, "resident": 12 / 3}
    assert whole.bytes_per_s == pytest.approx({name: rate * plan.block_bytes for name, rate in rates.items()})
    assert whole.tokens_per_expert == 2 * 2 * 2 / (32 / 8)


def test_rates_of_blocks_read_in_place():
    """Resident blocks that the same kernel computes have no rate of their own."""
    spans = [
        Span("CPU", "blocks", 0, 0, 0.0, 6.0),
        Span("link", "in place", 0, 0, 1.0, 5.0),
        Span("link", "in place", 0, 0, 7.0, 8.0),
    ]
    traffic = Traffic(resident_blocks=9, streamed_blocks=25, cpu_blocks=36)
    assert _rates(spans, traffic, block_bytes=10) == {"link": 250 / 5, "CPU": 360 / 6, "absent": 610 / 7}
    assert _rates([], traffic, block_bytes=10) == {}
    assert _rates(spans[:1], traffic, block_bytes=10)["CPU"] == 450 / 6  # without a GPU it computes those too


def test_a_timeline_that_is_off_keeps_nothing():
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


def test_a_trace_is_what_viewers_read(tmp_path):
    write_trace([Span("link", "copy", 2, 9, 1e-3, 3e-3)], tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert list(rows.values()) == list(LANES)
    (copy,) = [event for event in events if event["ph"] == "X"]
    assert (rows[copy["tid"]], copy["name"], copy["ts"], copy["dur"]) == ("link", "copy", 1e3, pytest.approx(2e3))


def test_the_command(tmp_path):
    result = run(
        "fiddler-run", "--plan", SHIPPED_PLAN, "--bench", "--prompt-tokens", 9, "--max-new-tokens", 5,
        "--json", "b.json", "--trace", "t.json", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["b.json", "t.json"]
    for words in ("9 prompt + 5 output tokens", "of it nothing is at work", "bare loop", "RAM at most"):
        assert words in result.stderr
    figures = json.loads((tmp_path / "b.json").read_text())
    assert figures["measured"]["output_tokens"] == 5
    assert figures["measured"]["decode_tokens_per_s"] > 0
    assert set(figures) >= {"command", "machine", "plan", "predicted", "load_s", "first", "prefill", "decode", "peak_host_bytes"}
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


def test_without_a_checkpoint(tmp_path):
    """Random weights need the model's config.json and nothing else."""
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(DEMO / "config.json", model)
    plan = edited_plan(tmp_path)
    dummy = ("--plan", plan, "--model", model, "--load-format", "dummy")
    result = run("fiddler-run", *dummy, "--bench", "--prompt-tokens", 5, "--max-new-tokens", 3, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "5 prompt + 3 output tokens" in result.stderr
    assert_refused(run("fiddler-run", *dummy, "Once", cwd=tmp_path), "there is no tokenizer", "use --bench")


def test_refused_before_the_long_work(tmp_path):
    plan = edited_plan(tmp_path)
    (tmp_path / "file").write_text("kept")
    before = files_in(tmp_path)
    for flags, words in (
        (["--json", "file/b.json"], "file/b.json: cannot write"),
        (["--prompt-tokens", "5000"], "the prompt has 5000 tokens"),
    ):
        assert_refused(run("fiddler-run", "--plan", plan, "--bench", *flags, cwd=tmp_path), words)
    assert files_in(tmp_path) == before


def test_a_prompt_and_a_benchmark_exclude_each_other(tmp_path):
    for arguments in (
        ["Once", "--bench"],
        ["Once", "--json", "b.json"],
        ["Once", "--prompt-tokens", "3"],
        ["Once", "--batch-size", "3"],
        ["--bench", "--temperature", "1"],
        ["--bench", "--max-new-tokens", "1"],
        ["--bench", "--json", "b.json", "--trace", "b.json"],
    ):
        result = run("fiddler-run", "--plan", SHIPPED_PLAN, *arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert "--bench" in result.stderr
