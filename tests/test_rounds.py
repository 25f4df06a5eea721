"""Timing: samples, rounds, stream shares, and experts beside other work."""

import pytest
from conftest import DEMO
from hand_over import CPU
from stream import Stream

from fiddler_opt.inputs.machine import MIN_US
from fiddler_opt.inputs.model import DEFAULT_MODEL, ModelSpec
from fiddler_opt.measure.experts import ExpertBench
from fiddler_opt.measure.machine import MachineBench
from fiddler_opt.measure.rounds import drift_between_rounds, merged_rounds
from fiddler_opt.measure.settings import QUICK, THOROUGH
from fiddler_opt.measure.shares import sweep_shares
from fiddler_opt.measure.stopwatch import Stopwatch, difference
from fiddler_run.engine.engine import ExpertEngine
from fiddler_run.kernels.library import compiled
from fiddler_run.kernels.table import Kernels


def test_rounds_are_merged():
    parts = {
        "a": {"host_expert_us": {0.0: 12.0, 0.3: 6.0}, "resident_expert_us": 2.0},
        "b": {"host_expert_us": {0.0: 17.0, 0.3: 8.0}, "resident_expert_us": 3.0},
        "c": {"host_expert_us": {0.0: 90.0, 0.3: 10.0}, "resident_expert_us": 2.5},  # a busy round
        "d": {"host_expert_us": {0.0: 50.0}, "resident_expert_us": 9.0},
        "e": {"head_us": 4.0},
    }
    timed = {**dict.fromkeys("abc", ("experts", 1)), "d": ("experts", 8), "e": ("layers", 1)}
    assert merged_rounds(parts, timed) == {
        "host_expert_us": {1: {0.0: 17.0, 0.3: 8.0}, 8: {0.0: 50.0}},
        "resident_expert_us": {1: 2.5, 8: 9.0},
        "head_us": {1: 4.0},
    }
    # Drift needs more than one round.
    assert drift_between_rounds(parts, timed) == {1: round(100 / 18 - 1, 3)}


def test_each_round_times_everything_once():
    timed = list(MachineBench(ModelSpec.load(DEFAULT_MODEL), THOROUGH, None).timed)
    size = len(timed) // 3
    for number in range(3):
        names = {
            name.removesuffix(f", round {number + 1}") for name in timed[number * size :][:size]
        }
        assert len(names) == size
        assert not any("round" in name for name in names)
        assert {"experts, 1 tokens", "layers without experts, 1 tokens"} < names
    quick = MachineBench(ModelSpec.load(str(DEMO)), QUICK, None).timed
    assert all(name.endswith("round 1") for name in quick)


@pytest.mark.parametrize(("best", "alone"), [(0.25, 0.25), (0.3, 0.5), (0.7, 0.5), (0.65, 0.9)])
def test_sweep_brackets_the_best_share(best, alone):
    """Also if the times of CPU and link alone predict another share."""
    asked = []

    def measure(shares: list[float]) -> dict[float, float]:
        asked.extend(shares)
        times = {share: 50 + 1000 * abs(share - best) for share in shares}
        ends = {0.0: 1000 * alone, 1.0: 1000 * (1 - alone)}
        return {share: ends.get(share, us) for share, us in times.items()}

    times = sweep_shares(measure, [0.0, 1.0], block=1 / 32)
    assert len(asked) == len(set(asked)) == len(times) < 30
    assert list(times) == sorted(times)
    assert {0.0, 1.0} < set(times)
    found = min(times, key=times.get)
    assert abs(found - best) <= 1 / 32
    assert sum(found < share < 1 for share in times) >= 3
    assert sum(0 < share < found for share in times) >= 3


def test_sweep_handles_a_missing_end_and_single_blocks():
    def measure(shares: list[float]) -> dict[float, float]:
        return {share: 1000 * abs(share - 0.97) for share in shares}

    many = sweep_shares(measure, [1.0], block=1 / 32)  # too many tokens for the CPU alone
    assert max(many) == 1.0
    assert 0.0 not in many
    assert min(many, key=many.get) == round(31 / 32, 4)
    whole = sweep_shares(lambda shares: dict.fromkeys(shares, 1.0), [0.0, 1.0], block=1.0)
    assert set(whole) == {0.0, 1.0}  # one block in a call


def test_difference_has_a_lower_bound():
    assert difference(10.0, 1.0) == 9.0
    assert difference(1.0, 10.0) == MIN_US


def test_times_are_medians_of_means():
    samples = iter([[1000.0], *([8.0, 9.0, 13.0], [9.0, 11.0], [12.0]) * 100])  # the first warms up
    assert Stopwatch(CPU, 0.0).gather(lambda: next(samples)) == [10.0]


def test_calls_are_timed_alternately():
    called = []
    calls = [lambda: called.append("a"), lambda: called.append("b")]
    assert len(Stopwatch(CPU, 0.0).time(*calls, calls_per_sample=2)) == 2
    assert called == list("aabb") * 4


@pytest.mark.skipif(not compiled(), reason="the kernel is not built")
def test_expert_times_exclude_other_work():
    """Each layer's inputs come 5 ms late, fifty times as long as the CPU needs for its experts."""
    bench = ExpertBench(ModelSpec.load(str(DEMO)), 10**9, Stopwatch(CPU, 0.0), CPU)
    bench.use_threads(2, pinned=False)
    stream = Stream(delay_s=5e-3, encoding=bench.block_format)
    stream.by_address = {block.data_ptr(): block for expert in bench.host for block in expert}
    cpu = bench.engine.resources.kernels.cpu
    bench.engine = ExpertEngine(bench.block_format, Kernels(cpu, stream, cpu.apply), CPU, slots=4)
    bench.on_gpu = True
    resources = bench.engine.resources
    try:
        times = bench.host_expert(1, [0.0, 0.5])
        assert set(times) == {0.0, 0.5}
        assert 1.0 < times[0.0] < 2000.0
        assert times[0.5] > 0
        traffic = resources.traffic
        assert traffic.cpu_blocks > traffic.streamed_blocks > traffic.resident_blocks == 0
        resources.forget_traffic()
        assert bench.resident_expert(1) > 0
        assert resources.traffic.resident_blocks == resources.traffic.needed_blocks > 0
    finally:
        stream.finish()
