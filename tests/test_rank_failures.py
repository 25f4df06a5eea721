"""A rank that fails ends all of them, with one line; nothing is left running."""

import gc
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import DEMO, demo_shape, random_plan
from ranks import shared_plan
from test_exactness import TEXTS, greedy

from fiddler_run import load_model
from fiddler_run.errors import FiddlerError
from fiddler_run.loading.load import ModelLoader

END_S = 10
START_S = 60


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory) -> Path:
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("ranks") / "plan.yaml"
    shared_plan(random_plan(demo_shape(), rng), 2, rng).save(path)
    return path


class Run:
    """A `fiddler-run` with two ranks. `other` is the process of rank 1."""

    def __init__(self, *arguments: object):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fiddler_run", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.other = self._child()

    def _child(self) -> int:
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            for pid in children(self.process.pid):
                return pid
            if self.process.poll() is not None:
                raise AssertionError(self.process.communicate()[1])
            time.sleep(0.02)
        self.process.kill()
        raise AssertionError("no other rank was started")

    def wait_for_output(self) -> None:
        """Waits until the run has printed some text, without the rest of its line."""
        if not os.read(self.process.stdout.fileno(), 1):
            _, stderr = self.process.communicate(timeout=END_S)
            raise AssertionError(f"it has ended without output: {stderr}")

    def kill_other(self) -> None:
        os.kill(self.other, signal.SIGKILL)

    def end(self) -> tuple[int, list[str]]:
        """The exit status, and the lines on stderr, once all processes have ended."""
        try:
            _, stderr = self.process.communicate(timeout=END_S)
            deadline_s = time.monotonic() + END_S
            while is_running(self.other):
                assert time.monotonic() < deadline_s, "rank 1 still runs"
                time.sleep(0.05)
        finally:  # none is left beside later tests
            self.process.kill()
            with suppress(ProcessLookupError):
                self.kill_other()
        return self.process.returncode, stderr.splitlines()


def children(pid: int) -> Iterator[int]:
    """The ranks that a process has started."""
    with suppress(FileNotFoundError):  # one of them has ended
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if "--join" in Path(f"/proc/{child}/cmdline").read_text():
                yield int(child)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def started(plan_file: Path) -> Run:
    """A run that generates for a while."""
    more = ("--num-beams", 1, "--temperature", 1, "--seed", 0, "--max-new-tokens", 240)
    return Run("--plan", plan_file, "--model", DEMO, *more, "Once upon a time")


def assert_one_line(lines: list[str], words: str) -> None:
    ours = [line for line in lines if line.startswith("fiddler-run:")]
    assert len(ours) == 1, lines
    assert words in ours[0]
    assert not any("Traceback" in line for line in lines), lines


def test_a_model_has_its_ranks_as_long_as_it_lives(plan_file):
    """The other rank is a process of its own, on cores of its own."""
    cpus = os.sched_getaffinity(0)
    model, tokenizer = load_model(plan_file, DEMO)
    ids = tokenizer(TEXTS[0], return_tensors="pt").to(model.device)
    alone, _ = load_model(random_plan(demo_shape(), random.Random(0)), DEMO)
    assert torch.equal(model.generate(**ids, **greedy(8)), alone.generate(**ids, **greedy(8)))
    (other,) = children(os.getpid())
    assert len(os.sched_getaffinity(other)) < len(cpus) or len(cpus) == 1
    assert os.sched_getaffinity(0) == cpus
    del model
    gc.collect()
    assert not is_running(other)


@pytest.mark.slow
def test_ranks_end_with_a_loader_that_loads_nothing(plan_file):
    loader = ModelLoader(plan_file, DEMO)
    (other,) = children(os.getpid())
    del loader
    gc.collect()
    assert not is_running(other)


@pytest.mark.slow
def test_a_model_says_which_rank_has_ended(plan_file):
    model, tokenizer = load_model(plan_file, DEMO)
    ids = tokenizer(TEXTS[0], return_tensors="pt").to(model.device)
    (other,) = children(os.getpid())
    os.kill(other, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(FiddlerError, match=r"rank 1 \(127.0.0.1\) was ended by SIGKILL"):
            model.generate(**ids, **greedy(8))


@pytest.mark.slow
def test_a_killed_rank_ends_the_run(plan_file):
    run = started(plan_file)
    run.wait_for_output()
    run.kill_other()
    status, lines = run.end()
    assert status == 1
    assert_one_line(lines, "rank 1 (127.0.0.1) was ended by SIGKILL")


STUCK = """
import socket, time
from fiddler_run.ranks.connection import Connection
from fiddler_run.ranks.peer import Peer
from fiddler_run.ranks.peers import Peers

class Stuck:
    def abort(self):
        time.sleep(60)

listening = socket.create_server(("127.0.0.1", 0))
other = socket.create_connection(listening.getsockname())
peers = Peers([Peer(1, Connection(listening.accept()[0]))])
peers.exchange = Stuck()
other.close()
while peers.failure is None:
    time.sleep(0.01)
try:
    peers.check_failure()
except Exception as failure:
    print(failure)
"""


@pytest.mark.slow
def test_an_exchange_that_cannot_be_ended_delays_the_end_by_seconds():
    """What the caller does with the failure is done before."""
    begun_s = time.monotonic()
    found = subprocess.run(
        [sys.executable, "-c", STUCK], capture_output=True, text=True, check=False, timeout=30
    )
    assert found.stdout == "rank 1 (127.0.0.1) is gone\n", found.stderr
    assert found.returncode == 1
    assert time.monotonic() - begun_s < 25


@pytest.mark.slow
def test_the_other_rank_ends_with_the_first(plan_file):
    run = started(plan_file)
    run.wait_for_output()
    run.process.kill()
    status, lines = run.end()
    assert status == -signal.SIGKILL
    assert not any("Traceback" in line for line in lines)


@pytest.mark.slow
def test_an_interrupt_ends_all_ranks(plan_file):
    run = started(plan_file)
    run.wait_for_output()
    run.process.send_signal(signal.SIGINT)
    status, lines = run.end()
    assert status == 130
    assert_one_line(lines, "interrupted")


@pytest.fixture(scope="module")
def whole_run_s(plan_file) -> float:
    """Seconds of a run from the start of the other rank, the shorter of two."""
    times_s = []
    for _ in range(2):
        run = started(plan_file)
        begun_s = time.monotonic()
        run.process.communicate(timeout=START_S)
        times_s.append(time.monotonic() - begun_s)
        assert run.process.returncode == 0
    return min(times_s)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("seed", range(20))
def test_ranks_killed_at_any_moment(rank, seed, plan_file, whole_run_s):
    """From the start of the other rank to its decode."""
    run = started(plan_file)
    time.sleep(random.Random(seed).uniform(0, 0.7 * whole_run_s))
    os.kill(run.other if rank else run.process.pid, signal.SIGKILL)
    status, lines = run.end()
    if rank == 0:
        assert status == -signal.SIGKILL
    else:
        assert status == 1
        assert_one_line(lines, "rank 1")


@pytest.mark.slow
def test_an_idle_server_ends_with_a_rank(plan_file):
    run = Run("--plan", plan_file, "--model", DEMO, "--serve", "--port", 0, "--num-beams", 1)
    while "ready" not in run.process.stderr.readline():
        assert run.process.poll() is None
    run.kill_other()
    status, lines = run.end()
    assert status == 1
    assert_one_line(lines, "rank 1 (127.0.0.1) was ended by SIGKILL")
