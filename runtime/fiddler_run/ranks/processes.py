"""The ends of processes: of ranks that were started here, and of this one."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence


def ending(process: subprocess.Popen) -> str:
    """In words, how a process has ended."""
    try:
        status = process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return "closed its connection"
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"has ended with status {status}"


def end_processes(processes: Sequence[subprocess.Popen], patience_s: float) -> None:
    """Waits for processes to end, and kills those that do not."""
    deadline_s = time.monotonic() + patience_s
    for process in processes:
        try:
            process.wait(timeout=max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def exit_without(thread: threading.Thread, patience_s: float) -> None:
    """Waits for a thread at the end of this process: Python crashes if it stops one inside NCCL."""
    thread.join(patience_s)
    if thread.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
