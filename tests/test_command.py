"""How commands end: what the terminal cannot show, disks that are full, readers that leave, signals at any moment."""

import errno
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DEMO, ROOT

from fiddler_run import cli
from fiddler_run.cli import busy_note
from fiddler_run.command import SHOW_CURSOR, Terminated, exit_status
from fiddler_run.errors import FiddlerError

HIDE_CURSOR = "\x1b[?25l"
RUN = "import sys; from fiddler_run.command import fiddler_run; sys.exit(fiddler_run())"
OPT = "import sys; from fiddler_opt.entry import main; sys.exit(main())"
PLAN = ["plan", "--model", str(DEMO), "--machine", str(ROOT / "profiles/two-cores.machine.yaml"), "--gpu-mem", "0GB"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_output_that_cannot_be_written(number, capfd):
    def write() -> None:
        raise OSError(number, os.strerror(number))

    assert exit_status(write, "name") == 1
    assert capfd.readouterr().err == f"name: cannot write the output: {os.strerror(number)}\n"


def test_other_errors_keep_their_traceback():
    def fail() -> None:
        raise OSError(errno.EINVAL, "a bug")

    with pytest.raises(OSError, match="a bug"):
        exit_status(fail, "name")


def test_what_a_terminal_cannot_show(tmp_path, monkeypatch):
    for encoding, seen in (("ascii", b"caf? ??\n"), ("latin-1", b"caf\xe9 ??\n")):
        path = tmp_path / encoding
        with path.open("w", encoding=encoding) as file:
            monkeypatch.setattr(sys, "stdout", file)
            assert exit_status(lambda: print("café 日\ufffd"), "name") == 0
        assert path.read_bytes() == seen


def test_statuses(capsys):
    def refuse() -> None:
        raise FiddlerError("here: this is wrong; do that")

    def interrupt() -> None:
        raise KeyboardInterrupt

    assert str(FiddlerError("a\nb")) == "a b"  # a key or a path may hold a newline
    assert exit_status(refuse, "name") == 1
    assert exit_status(interrupt, "name") == 130
    assert capsys.readouterr().err == "name: here: this is wrong; do that\nname: interrupted\n"


def test_a_signal_to_end_unwinds_first(monkeypatch):
    """What was begun is put in order; then the process ends by that signal, as its parent expects."""
    order, ended = [], []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(5)
        finally:
            order.append("in order")

    monkeypatch.setattr(os, "kill", lambda pid, number: ended.append((pid, number, signal.getsignal(number))))
    before = signal.getsignal(signal.SIGTERM)
    exit_status(work, "name")
    signal.signal(signal.SIGTERM, before)
    assert order == ["in order"]
    assert ended == [(os.getpid(), signal.SIGTERM, signal.SIG_DFL)]
    assert not issubclass(Terminated, Exception)  # nobody catches it by accident


@pytest.mark.parametrize("delay_s", [0.1, 0.2, 0.4, 0.8, 1.6, 2.5])
@pytest.mark.parametrize("command", ["plan", "run"])
def test_an_early_interrupt_leaves_no_traceback(tmp_path, command, delay_s):
    """From when the command's own module runs; Python's start comes before."""
    program = [OPT, *PLAN, "-o", str(tmp_path / "p.yaml")] if command == "plan" else [RUN, "--plan", "plans/demo.yaml", "Once"]
    program[0] = "import os; os.write(1, b'.'); " + program[0]
    command = [sys.executable, "-c", *program]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.read(1)
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert process.returncode in (0, 130)
    if process.returncode == 130:
        assert errors.rstrip().endswith("interrupted")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_cursor_is_shown_again(number):
    """On a terminal, while a progress bar or a spinner hides it."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", RUN, "--plan", "plans/demo.yaml", "Once", "--max-new-tokens", "100"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = b""
    while HIDE_CURSOR.encode() not in shown:
        shown += os.read(ours, 4096)
    process.send_signal(number)
    process.wait(timeout=60)
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # the other end is closed
        pass
    assert shown.rfind(SHOW_CURSOR.encode()) > shown.rfind(HIDE_CURSOR.encode())
    assert process.returncode in (-number, 128 + number)


def test_stdin_that_is_closed_or_no_text(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["--plan", "plans/demo.yaml", "-"]) == 1
    assert "the prompt is to come from stdin, which is closed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\xef\xbb\xbfOnce upon a time\n", None), (b"caf\xe9", "not UTF-8 text"), (b"x" * 64_000_001, "larger than 64 MB")],
)
def test_stdin(monkeypatch, tmp_path, content, words):
    path = tmp_path / "stdin"
    path.write_bytes(content)
    with path.open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        if words is None:
            assert cli.read_stdin() == "Once upon a time"
            return
        with pytest.raises(FiddlerError, match=words):
            cli.read_stdin()


def test_a_plan_from_a_pipe_is_read_once(capsys):
    reading, writing = os.pipe()
    os.write(writing, Path(ROOT / "plans/demo.yaml").read_bytes())
    os.close(writing)
    assert cli.main(["--plan", f"/dev/fd/{reading}", "--model", str(DEMO), "Once", "--max-new-tokens", "3"]) == 0
    os.close(reading)
    assert capsys.readouterr().out.startswith(" ")


def test_an_answer_takes_the_room_that_is_left(capsys):
    """Without --max-new-tokens, a prompt that fits is never refused for tokens that nobody asked for."""
    prompt = "Once upon a time there was a bear. " * 42
    assert cli.main(["--plan", "plans/demo.yaml", prompt]) == 0
    assert "output tokens" in capsys.readouterr().err
    assert cli.main(["--plan", "plans/demo.yaml", prompt, "--max-new-tokens", "112"]) == 1
    assert "together more than the plan's context of 512" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--temperature", "1e-300"], ["--temperature", "nan"], ["--temperature", "-1"], ["--max-new-tokens", "9" * 400]]
)
def test_numbers_beyond_reason_are_usage_errors(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--plan", "plans/demo.yaml", "Once", *flags])
    assert ended.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_other_programs_are_named_where_they_take_cores():
    assert busy_note(None, 2, 2) is None
    assert busy_note(0.1, 2, 2) is None
    assert busy_note(1.0, 8, 4) is None  # there are cores left
    assert busy_note(1.0, 2, 2).startswith("note: other programs took 1.0 of 2 cores, the plan counts on 2")
