"""Checks of a plan against this machine: cores, host memory, GPU memory."""

import pytest
from conftest import ROOT, demo_shape, make_plan, with_rank
from damage import assert_listed, simulate_2_gb, write_plan

from fiddler_run import load_model
from fiddler_run.errors import FiddlerError
from fiddler_run.loading import machine_check
from fiddler_run.loading.check import check_plan, device_note
from fiddler_run.loading.machine_check import (
    core_problem,
    gpu_memory_problem,
    host_memory_problem,
    machine_problems,
    other_gpu_problems,
)
from fiddler_run.plan.schema import Plan
from fiddler_run.system.gpu import Gpu

GPU_PART_IN_RAM = "the GPU part is kept in host memory and computed by the CPU"


def gpu(free_bytes: int) -> Gpu:
    return Gpu("RTX", "0000:01:00.0", 25 * 10**9, free_bytes)


def test_loading_refuses_too_little_free_memory(tmp_path, model, monkeypatch):
    plan = write_plan(tmp_path)
    (simulate_2_gb(tmp_path, monkeypatch) / "proc/meminfo").write_text("MemAvailable: 1 kB\n")
    problems, _ = check_plan(plan)
    assert_listed(problems, [(plan, "its experts need 0.0")])
    with pytest.raises(FiddlerError) as refusal:
        load_model(plan)
    assert str(refusal.value) == problems[0]


def test_the_embedding_is_counted_once(tmp_path, monkeypatch):
    """Without a GPU: 2.95 GB of dense weights, 0.54 GB of cache and 0.2 GB of staging ring."""
    simulate_2_gb(tmp_path, monkeypatch)
    problems, _ = check_plan(ROOT / "plans/rtx4090.yaml")
    words = (
        "experts and embedding need 68.38 GB of host memory, plus 2.82 GB while loading and 3.69"
    )
    assert any(words in problem for problem in problems), problems


def test_limits_of_the_machine_are_exact():
    assert core_problem(threads=16, cores=16) is None
    assert core_problem(threads=16, cores=15).startswith(
        "cpu_threads is 16, but 15 cores are available here"
    )
    assert host_memory_problem("experts", 70 * 10**9, 2 * 10**9, 72 * 10**9) is None
    problem = host_memory_problem("experts", 70 * 10**9, 2 * 10**9, 71_990_000_000)
    assert problem.startswith(
        "its experts need 70.00 GB of host memory, plus 2.00 GB while loading, but 71.99 GB is"
        " available"
    )
    memory = make_plan(demo_shape(), [[0] * 8] * 6).rank.gpu_memory_bytes
    memory = memory.model_copy(update={"total": 24 * 10**9, "reserve": 10**9})
    assert gpu_memory_problem(memory, gpu(23 * 10**9)) is None
    problem = gpu_memory_problem(memory, gpu(22_990_000_000))
    assert problem.startswith(
        "gpu_memory_bytes.total is 24.00 GB, but RTX has 22.99 GB free, and 23.00 GB is needed"
    )


def test_gpus_of_other_ranks_are_checked_before_a_run(monkeypatch):
    """Rank 1 uses the CPU alone, so rank 2 has the second GPU, with 22.99 of 23 GB free."""
    plan = make_plan(demo_shape(), [[0] * 8] * 6)
    memory = plan.rank.gpu_memory_bytes.model_copy(update={"total": 24 * 10**9, "reserve": 10**9})
    rank = plan.rank.model_copy(update={"device": "cuda", "gpu_memory_bytes": memory})
    without = memory.model_copy(update={"total": 0})
    alone = rank.model_copy(update={"gpu_memory_bytes": without})
    plan = plan.model_copy(update={"ranks": [rank, alone, rank]})
    free_bytes = [23 * 10**9, 22_990_000_000]
    monkeypatch.setattr(machine_check, "num_gpus", lambda: len(free_bytes))
    monkeypatch.setattr(machine_check, "gpu_at", lambda number: gpu(free_bytes[number]))
    (problem,) = other_gpu_problems(plan, "two.yaml")
    assert problem.startswith("two.yaml: ranks[2]: gpu_memory_bytes.total is 24.00 GB, but RTX has")
    free_bytes[1] = 23 * 10**9
    assert other_gpu_problems(plan, "two.yaml") == []


def test_needed_host_memory_by_hand(tmp_path, monkeypatch):
    """48 experts of 98,304 weights of 2 bytes, half of them resident; loading reads 8 at once.

    Without a GPU, the resident half is in host memory too.
    """
    plan = make_plan(demo_shape("bfloat16"), [[4] * 8] * 6)
    root = simulate_2_gb(tmp_path, monkeypatch)
    half = 24 * 196_608
    reading = 8 * 196_608
    for device, needed in ((gpu(2**31), half + reading), (None, 2 * half + reading)):
        for lacking in (0, 1024):
            (root / "proc/meminfo").write_text(f"MemAvailable: {(needed - lacking) // 1024} kB\n")
            assert len(machine_problems(plan, device, "plan")) == bool(lacking)
    memory = plan.rank.host_memory_bytes.model_copy(update={"embedding": 10**9})
    with_embedding = with_rank(plan, host_memory_bytes=memory)
    assert machine_problems(with_embedding, None, "p")[0].startswith(
        "p: its experts and embedding need 1.01 GB of host memory"
    )


def test_shipped_plan_fits_a_machine_with_64_gb(tmp_path, monkeypatch):
    """8 GB of them are left to other programs. Experts in bfloat16 would not fit."""
    plan = Plan.load(ROOT / "plans" / "rtx4090.yaml")
    root = simulate_2_gb(tmp_path, monkeypatch)
    (root / "proc/meminfo").write_text(f"MemAvailable: {56 * 10**9 // 1024} kB\n")
    monkeypatch.setattr(machine_check, "num_cores", lambda: 32)
    assert machine_problems(plan, gpu(25 * 10**9), "plan") == []
    assert plan.rank.host_memory_bytes.experts < 50 * 10**9
    assert plan.num_host_blocks * 6 * 4096 * plan.block_neurons > 56 * 10**9


def test_note_says_where_the_gpu_part_is_held():
    plan = make_plan(demo_shape(), [[0] * 8] * 6)
    assert device_note(plan, on_gpu=True) is None
    assert device_note(plan, on_gpu=False) == f"no CUDA device here: {GPU_PART_IN_RAM}"
    elsewhere = with_rank(plan, device="cpu")
    assert (
        device_note(elsewhere, on_gpu=False)
        == f"the plan is for a machine without CUDA: {GPU_PART_IN_RAM}"
    )
    without_gpu = plan.rank.gpu_memory_bytes.model_copy(update={"total": 0})
    none = with_rank(plan, gpu_memory_bytes=without_gpu)
    assert device_note(none, on_gpu=False) is None
