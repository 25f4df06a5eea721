"""Starts and ends a command: signals, output errors, exit status. Imports nothing slow."""

import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from fiddler_run.errors import FiddlerError

SHOW_CURSOR = "\x1b[?25h"
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
# How many times a thread of PyTorch's libgomp polls for work before it sleeps. This takes about as
# long as a wake-up. The default is a hundred times longer; while another program uses one of the
# cores, every operation then costs a time slice of the scheduler.
GOMP_SPINCOUNT = "2000"
# Set if a library's threads would crash the end of this process, or wait forever.
ends_at_once = threading.Event()


class Terminated(BaseException):
    """Raised on SIGTERM and SIGHUP, so that the process cleans up before it ends."""

    def __init__(self, signal_number: int):
        self.signal_number = signal_number


def fiddler_run() -> int:
    return start("fiddler-run", "fiddler_run.cli")


def start(name: str, module: str) -> int:
    """Runs `main()` of a module whose import is slow. Returns the exit status."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", GOMP_SPINCOUNT)
    with quitting_at_once(name):
        main = importlib.import_module(module).main
    status = main()
    # only Python's shutdown remains, which would print a traceback
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if ends_at_once.is_set():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, AttributeError):
                stream.flush()
        os._exit(status)
    return status


def exit_status(command: Callable[[], None], name: str) -> int:
    """Runs a command. Returns 0 if done, 1 for a FiddlerError, 130 if interrupted.

    A FiddlerError is printed in one line. Any other exception keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # for characters that the terminal cannot show
    try:
        with _terminable():
            command()
            if sys.stdout is not None:
                sys.stdout.flush()
    except FiddlerError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except Terminated as ended:
        signal.signal(ended.signal_number, signal.SIG_DFL)
        os.kill(os.getpid(), ended.signal_number)
    except BrokenPipeError:  # the reader of stdout has closed it, as in `fiddler-run ... | head -1`
        _drop_stdout()
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        _drop_stdout()
        print(f"{name}: cannot write the output: {error.strerror}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def quitting_at_once(name: str) -> Iterator[None]:
    """Makes Ctrl-C end the process at once, during imports.

    A library may swallow the exception, and there is nothing to clean up.
    """

    def quit(signal_number: int, _) -> None:
        cursor = SHOW_CURSOR if sys.stderr is not None and sys.stderr.isatty() else ""
        with suppress(OSError):
            os.write(2, f"{cursor}{name}: interrupted\n".encode())
        os._exit(128 + signal_number)

    with _handling({signal.SIGINT: quit, **dict.fromkeys(ENDING_SIGNALS, quit)}):
        yield


@contextmanager
def _terminable() -> Iterator[None]:
    def end(signal_number: int, _) -> None:
        raise Terminated(signal_number)

    with _handling(dict.fromkeys(ENDING_SIGNALS, end)):
        yield


@contextmanager
def _handling(handlers: dict[int, Callable]) -> Iterator[None]:
    """Installs signal handlers, except for signals that were ignored at start, as by `nohup`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        if before[number] != signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _drop_stdout() -> None:
    """Discards buffered output."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
