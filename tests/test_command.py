"""How commands end: unprintable characters, failed writes, refusals, and signals at any moment."""

import errno
import io
import os
import pty
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest
from command_line import MACHINE, SHIPPED_PLAN, started
from conftest import DEMO, ROOT
from seeds import spread

from fiddler_run.command import SHOW_CURSOR, Terminated, exit_status, start
from fiddler_run.errors import FiddlerError

READY = b"."  # the first byte that a fork writes
HIDE_CURSOR = "\x1b[?25l"
PLAN = ("plan", "--model", DEMO, "--machine", MACHINE, "--gpu-mem", "0GB")


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Sets the default handlers: a shell may have started the tests with signals ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_failed_write_of_the_output_exits_with_1(number, capfd):
    def write() -> None:
        raise OSError(number, os.strerror(number))

    assert exit_status(write, "name") == 1
    assert capfd.readouterr().err == f"name: cannot write the output: {os.strerror(number)}\n"


def test_other_errors_keep_their_traceback():
    def fail() -> None:
        raise OSError(errno.EINVAL, "a bug")

    with pytest.raises(OSError, match="a bug"):
        exit_status(fail, "name")


def test_unprintable_characters_are_replaced(tmp_path, monkeypatch):
    for encoding, seen in (("ascii", b"caf? ??\n"), ("latin-1", b"caf\xe9 ??\n")):
        path = tmp_path / encoding
        with path.open("w", encoding=encoding) as file:
            monkeypatch.setattr(sys, "stdout", file)
            assert exit_status(lambda: print("café 日\ufffd"), "name") == 0
        assert path.read_bytes() == seen


def test_refusal_exits_with_1_and_interrupt_with_130(capsys):
    def refuse() -> None:
        raise FiddlerError("here: this is wrong; do that")

    def interrupt() -> None:
        raise KeyboardInterrupt

    assert str(FiddlerError("a\nb")) == "a b"  # a key or a path may hold a newline
    assert exit_status(refuse, "name") == 1
    assert exit_status(interrupt, "name") == 130
    assert capsys.readouterr().err == "name: here: this is wrong; do that\nname: interrupted\n"


def test_sigterm_unwinds_before_the_process_ends(monkeypatch):
    """The command cleans up; then the process ends by that signal, as its parent expects."""
    order = []
    ended = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(5)
        finally:
            order.append("in order")

    monkeypatch.setattr(
        os, "kill", lambda pid, number: ended.append((pid, number, signal.getsignal(number)))
    )
    before = signal.getsignal(signal.SIGTERM)
    exit_status(work, "name")
    signal.signal(signal.SIGTERM, before)
    assert order == ["in order"]
    assert ended == [(os.getpid(), signal.SIGTERM, signal.SIG_DFL)]
    assert not issubclass(Terminated, Exception)  # nobody catches it by accident


def test_interrupt_while_importing_exits_with_130():
    """The signal comes 0.3 s after the program's first line."""
    arguments = ("--plan", "plans/demo.yaml", "Once")
    with started("fiddler-run", *arguments, cwd=ROOT, first="print('.', flush=True)") as process:
        process.stdout.read(1)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert process.returncode == 130
    assert errors.rstrip().endswith("fiddler-run: interrupted")


AT_ONCE = """
import atexit, os, sys, types
from fiddler_run import command

def main():
    print("the last line")
    command.ends_at_once.set()
    return 1

sys.modules["slow"] = types.SimpleNamespace(main=main)
atexit.register(os.abort)
sys.exit(command.start("name", "slow"))
"""


def test_a_process_that_cannot_end_in_order_ends_at_once():
    """Without Python's shutdown, which would crash or wait. Its output is written."""
    found = subprocess.run(
        [sys.executable, "-c", AT_ONCE], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout, found.stderr) == (1, "the last line\n", "")


class Forked:
    """A command in a fork of this process, where all is imported; `terminal`: stderr is one."""

    def __init__(self, command: Callable[[], int], terminal: bool = False):
        self._ours, theirs = pty.openpty() if terminal else os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(command, theirs)
        os.close(theirs)

    @staticmethod
    def _become(command: Callable[[], int], stderr: int) -> NoReturn:
        status = 99
        try:
            signal.alarm(60)
            os.dup2(stderr, 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            sys.stdout = io.StringIO()
            os.write(2, READY)
            status = command()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def read(self) -> bytes:
        """The next bytes of its stderr; none after its end."""
        try:
            return os.read(self._ours, 4096)
        except OSError:  # a terminal's other end is closed
            return b""

    def end(self) -> tuple[int, bytes]:
        """Its exit status, negative for a signal, and the rest of its stderr."""
        errors = b"".join(iter(self.read, b""))
        os.close(self._ours)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), errors


COMMANDS = {
    "plan": lambda folder: start_with("fiddler-opt", *PLAN, "-o", folder / "p.yaml"),
    "run": lambda folder: start_with("fiddler-run", "--plan", SHIPPED_PLAN, "Once"),
}


def start_with(command: str, *arguments: object) -> int:
    sys.argv = [command, *map(str, arguments)]
    return start(command, f"{command.replace('-', '_')}.cli")


@pytest.mark.parametrize("delay_s", spread([0.01, 0.03, 0.1, 0.2, 0.4, 0.8], 2))
@pytest.mark.parametrize("command", COMMANDS)
def test_interrupt_leaves_no_traceback(tmp_path, command, delay_s):
    """At any moment of loading, generating, solving and writing."""
    forked = Forked(lambda: COMMANDS[command](tmp_path))
    assert forked.read().startswith(READY)
    time.sleep(delay_s)
    os.kill(forked.pid, signal.SIGINT)
    status, errors = forked.end()
    assert b"Traceback" not in errors
    assert status in (0, 130)
    if status == 130:
        assert errors.rstrip().endswith(b"interrupted")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_restores_the_cursor(number):
    """On a terminal, while a progress bar or a spinner hides it."""
    arguments = ("--plan", SHIPPED_PLAN, "Once", "--max-new-tokens", "100")
    forked = Forked(lambda: start_with("fiddler-run", *arguments), terminal=True)
    shown = b""
    while HIDE_CURSOR.encode() not in shown:
        piece = forked.read()
        assert piece, shown
        shown += piece
    os.kill(forked.pid, number)
    status, rest = forked.end()
    shown += rest
    assert shown.rfind(SHOW_CURSOR.encode()) > shown.rfind(HIDE_CURSOR.encode())
    assert status in (-number, 128 + number)
