"""Benchmarks of a plan: their figures add up, and they need no checkpoint."""

import json
import shutil

import pytest
import torch
from conftest import DEMO, demo_shape, make_plan
from test_commands import SHIPPED_PLAN, assert_refused, edited_plan, files_in, run

from fiddler_run import load_model
from fiddler_run.bench import bench
from fiddler_run.kernels.cpu import library
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
    parts = result.layer_ms
    assert parts["total"] > 0
    assert all(0 <= part <= parts["total"] for part in parts.values())
    assert set(result.bytes_per_s) >= {"link", "CPU", "absent"}
    assert all(rate > 0 for rate in result.bytes_per_s.values())
    assert ("CPU" in result.bare_bytes_per_s) == (library() is not None)
    calls = {span.call for span in spans}
    assert calls == set(range(6 * (1 + steps)))
    assert {span.lane for span in spans} == set(LANES)
    assert all(span.layer == span.call % 6 for span in spans)


def test_a_timeline_that_is_off_keeps_nothing():
    timeline = Timeline(torch.device("cpu"))
    timeline.begin("CPU", "blocks")
    timeline.start()
    timeline.end("CPU", "blocks")  # it began before
    timeline.enter(3)
    timeline.begin("CPU", "blocks")
    timeline.end("CPU", "blocks")
    timeline.begin("link", "copy")  # never ends
    (span,) = timeline.stop()
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
    for words in ("9 prompt + 5 output tokens", "a layer in decode", "bare loop", "RAM at most"):
        assert words in result.stderr
    figures = json.loads((tmp_path / "b.json").read_text())
    assert figures["measured"]["output_tokens"] == 5
    assert figures["measured"]["decode_tokens_per_s"] > 0
    assert set(figures) >= {"command", "machine", "plan", "predicted", "load_s", "first", "layer_ms", "peak_host_bytes"}
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
        (["--num-beams", "4"], "plan again with --num-beams 4"),
    ):
        assert_refused(run("fiddler-run", "--plan", plan, "--bench", *flags, cwd=tmp_path), words)
    assert files_in(tmp_path) == before


def test_a_prompt_and_a_benchmark_exclude_each_other(tmp_path):
    for arguments in (
        ["Once", "--bench"],
        ["Once", "--json", "b.json"],
        ["Once", "--prompt-tokens", "3"],
        ["--bench", "--temperature", "1"],
        ["--bench", "--max-new-tokens", "1"],
        ["--bench", "--json", "b.json", "--trace", "b.json"],
    ):
        result = run("fiddler-run", "--plan", SHIPPED_PLAN, *arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert "--bench" in result.stderr
