"""A pool of CPU threads that run jobs one after the other, shared by the models of a process."""

import ctypes
import os
import threading
from collections import deque
from functools import cache

import numpy as np
import torch

from fiddler_run.errors import FiddlerError
from fiddler_run.kernels.cpu_calls import CpuCalls
from fiddler_run.kernels.library import library, supported_variants
from fiddler_run.system.host import core_order

WAIT_NS = 50_000_000  # per call into the kernel, during which Python cannot handle signals


class Experts(ctypes.Structure):
    """ExpertArguments of job.h: the format of blocks and their activation."""

    _fields_ = [
        ("hidden", ctypes.c_int),
        ("neurons", ctypes.c_int),
        ("encoding", ctypes.c_int),
        ("function", ctypes.c_int),
        ("alpha", ctypes.c_float),
        ("offset", ctypes.c_float),
        ("limit", ctypes.c_float),
    ]


class Pool:
    """The threads of cpu.cpp. `submit*`, `wait`, `abandon` and `read` hold its lock.

    Idle threads spin for `spin_us` before they sleep, because waking them takes as long as a small
    job. `pinned`: each thread stays on its own CPU, except the caller of `wait`.
    """

    def __init__(
        self, threads: int, spin_us: int = 20, pinned: bool = False, variant: str | None = None
    ):
        self._library = library()
        self.variant = variant or supported_variants()[0]
        if self.variant not in supported_variants():
            known = ", ".join(supported_variants())
            raise ValueError(f"{self.variant}: not one of {known}, which this CPU has")
        cpus = None
        if pinned:
            cpus = (ctypes.c_int * (threads - 1))(*(core_order() * threads)[1:threads])
        self._pool = self._library.fiddler_pool_create(
            self.variant.encode(), threads, spin_us, cpus
        )
        self.lock = threading.RLock()
        self.finishes_alone = threads > 1
        self._pid = os.getpid()
        self._timed_out: set[int] = set()  # flags of jobs that timed out waiting for a GPU
        self._in_use = deque(maxlen=3)  # keeps alive what the unfinished jobs and a new one use

    def submit(self, experts: Experts, states, calls, output, flag, job: int) -> None:
        """Starts a job; see `CpuExperts.submit`."""
        described = _described(calls)
        with self.lock:
            self._finish(max_pending=1)  # here, because signals are handled here
            self._in_use.append((flag, None, (calls, states, output)))
            self._library.fiddler_submit(
                self._pool,
                ctypes.byref(experts),
                states.data_ptr(),
                len(states),
                described.ctypes.data,
                len(described),
                output.data_ptr(),
                None if flag is None else flag.data_ptr(),
                job,
            )

    def submit_routed(self, experts: Experts, route, inputs, output, flag, job: int, used) -> None:
        """Starts a job that first waits for the GPU. `used` is kept alive until it is finished."""
        with self.lock:
            self._finish(max_pending=1)
            self._in_use.append((flag, inputs, (used, output)))
            self._library.fiddler_submit_routed(
                self._pool,
                ctypes.byref(experts),
                inputs.states.data_ptr(),
                len(inputs.states),
                ctypes.byref(route),
                output.data_ptr(),
                flag.data_ptr(),
                job,
            )

    def wait(self, max_pending: int, flag: torch.Tensor | None) -> None:
        """Waits until at most `max_pending` jobs are unfinished.

        Raises:
            FiddlerError: a job that sets `flag` (None: any job) timed out waiting for the GPU.
        """
        with self.lock:
            self._finish(max_pending)
            ours = self._timed_out if flag is None else self._timed_out & {flag.data_ptr()}
            self._timed_out = self._timed_out - ours
        if ours:
            torch.cuda.synchronize()  # raises the GPU's error, if it failed
            raise FiddlerError(
                "timed out waiting for the GPU; check what else is running on it, then reload"
                " the model"
            )

    def abandon(self, flag: torch.Tensor) -> None:
        """Ends the jobs that would set `flag`, without a result, and finishes all others."""
        with self.lock:
            self._library.fiddler_abandon(self._pool, flag.data_ptr())
            self._finish(max_pending=0)
            self._timed_out.discard(flag.data_ptr())

    def _finish(self, max_pending: int) -> None:
        while not self._library.fiddler_wait(self._pool, max_pending, WAIT_NS):
            pass
        while len(self._in_use) > max_pending:
            flag, inputs, _ = self._in_use.popleft()
            if inputs is not None and inputs.timed_out.item():
                inputs.timed_out.zero_()
                self._timed_out.add(flag.data_ptr())

    def times_s(self) -> tuple[float, float]:
        """When the last job that was waited for started to compute, and when it was finished."""
        started_ns = self._library.fiddler_started_ns(self._pool)
        finished_ns = self._library.fiddler_finished_ns(self._pool)
        return started_ns * 1e-9, finished_ns * 1e-9

    def read(self, tensor: torch.Tensor) -> None:
        """Reads a tensor in host memory with all threads and plain loads."""
        with self.lock:
            self._library.fiddler_read(self._pool, tensor.data_ptr(), tensor.nbytes)

    def __del__(self):
        forked = os.getpid() != getattr(self, "_pid", None)  # a forked process has no such threads
        if getattr(self, "_pool", None) and not forked:
            self._library.fiddler_pool_destroy(self._pool)


shared_pool = cache(Pool)  # one pool per number of threads and process
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=shared_pool.cache_clear)


# CallArguments of job.h
_CALL = np.dtype(
    [
        ("blocks", np.int64),
        ("rows", np.int64),
        ("weights", np.int64),
        ("num_blocks", np.int32),
        ("tokens", np.int32),
    ]
)


def _described(calls: CpuCalls) -> np.ndarray:
    for array, dtype in ((calls.rows, np.int64), (calls.weights, np.float32)):
        assert array.dtype == dtype
        assert array.flags.c_contiguous
    described = np.empty(len(calls), _CALL)
    described["blocks"] = calls.address
    described["rows"] = calls.rows.ctypes.data + calls.rows.itemsize * calls.start
    described["weights"] = calls.weights.ctypes.data + calls.weights.itemsize * calls.start
    described["num_blocks"] = calls.count
    described["tokens"] = calls.stop - calls.start
    return described
