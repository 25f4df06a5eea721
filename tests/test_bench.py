"""Benchmarks of a plan: their figures add up, and they need no checkpoint."""

import json
import shutil
from dataclasses import replace

import pytest
from command_line import SHIPPED_PLAN, assert_refused, edited_plan, files_in, run
from conftest import DEMO, demo_shape, make_plan

from fiddler_run.engine.timeline import Lane
from fiddler_run.generation.bench import bench
from fiddler_run.generation.report import rates
from fiddler_run.kernels.library import library


def assert_phase_adds_up(phase) -> None:
    assert set(phase.ms) == {"host", "resident", "exchange", "dense", "head"}
    assert all(part >= 0 for part in [*phase.ms.values(), *phase.at_work_ms.values()])
    assert max(phase.at_work_ms.values()) <= sum(phase.ms.values())
    assert set(phase.bytes_per_s) >= {"link", "CPU", "host"}
    assert all(rate > 0 for rate in phase.bytes_per_s.values())


def test_bench_figures_add_up(place):
    plan = make_plan(demo_shape("bfloat16"), [[4] * 8] * 6, share={1: 0.5})
    model, _ = place(plan)
    result, spans = bench(model, prompt_tokens=12, output_tokens=7)
    blocks = plan.blocks_per_expert
    steps = 6
    needed = steps * 6 * 2  # layers, experts per token
    measured = result.measured
    assert (measured.prompt_tokens, measured.output_tokens) == (12, 7)
    assert measured.traffic.needed_blocks == needed * blocks
    assert measured.traffic.resident_blocks == needed * 4
    assert measured.traffic.streamed_blocks == measured.traffic.cpu_blocks == needed * 2
    assert measured.prefill_traffic.needed_blocks > 6 * 2 * blocks
    assert_phase_adds_up(result.prefill)
    assert_phase_adds_up(result.decode)
    assert (result.prefill.passes, result.prefill.tokens_per_pass) == (1, 12)
    assert (result.decode.passes, result.decode.tokens_per_pass) == (1, 1)
    assert result.decode.tokens_per_expert == 1
    assert 1 < result.prefill.tokens_per_expert <= 12
    assert ("CPU" in result.bare_bytes_per_s) == (library() is not None)
    (own,) = spans
    assert {span.call for span in own} == set(range(6 * (1 + steps)))
    assert {span.lane for span in own} == set(Lane)
    assert all(span.layer == span.call % 6 for span in own)
    assert result.prefill.ms["exchange"] == result.decode.ms["exchange"] == 0

    assert result.stream_share == {}  # nothing was tuned
    assert result.prefill_odds == 1
    untuned = rates(plan, result).caption
    assert "tuned stream share" not in untuned
    assert "with long prompts" not in untuned
    tuned = replace(result, stream_share={0: 0.2, 3: 0.4}, prefill_odds=1.25)
    caption = rates(plan, tuned).caption
    assert "tuned stream share for one token: 30%, by layer 20% to 40% (plan: " in caption
    assert "for long prompts: 1.25 times the plan's" in caption


def test_bench_counts_batches_beams_and_chunks(place):
    plan = make_plan(demo_shape("bfloat16"), [[4] * 8] * 6)
    workload = plan.workload.model_copy(update={"num_beams": 2, "batch_size": 2})
    plan = plan.model_copy(update={"prefill_chunk_tokens": 5, "workload": workload})
    model, _ = place(plan)
    result, spans = bench(model, prompt_tokens=12, output_tokens=4, num_beams=2, batch_size=2)
    passes = 3 + 1 + 3  # prompt chunks, the prompt's last token, decode steps
    assert {span.call for span in spans[0]} == set(range(6 * passes))
    assert (result.prefill.passes, result.prefill.tokens_per_pass) == (4, (2 * 11 + 4) / 4)
    assert (result.decode.passes, result.decode.tokens_per_pass) == (1, 4)
    assert sum(result.decode.ms.values()) > 0
    assert result.measured.decode_tokens_per_s > 0
    assert 1 <= result.decode.tokens_per_expert <= 4
    needed = result.measured.prefill_traffic.needed_blocks / plan.blocks_per_expert
    assert result.prefill.tokens_per_expert == pytest.approx((2 * 11 + 4) * 2 * 6 / needed)


def test_bench_writes_result_and_trace(tmp_path):
    flags = ("--bench", "--prompt-tokens", 9, "--max-new-tokens", 5)
    files = ("--json", "b.json", "--trace", "t.json")
    result = run("fiddler-run", "--plan", SHIPPED_PLAN, *flags, *files, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["b.json", "t.json"]
    for words in ("9 prompt + 5 output tokens", "│ idle", "only read or copied", "peak RAM"):
        assert words in result.stderr
    figures = json.loads((tmp_path / "b.json").read_text())
    assert figures["measured"]["output_tokens"] == 5
    assert figures["measured"]["decode_tokens_per_s"] > 0
    stated = {"command", "machine", "plan", "predicted", "load_s"}
    assert set(figures) >= stated | {"first", "prefill", "decode", "peak_host_bytes"}
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


def test_bench_needs_no_weights(tmp_path):
    """Random weights need the model's config.json and nothing else."""
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(DEMO / "config.json", model)
    dummy = ("--plan", edited_plan(tmp_path), "--model", model, "--load-format", "dummy")
    sizes = ("--prompt-tokens", 5, "--max-new-tokens", 3)
    result = run("fiddler-run", *dummy, "--bench", *sizes, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "5 prompt + 3 output tokens" in result.stderr
    prompt = run("fiddler-run", *dummy, "Once", cwd=tmp_path)
    assert_refused(prompt, "there is no tokenizer", "use --bench")


def test_bench_refuses_bad_flags_before_loading(tmp_path):
    plan = edited_plan(tmp_path)
    (tmp_path / "file").write_text("kept")
    before = files_in(tmp_path)
    for flags, words in (
        (["--json", "file/b.json"], "file/b.json: cannot write"),
        (["--prompt-tokens", "5000"], "the prompt has 5000 tokens"),
    ):
        assert_refused(run("fiddler-run", "--plan", plan, "--bench", *flags, cwd=tmp_path), words)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["Once", "--bench"],
        ["Once", "--json", "b.json"],
        ["Once", "--prompt-tokens", "3"],
        ["Once", "--batch-size", "3"],
        ["--bench", "--temperature", "1"],
        ["--bench", "--max-new-tokens", "1"],
        ["--bench", "--json", "b.json", "--trace", "b.json"],
    ],
    ids=" ".join,
)
def test_flags_of_prompt_and_bench_exclude_each_other(tmp_path, arguments):
    result = run("fiddler-run", "--plan", SHIPPED_PLAN, *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert "--bench" in result.stderr
    assert "error: --" in result.stderr or "error: give exactly one of" in result.stderr
