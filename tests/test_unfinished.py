"""Checkpoints of long-running commands: kept when interrupted, removed when done."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_line import files_in
from conftest import ROOT

from fiddler_opt.measure import unfinished
from fiddler_opt.measure.unfinished import Unfinished, forget_unfinished, unfinished_path
from fiddler_run.errors import FiddlerError

MADE_WITH = {"shape": [1, 2], "torch": "2"}
PARTS = ("host", "threads", "experts", "link")
# Makes the parts, and is killed before or after its n-th call of a function of `os`.
PROGRAM = """
import os, signal, sys
from pathlib import Path
from fiddler_opt.measure.unfinished import Unfinished, forget_unfinished

function, moment, calls_left = sys.argv[1], sys.argv[2], int(sys.argv[3])
real = getattr(os, function)

def killed(*arguments, **named):
    global calls_left
    calls_left -= 1
    if moment == "after":
        real(*arguments, **named)
    if calls_left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if moment == "before":
        real(*arguments, **named)

setattr(os, function, killed)
unfinished = Unfinished(Path("m.yaml"), {"torch": "2"})
for name in sys.argv[4:]:
    unfinished.part(name, lambda name=name: print(name) or {"us": {0.25: 1.5}, "name": name})
assert "torch" not in sys.modules
forget_unfinished(Path("m.yaml"))
"""


def test_only_our_own_files_are_removed(tmp_path):
    """Files of editors stay, and files that the name would match as a glob pattern."""
    target = tmp_path / "m[ab].yaml"
    ours = [
        ".m[ab].yaml.unfinished",
        ".m[ab].yaml.0123456789abcdef.partial",
        "..m[ab].yaml.unfinished.0123456789abcdef.partial",
    ]
    others = [
        "m[ab].yaml",
        ".m[ab].yaml.swp",
        ".m[ab].yaml.partial",
        ".m[ab].yaml.unfinished.swp",
        "..m[ab].yaml.x",
        ".ma.yaml.unfinished",
        ".mb.yaml.unfinished",
        ".ma.yaml.0123456789abcdef.partial",
        ".m[ab].yaml.2.unfinished",
    ]
    for name in ours + others:
        (tmp_path / name).write_text("x")
    forget_unfinished(target)
    assert sorted(files_in(tmp_path)) == sorted(others)
    forget_unfinished(target)


def test_parts_are_read_back(tmp_path):
    target = tmp_path / "m.yaml"
    shared = [1.5, 2.0]
    made = {"a": {"times": shared, "again": shared}, "b": shared}
    first = Unfinished(target, MADE_WITH)
    for name, part in made.items():
        first.part(name, lambda part=part: part)
    second = Unfinished(target, dict(MADE_WITH))
    assert second.parts == made
    assert second.part("a", lambda: pytest.fail("made again")) == made["a"]
    assert Unfinished(target, {**MADE_WITH, "torch": "3"}).parts == {}


def make_parts(folder: Path, function: str, moment: str, calls: int) -> tuple[int, list[str]]:
    """Runs PROGRAM; returns its exit status and the parts that it made."""
    done = subprocess.run(
        [sys.executable, "-u", "-c", PROGRAM, function, moment, str(calls), *PARTS],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "runtime")])},
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.returncode, done.stdout.split()


@pytest.mark.parametrize(
    ("function", "moment", "is_kept"),
    [("fsync", "before", False), ("replace", "before", False), ("replace", "after", True)],
)
def test_work_resumes_after_a_kill_at_any_write(tmp_path, function, moment, is_kept):
    """A part whose file was in place when the process was killed is not repeated."""
    for finished in range(len(PARTS)):
        known = Unfinished(tmp_path / "m.yaml", {"torch": "2"}).parts
        assert list(known) == list(PARTS[:finished])
        status, made = make_parts(tmp_path, function, moment, 1)
        assert (status, made) == (-signal.SIGKILL, [PARTS[finished]])
        if not is_kept:
            assert Unfinished(tmp_path / "m.yaml", {"torch": "2"}).parts == known
            status, made = make_parts(tmp_path, function, moment, 2)  # the next write is finished
            assert status == (-signal.SIGKILL if finished + 1 < len(PARTS) else 0)
            assert made == list(PARTS[finished : finished + 2])
    parts = {name: {"us": {0.25: 1.5}, "name": name} for name in PARTS}
    if is_kept:
        assert Unfinished(tmp_path / "m.yaml", {"torch": "2"}).parts == parts
        assert make_parts(tmp_path, function, moment, 1) == (0, [])
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[1, 2",
        b"x",
        b"- 1",
        b"[" * 5000,
        yaml.safe_dump({"made_with": MADE_WITH}).encode(),
        yaml.safe_dump({"made_with": MADE_WITH, "parts": [1]}).encode(),
        b"a: &a [1, 1]\nmade_with: *a\n",
        b"made_with: 2026-13-45",
    ],
)
def test_damaged_checkpoint_is_ignored(tmp_path, content):
    target = tmp_path / "m.yaml"
    unfinished_path(target).write_bytes(content)
    found = Unfinished(target, MADE_WITH)
    assert found.parts == {}
    assert found.part("a", lambda: 1) == 1
    assert Unfinished(target, MADE_WITH).parts == {"a": 1}


def test_unreadable_checkpoint_is_refused(tmp_path, monkeypatch):
    target = tmp_path / "m.yaml"
    unfinished_path(target).write_text("x")

    def closed(path, _):
        raise FiddlerError(f"{path}: cannot read: Permission denied")

    monkeypatch.setattr(unfinished, "read_bytes", closed)
    with pytest.raises(FiddlerError, match="m.yaml.unfinished: cannot read: Permission denied"):
        Unfinished(target, MADE_WITH)
