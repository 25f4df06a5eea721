"""Comparison of two plans, on plans made by hand."""

import io

import pytest
from conftest import demo_shape, make_plan, with_rank
from rich.console import Console

from fiddler_opt.insight.compare import Change, Comparison, Move, compare
from fiddler_opt.insight.compare_report import print_comparison
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan

FIRST = [[0, 8, 0, 0, 0, 0, 0, 0], *[[0] * 8] * 5]
SECOND = [[0, 3, 4, 0, 0, 0, 0, 0], *[[0] * 8] * 4, [0, 0, 0, 0, 0, 0, 0, 8]]


def plan(resident: list[list[int]], **changes) -> Plan:
    """A plan of blocks of 49,152 bytes, for 16 + 64 tokens; `a__b=1` sets key b in a."""
    made = make_plan(demo_shape(), resident)
    for path, value in changes.items():
        section, _, key = path.partition("__")
        if section == "rank":
            made = with_rank(made, **{key: value})
            continue
        value = getattr(made, section).model_copy(update={key: value}) if key else value
        made = made.model_copy(update={section: value})
    return made


def printed(comparison: Comparison) -> list[list[str]]:
    """The words of each line, without a table's frame."""
    console = Console(file=io.StringIO(), width=80, soft_wrap=True)
    print_comparison(console, comparison)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    return [line.replace("│", " ").split() for line in text.splitlines()]


@pytest.fixture
def better() -> Comparison:
    """The comparison of a plan with one that decodes 25% faster."""
    faster = {
        "predicted__decode_tokens_per_s": 1.25,
        "predicted__ttft_s": 0.8,
        "predicted__gpu_hit_rate": 0.62,
    }
    return compare(
        plan(FIRST),
        plan(
            SECOND,
            rank__cpu_threads=2,
            rank__stream_share={1: 0.0, 9: 0.5},
            workload__max_seq_len=512,
            **faster,
        ),
    )


def test_comparison_lists_moved_blocks(better):
    assert better.moves == [Move(0, 1, 8, 3), Move(0, 2, 0, 4), Move(5, 7, 0, 8)]
    assert better.resident_blocks == Change("resident_blocks", 8, 15)
    words = [" ".join(line) for line in printed(better)]
    assert words[0] == "blocks in GPU memory: 8 -> 15; 12 (589.82 KB) added, 5 (245.76 KB) removed"
    assert "0 4 5 1: 8 -> 3, 2: 0 -> 4" in words
    assert "5 8 - 7: 0 -> 8" in words


def test_comparison_lists_changed_settings(better):
    assert better.settings == [
        Change("workload.max_seq_len", 256, 512),
        Change("gpu_memory_bytes.experts", 8 * 49_152, 15 * 49_152),
        Change("host_memory_bytes.experts", 376 * 49_152, 369 * 49_152),
        Change("cpu_threads", 1, 2),
        Change("stream_share[9]", 0.0, 0.5),
    ]
    lines = printed(better)
    for line in (
        ["cpu_threads", "1", "2"],
        ["stream_share[9]", "0.0%", "50.0%"],
        ["gpu_memory_bytes.experts", "393.22", "KB"],
    ):
        assert line in [words[: len(line)] for words in lines]


def test_blocks_of_different_sizes_are_counted_in_the_smaller():
    """As in plans for one rank and for two."""
    doubled = make_plan(demo_shape(), [[count // 2 for count in row] for row in FIRST], 64)
    found = compare(plan(FIRST), doubled)
    assert found.moves == []
    assert found.resident_blocks == Change("resident_blocks", 8, 8)
    assert Change("block_neurons", 32, 64) in found.settings
    assert found.notes == ["blocks of different sizes are counted in blocks of 32 neurons"]


def test_padding_is_no_difference():
    """All experts of 480 neurons in GPU memory, in 5 blocks of 96 and in 4 of 128."""
    shape = demo_shape().model_copy(update={"intermediate_size": 480})
    whole = [make_plan(shape, [[480 // n + (480 % n > 0)] * 8] * 6, n) for n in (96, 128)]
    found = compare(*whole)
    assert found.moves == []
    assert found.resident_blocks == Change("resident_blocks", 6 * 8 * 15, 6 * 8 * 15)


def test_budget_and_encoding_are_settings():
    """The dtype is not: it belongs to the model and cannot differ."""
    changed = plan(FIRST, budget__gpu_bytes=2 * 10**9, budget__host_bytes=10**9, encoding="other")
    found = compare(plan(FIRST), changed)
    assert found.settings == [
        Change("encoding", "fp32", "other"),
        Change("budget.gpu_bytes", 2**30, 2 * 10**9),
        Change("budget.host_bytes", None, 10**9),
    ]
    assert ["budget.gpu_bytes", "1.07", "GB", "2.00", "GB"] in printed(found)


def test_comparison_lists_predicted_gains(better):
    """The workload takes 0.8 + 63 / 1.25 seconds instead of 1 + 63 / 1."""
    values = {change.name: (change.before, change.after) for change in better.predictions}
    assert values == {
        "decode_tokens_per_s": (1.0, 1.25),
        "ttft_s": (1.0, 0.8),
        "gpu_hit_rate": (0.5, 0.62),
        "workload_s": (64.0, pytest.approx(51.2)),
    }
    words = [" ".join(line) for line in printed(better)]
    assert "decode 1.00 tokens/s 1.25 tokens/s +25.0%" in words
    assert "time to first token 1.000 s 0.800 s -20.0%" in words
    assert "GPU hit rate 50.0% 62.0% +12.0 points" in words
    assert "prompt and output 64.00 s 51.20 s -20.0%" in words
    assert better.notes == []


def test_other_workloads_and_profiles_are_noted():
    other = compare(
        plan(FIRST),
        plan(FIRST, workload__output_tokens=32, provenance__machine_sha256="0123456789"),
    )
    assert "workload_s" not in {change.name for change in other.predictions}
    assert [note.split(",")[0] for note in other.notes] == [
        "the plans are for different workloads",
        "the plans were made from different machine profiles",
    ]
    assert [change.name for change in other.settings] == ["machine", "workload.output_tokens"]
    # tokens/s of both sequences: 1 + 2 * 63 / 1
    batch = compare(*[plan(FIRST, workload__batch_size=2)] * 2)
    assert batch.predictions[-1] == Change("workload_s", 127.0, 127.0)


def test_equal_plans_are_the_same():
    """Creation time, solver time and the path of the model's folder do not count."""
    again = plan(
        FIRST,
        provenance__created="2026-02-02",
        provenance__solve_s=1.0,
        model__name="../examples/tiny-mixtral",
    )
    assert compare(plan(FIRST), again).same
    assert len(printed(compare(plan(FIRST), again))) == 1
    for change in (
        {"predicted__ttft_s": 2.0},
        {"encoding": "bf16"},
        {"budget__host_bytes": 10**9},
        {"rank__cpu_pinned": True},
        {"rank__disk_blocks": {0: [0] * 7 + [1]}},
    ):
        different = compare(plan(FIRST), plan(FIRST, **change))
        assert not different.same
        assert len(printed(different)) > 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"model__name": "mistralai/Mixtral-8x7B-v0.1"},
            "of different models .*tiny-mixtral and mistralai/Mixtral-8x7B-v0.1",
        ),
        (
            {"model__dtype": "bfloat16"},
            "of different models cannot be compared: model.dtype is float32 and bfloat16",
        ),
    ],
    ids=str,
)
def test_plans_of_other_models_are_refused(change, words):
    with pytest.raises(FiddlerError, match=words) as refusal:
        compare(plan(FIRST), plan(FIRST, **change))
    assert "\n" not in str(refusal.value)
