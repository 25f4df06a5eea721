"""A rank that fails ends all of them, with one line; nothing is left running."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DEMO, demo_shape, random_plan
from ranks import shared_plan

from fiddler_run.ranks.connection import connect, release

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
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            found = children.read_text().split()
            if found and "--join" in Path(f"/proc/{found[0]}/cmdline").read_text():
                return int(found[0])
            time.sleep(0.02)
        raise AssertionError("no other rank was started")

    def wait_for_output(self, characters: int) -> None:
        """Waits until the run has printed some text, without the rest of its line."""
        assert len(os.read(self.process.stdout.fileno(), characters)) > 0

    def kill_other(self) -> None:
        os.kill(self.other, signal.SIGKILL)

    def end(self) -> tuple[int, list[str]]:
        """The exit status, and the lines on stderr, once all processes have ended."""
        _, stderr = self.process.communicate(timeout=END_S)
        deadline_s = time.monotonic() + END_S
        while is_running(self.other):
            assert time.monotonic() < deadline_s, "rank 1 still runs"
            time.sleep(0.05)
        return self.process.returncode, stderr.splitlines()


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


def cpus_of(pid: int) -> set[int]:
    """The CPUs that a process's first thread may use."""
    return os.sched_getaffinity(pid)


def test_a_killed_rank_ends_the_run(plan_file):
    run = started(plan_file)
    run.wait_for_output(1)
    both = [cpus_of(pid) for pid in (run.process.pid, run.other)]
    if len(os.sched_getaffinity(0)) > 1:
        assert not set.intersection(*both)
    assert set.union(*both) == os.sched_getaffinity(0)
    run.kill_other()
    status, lines = run.end()
    assert status == 1
    assert_one_line(lines, "rank 1 (127.0.0.1) was ended by SIGKILL")


def test_the_other_rank_ends_with_the_first(plan_file):
    run = started(plan_file)
    run.wait_for_output(1)
    run.process.kill()
    status, lines = run.end()
    assert status == -signal.SIGKILL
    assert not any("Traceback" in line for line in lines)


def test_an_interrupt_ends_all_ranks(plan_file):
    run = started(plan_file)
    run.wait_for_output(1)
    run.process.send_signal(signal.SIGINT)
    status, lines = run.end()
    assert status == 130
    assert_one_line(lines, "interrupted")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("seed", range(20))
def test_ranks_killed_at_any_moment(rank, seed, plan_file):
    """From the start of the other rank to its decode."""
    run = started(plan_file)
    time.sleep(random.Random(seed).uniform(0, 12))
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


def refused(plan_file: Path, **hello: object) -> str:
    """The line of a run whose rank on another machine introduces itself like this."""
    command = [sys.executable, "-m", "fiddler_run", "--plan", str(plan_file), "--model", str(DEMO)]
    with subprocess.Popen(
        [*command, "--listen", "127.0.0.1:0", "x"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        waiting = next(line for line in run.stderr if line.startswith("waiting for ranks"))
        port = int(waiting.split(":")[1])
        with connect("127.0.0.1", port, 5) as connection:
            connection.send(**hello)
            told = connection.receive()
        assert run.wait(END_S) == 1
        (line,) = [line for line in run.stderr if line.startswith("fiddler-run:")]
        assert told["failed"] in line
        return line


def test_another_release_or_rank_is_refused(tmp_path):
    rng = random.Random(0)
    plan_file = tmp_path / "plan.yaml"
    shared_plan(random_plan(demo_shape(), rng), 2, rng, machines=[0, 1]).save(plan_file)
    line = refused(plan_file, rank=1, release="fiddler-opt 0.0.1")
    assert f"rank 1 (127.0.0.1) runs fiddler-opt 0.0.1, and rank 0 {release()}" in line
    line = refused(plan_file, rank=2, release=release())
    assert "127.0.0.1 connected as rank 2, which is not awaited" in line
