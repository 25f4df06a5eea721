"""Ranks that are started by hand, as on two machines. Here, both are this one."""

import random
import socket
import subprocess
from pathlib import Path

import pytest
from command_line import run, started
from conftest import DEMO, demo_shape, random_plan
from ranks import shared_plan

END_S = 60
GREEDY = ("--num-beams", 1, "--temperature", 0, "--max-new-tokens", 12, "Once upon a time")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with plans of one rank and of two, of which rank 1 finds no GPU."""
    folder = tmp_path_factory.mktemp("machines")
    rng = random.Random(0)
    one = random_plan(demo_shape(), rng)
    one.save(folder / "one.yaml")
    two = shared_plan(one, 2, rng, machines=[0, 1])
    first = two.ranks[0].model_copy(update={"device": "cpu"})
    two.model_copy(update={"ranks": [first, two.ranks[1]]}).save(folder / "two.yaml")
    return folder


@pytest.fixture
def address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


def both(folder: Path, address: str, *arguments: object) -> list[subprocess.Popen]:
    """The processes of both ranks. Rank 1 has the model in a folder of its own."""
    own = folder / "model"
    if not own.exists():
        own.symlink_to(DEMO)
    return [
        started("fiddler-run", *each, cwd=folder)
        for each in (
            ("--plan", "two.yaml", "--model", DEMO, "--listen", address, *arguments),
            ("--join", address, "--rank", 1, "--model", "model"),
        )
    ]


def test_both_give_the_text_of_one(folder, address):
    alone = run("fiddler-run", "--plan", "one.yaml", "--model", DEMO, *GREEDY, cwd=folder)
    assert alone.returncode == 0, alone.stderr
    first, second = both(folder, address, *GREEDY)
    stdout, stderr = first.communicate(timeout=END_S)
    assert first.returncode == 0, stderr
    assert stdout == alone.stdout
    assert f"waiting for ranks at {address}: 1" in stderr
    note = "no CUDA device here: the GPU part is kept in host memory and computed by the CPU"
    assert f"note: rank 1: {note}" in stderr
    assert stderr.count(note) == 1
    stdout, stderr = second.communicate(timeout=END_S)
    assert second.returncode == 0, stderr
    for line in (
        f"connected to rank 0 at {address}; loading",
        f"note: {note}",
        "until rank 0 ends",
    ):
        assert line in stdout + stderr
    assert "Traceback" not in stderr


def test_rank_1_says_that_rank_0_is_gone(folder, address):
    first, second = both(folder, address, *GREEDY[:-3], "--max-new-tokens", 240, GREEDY[-1])
    assert first.stdout.read(1)
    first.kill()
    _, stderr = second.communicate(timeout=END_S)
    assert second.returncode == 1
    assert stderr.splitlines()[-1] == "fiddler-run: rank 0 is gone"
    first.communicate()
