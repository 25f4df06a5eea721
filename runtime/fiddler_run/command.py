"""How a command starts and ends: signals, output that cannot be written, exit status. Imports
nothing that takes time.
"""

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
# How often a thread of PyTorch's libgomp looks for work before it sleeps: about as long as waking
# it takes. By default it looks a hundred times as long, and while another program has one of the
# cores, each operation takes a time slice of the scheduler.
GOMP_SPINCOUNT = "2000"


class Terminated(BaseException):
    """The process has been asked to end; what it holds is put in order first."""

    def __init__(self, signal_number: int):
        self.signal_number = signal_number


def fiddler_run() -> int:
    return start("fiddler-run", "fiddler_run.cli")


def start(name: str, module: str) -> int:
    """Runs `main()` of a module, whose import takes a while; its exit status."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", GOMP_SPINCOUNT)
    with quitting_at_once(name):
        main = importlib.import_module(module).main
    status = main()
    # nothing is left but Python's own end, which would print a traceback
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return status


def exit_status(command: Callable[[], None], name: str) -> int:
    """Runs a command: 0 done, 1 a FiddlerError said in one line, 130 interrupted; anything else
    keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # what a terminal cannot show
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
    except BrokenPipeError:  # the reader of stdout went away, as in `fiddler-run ... | head -1`
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
    """Ctrl-C ends the process as it is, for imports: a library may swallow the exception, and
    nothing needs to be put in order.
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
    """Handles signals, but those that the process was started to ignore, as by `nohup`."""
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
    """Whatever is still in its buffer goes nowhere."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
