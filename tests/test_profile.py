"""`fiddler-opt profile`: what cuts it short costs nothing that was finished; several sets of prompts; a busy machine."""

import json
import os
import subprocess
import sys
import time
import weakref
from collections import Counter
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import DEMO, ROOT
from test_commands import files_in, run

from fiddler_opt.bench_experts import ExpertBench
from fiddler_opt.bench_machine import QUICK as QUICK_EFFORT
from fiddler_opt.bench_machine import THOROUGH, MachineBench
from fiddler_opt.bench_rounds import drift_between_rounds, merged_rounds, smoothed
from fiddler_opt.bench_timing import Stopwatch, Timing
from fiddler_opt.machine import LEAST_US, MachineProfile
from fiddler_opt.model import DEFAULT_MODEL, ModelSpec
from fiddler_opt.routing import RoutingProfile
from fiddler_opt.trace_routing import RoutingTrace
from fiddler_run.errors import FiddlerError
from fiddler_run.host import num_cores

QUICK = ("profile", "--quick", "--force", "--model", DEMO)
UNFINISHED = Path("profiles/.local.machine.yaml.unfinished")


def test_rounds_are_merged():
    def part(shares: dict, device: float, spread: float) -> dict:
        return {
            "times": {"absent_expert_us": shares, "device_expert_us": device},
            "spread": {"absent_expert_us": spread, "device_expert_us": 0.0},
        }

    parts = {
        "a": part({0.0: 12.0, 0.3: 6.0, 1.0: 20.0}, 2.0, 0.1),
        "b": part({0.0: 17.0, 0.3: 8.0}, 3.0, 0.2),
        "c": part({0.0: 90.0, 0.3: 10.0}, 2.5, 0.6),  # the machine was busy
        "d": part({0.0: 50.0}, 9.0, 0.0),
    }
    timed = {**dict.fromkeys("abc", ("experts", 1)), "d": ("experts", 8)}
    tables, spread = merged_rounds(parts, timed)
    merged = {0.0: 17.0, 0.3: 8.0, 1.0: round(20.0 * 25 / 18, 1)}
    assert tables == {"absent_expert_us": {1: merged, 8: {0.0: 50.0}}, "device_expert_us": {1: 2.5, 8: 9.0}}
    assert spread["absent_expert_us"] == {1: 0.3, 8: 0.0}
    assert drift_between_rounds(parts, timed) == {1: round(100 / 18 - 1, 3)}  # of what all have: one round tells nothing


def test_what_decode_meets_is_timed_more_often():
    model = ModelSpec.load(DEFAULT_MODEL)
    times = Counter(MachineBench(model, THOROUGH, None).timed.values())
    assert {count for (_, tokens), count in times.items() if tokens <= 16} == {6}
    assert {count for (_, tokens), count in times.items() if tokens > 16} == {3}
    names = list(MachineBench(model, THOROUGH, None).timed)
    visits = [names.index(f"experts, 1 tokens, round {number}") for number in range(1, 7)]
    assert min(b - a for a, b in pairwise(visits)) > len(names) / 8  # all over the time that a profile takes
    assert set(Counter(MachineBench(model, QUICK_EFFORT, None).timed.values()).values()) == {1}


def test_times_are_smoothed_over_shares():
    shares = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    parabola = {share: 100 * (share - 0.4) ** 2 + 5 for share in shares} | {0.0: 70.0, 1.0: 90.0}
    assert smoothed(parabola) == pytest.approx(parabola, abs=0.06)
    noisy = smoothed(parabola | {0.2: parabola[0.2] - 6})
    assert min(noisy, key=noisy.get) in (0.3, 0.4)  # not 0.2
    assert (noisy[0.0], noisy[1.0]) == (70.0, 90.0)
    few = {0.0: 9.0, 0.2: 5.0, 0.4: 7.0, 0.6: 1.0, 0.8: 3.0, 1.0: 8.0}
    assert smoothed(few) == few


@pytest.mark.parametrize(("best", "alone"), [(0.25, 0.25), (0.3, 0.5), (0.7, 0.5), (0.65, 0.9)])
def test_shares_are_tried_until_the_best_is_not_the_last(best, alone):
    """Also if what CPU and link need alone says something else."""
    bench = object.__new__(ExpertBench)
    bench.page_locked, bench.top_k, bench.blocks, bench._turn = True, 2, 16, 0
    asked = []

    def experts(tokens, shares):
        asked.extend(shares)
        times = {share: 50 + 1000 * abs(share - best) for share in shares} | {0.0: 1000 * alone, 1.0: 1000 * (1 - alone)}
        return {share: Timing(times[share], 0.1) for share in shares}

    bench._experts = experts
    times = bench.shares(8)
    assert len(asked) == len(set(asked)) == len(times) < 30
    assert {0.0, 1.0} < set(times)
    assert abs(min(times, key=lambda share: times[share].us) - best) <= 1 / 32
    asked.clear()
    again = set(bench.shares(8, {share: timing.us for share, timing in times.items()}))
    assert {0.0, 1.0} < again == set(asked)
    assert len(again) == 7
    assert min(abs(share - best) for share in again) <= 1 / 32
    assert set(bench.shares(128, {0.0: 5.0, 0.2: 3.0, 1.0: 9.0})) == {0.2}
    assert set(bench.shares(128, {0.0: 5.0, 0.2: 4.0, 1.0: 3.0})) == {0.2, 1.0}  # the best, even if it is all
    assert set(bench.shares(128, {0.0: 5.0, 1.0: 9.0})) == {0.0}
    bench.page_locked = False
    assert set(bench.shares(8)) == {0.0}  # the GPU cannot read them


def test_a_bench_leaves_no_memory_behind():
    """Gigabytes, which the model that is loaded next may need."""
    bench = MachineBench(ModelSpec.load(str(DEMO)), QUICK_EFFORT, None)
    assert list(bench.parts)[:3] == ["host", "device", "threads"]
    experts, alive = bench._experts, weakref.ref(bench)
    arena = weakref.ref(experts.host)
    del bench, experts
    assert alive() is None
    assert arena() is None


def test_memory_that_can_no_longer_be_page_locked():
    """What was timed before cannot be completed."""
    bench = MachineBench(ModelSpec.load(str(DEMO)), QUICK_EFFORT, None)
    bench.found["threads"] = {"threads": 1, "pinned": False, "page_locked": True}
    with pytest.raises(FiddlerError, match="could be page-locked, but cannot be now: delete the .unfinished file"):
        bench.parts["experts, 1 tokens, round 1"]()


def test_differences_do_not_vanish():
    much, little = Timing(10.0, 0.1), Timing(1.0, 0.2)
    assert much - little == Timing(9.0, 1.0 / 9.0)
    assert (little - much).us == LEAST_US
    assert ((little - much) / 5).us == LEAST_US


def test_what_measures_itself():
    rounds = iter([[1000.0], *([8.0, 9.0, 13.0], [9.0, 11.0], [12.0]) * 100])  # the first one warms up
    (timing,) = Stopwatch(torch.device("cpu"), 0.0).gather(lambda: next(rounds))
    assert timing.us == 10.0  # median of the means
    assert 0 < timing.spread <= 0.2


def start(folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fiddler_opt.cli", *map(str, QUICK), "--output-tokens", "8"]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finished_parts(folder: Path) -> int:
    file = folder / UNFINISHED
    return len(yaml.safe_load(file.read_text())["parts"]) if file.exists() else 0


def test_killed_again_and_again_it_goes_on(tmp_path):
    """Each kill comes at another moment of another part; a second call never does a finished part again."""
    for kill, delay_s in enumerate((0.0, 0.05, 0.0, 0.2, 0.01, 0.1)):
        before, process = finished_parts(tmp_path), start(tmp_path)
        while finished_parts(tmp_path) == before:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        time.sleep(delay_s)
        process.kill()
        said = process.communicate()[1]
        assert f"{before} of " in said or kill == 0
        assert finished_parts(tmp_path) > before
        assert [path.name for path in (tmp_path / "profiles").glob("[!.]*")] == []
    last = start(tmp_path)
    assert "parts are timed" in last.communicate(timeout=240)[1]
    assert last.returncode == 0
    MachineProfile.load(tmp_path / "profiles/local.machine.yaml")
    assert RoutingProfile.load(tmp_path / "profiles/tiny-mixtral.routing.yaml").sets["stories.jsonl"].prompts == 16
    assert set(files_in(tmp_path)) == {"profiles/local.machine.yaml", "profiles/tiny-mixtral.routing.yaml"}


def test_parts_of_another_machine_are_not_taken(tmp_path):
    (tmp_path / "profiles").mkdir()
    file = tmp_path / UNFINISHED
    for content in ("not: [yaml", yaml.safe_dump({"made_with": {"cpu": "another"}, "parts": {"host": {}, "threads": {}}})):
        file.write_text(content)
        process = start(tmp_path)
        while file.exists() and file.read_text() == content:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.kill()
        assert "going on" not in process.communicate()[1]


def test_several_sets_of_prompts_and_their_trace(tmp_path):
    """Recorded by a plan, with no machine profile at hand; the trace holds what the profile counts."""
    (tmp_path / "stories.txt").write_text("Once upon a time\nThe sun was warm. Pip went for a walk\n")
    (tmp_path / "code.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "def count(n):"}]}) + "\n")
    flags = ("--only", "routing", "--plan", ROOT / "plans/demo.yaml", "--trace", "trace.npz", "--output-tokens", "5")
    result = run("fiddler-opt", "profile", "--model", DEMO, "--prompts", "stories.txt", "code.jsonl", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["profiles/tiny-mixtral.routing.yaml"]
    profile = RoutingProfile.load(tmp_path / "profiles/tiny-mixtral.routing.yaml")
    assert {name: part.prompts for name, part in profile.sets.items()} == {"stories.txt": 2, "code.jsonl": 1}
    assert {name: part.decode.tokens for name, part in profile.sets.items()} == {"stories.txt": 8, "code.jsonl": 4}
    trace = RoutingTrace.load(tmp_path / "trace.npz")
    assert trace.set_names == ["stories.txt", "code.jsonl"]
    counted = np.bincount(trace.experts[trace.decode & (trace.prompt == 2), 0].ravel(), minlength=8)
    assert counted.tolist() == profile.sets["code.jsonl"].decode.activations[0]


@contextmanager
def every_core_busy():
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_cores())]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def test_a_busy_machine_is_not_profiled(tmp_path):
    with every_core_busy():
        result = run("fiddler-opt", "profile", "--quick", "--model", DEMO, "--only", "machine", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert "the machine is busy: other programs took" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "profiles/local.machine.yaml").exists()
