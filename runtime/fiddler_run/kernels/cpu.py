"""Experts' blocks on the CPU: the compiled kernel of cpu.cpp, or PyTorch where that cannot serve.

Both take a job (`submit`), let Python go on, and finish it in `wait`, where the calling thread takes part. The compiled kernel also
takes jobs whose tokens and experts a GPU will name later (`submit_routed`).
"""

import ctypes
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import torch

from fiddler_run.errors import FiddlerError
from fiddler_run.host import core_order
from fiddler_run.kernels.pytorch import apply_blocks
from fiddler_run.kernels.routed import RoutedInput, RoutedLayer, route_of

VARIANTS = ("amx", "avx512bf16", "avx512", "avx2", "portable")  # best first
ALIGNMENT = 32  # what the kernel needs hidden size and block_neurons to be multiples of
WAIT_NS = 50_000_000  # at once in the kernel, where Python hears no signal


@dataclass(frozen=True)
class CpuCall:
    """Some blocks [count, block_elements] of one expert and the tokens that call it.

    `rows` [n] int64 into the layer's tokens and the router's `weights` [n] float32, both contiguous.
    """

    blocks: torch.Tensor
    rows: np.ndarray
    weights: np.ndarray


class CpuExperts:
    """Computes experts' blocks in host memory with `threads` threads, the caller of `wait` included."""

    variant = "PyTorch"
    finishes_alone = False  # whether a job is finished without `wait`

    def __init__(self):
        self.lock = threading.RLock()  # several models, each in its own thread, may share one pool

    def submit(
        self,
        calls: Sequence[CpuCall],
        states: torch.Tensor,
        output: torch.Tensor,
        finished: torch.Tensor | None = None,
        job: int = 0,
    ) -> None:
        """Starts a job: output [tokens, hidden] float32 = the calls' weighted sums over states [tokens, hidden].

        Both lie in host memory, contiguous, and must stay untouched until the job is finished; then `finished` [1] int64 is set
        to `job`. The one before the job under way is finished first.
        """
        raise NotImplementedError

    def wait(self, but: int = 0, finished: torch.Tensor | None = None) -> None:
        """Returns when all jobs but the last `but`, at most 1, are finished. Signals such as Ctrl-C are handled meanwhile.

        Raises:
            FiddlerError: the GPU has not sent what one of them needs, of those that set the flag `finished` (None: of any).
        """
        raise NotImplementedError

    def abandon(self, finished: torch.Tensor) -> None:
        """Ends the jobs under way that would set this flag; they leave no result. Returns when all jobs are finished."""
        raise NotImplementedError

    def times_s(self) -> tuple[float, float]:
        """When the last job that was waited for began to compute and was finished, on the clock of `time.perf_counter`."""
        raise NotImplementedError

    def apply(self, blocks: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The sum of `blocks` [count, block_elements] applied to `states` [n, hidden]: [n, hidden] float32."""
        output = torch.empty(states.shape, dtype=torch.float32)
        everything = CpuCall(blocks, np.arange(len(states)), np.ones(len(states), dtype=np.float32))
        with self.lock:
            self.submit([everything], states.contiguous(), output)
            self.wait()
        return output


class CompiledExperts(CpuExperts):
    """The kernel of cpu.cpp. For bfloat16; hidden size and block_neurons must be multiples of `ALIGNMENT`.

    Its threads wait for the next job in a loop for `spin_us` before they sleep: waking all takes as long as a small job.
    `pinned`: each stays on a CPU of its own, except the caller of `wait`.
    """

    def __init__(self, threads: int, spin_us: int = 20, pinned: bool = False, variant: str | None = None):
        super().__init__()
        self._library = library()
        self.variant = variant or supported_variants()[0]
        if self.variant not in supported_variants():
            raise ValueError(f"{self.variant}: not one of {', '.join(supported_variants())}, which this CPU has")
        cpus = (ctypes.c_int * (threads - 1))(*(core_order() * threads)[1:threads]) if pinned else None
        self._pool = self._library.fiddler_pool_create(self.variant.encode(), threads, spin_us, cpus)
        self.finishes_alone = threads > 1
        self._pid = os.getpid()
        self._timed_out: set[int] = set()  # flags `finished` of jobs that did, waiting for a GPU
        self._in_use = deque(maxlen=3)  # what the jobs under way, and one that is being submitted, work on

    def submit(self, calls, states, output, finished=None, job=0):
        hidden = states.shape[1]
        assert states.dtype == torch.bfloat16, states.dtype
        assert states.is_contiguous()
        described = (_Call * len(calls))(*map(_describe, calls))
        block_neurons = calls[0].blocks.shape[1] // (3 * hidden) if calls else ALIGNMENT
        arguments = hidden, block_neurons, states.data_ptr(), len(states), described, len(calls), output.data_ptr()
        with self.lock:
            self._finish_all_but(1)  # here, where signals are handled
            self._in_use.append((finished, None, (calls, states, output)))
            self._library.fiddler_submit(self._pool, *arguments, None if finished is None else finished.data_ptr(), job)

    def submit_routed(
        self,
        layer: RoutedLayer,
        given: RoutedInput,
        block_neurons: int,
        traffic: np.ndarray,
        output: torch.Tensor,
        finished: torch.Tensor,
        job: int,
    ) -> None:
        """As `submit`: starts a job that begins with waiting for the GPU. `finishes_alone` must hold.

        Args:
            traffic: [3] int64, to which the blocks of the calls are added: resident, streamed, on the CPU.
        """
        route, (tokens, hidden) = route_of(layer, given, traffic), given.states.shape
        arguments = hidden, block_neurons, given.states.data_ptr(), tokens, ctypes.byref(route), output.data_ptr()
        with self.lock:
            self._finish_all_but(1)
            self._in_use.append((finished, given, (layer, traffic, output)))
            self._library.fiddler_submit_routed(self._pool, *arguments, finished.data_ptr(), job)

    def wait(self, but=0, finished=None):
        with self.lock:
            self._finish_all_but(but)
            ours = self._timed_out if finished is None else self._timed_out & {finished.data_ptr()}
            self._timed_out = self._timed_out - ours
        if ours:
            torch.cuda.synchronize()  # raises what the GPU failed with
            raise FiddlerError("the GPU does not answer; see whether other programs keep it busy, and load the model again")

    def abandon(self, finished):
        with self.lock:
            self._library.fiddler_abandon(self._pool, finished.data_ptr())
            self._finish_all_but(0)
            self._timed_out.discard(finished.data_ptr())

    def _finish_all_but(self, but: int) -> None:
        while not self._library.fiddler_wait(self._pool, but, WAIT_NS):
            pass
        while len(self._in_use) > but:
            finished, given, _ = self._in_use.popleft()
            if given is not None and given.timed_out.item():
                given.timed_out.zero_()
                self._timed_out.add(finished.data_ptr())

    def times_s(self):
        return self._library.fiddler_started_ns(self._pool) * 1e-9, self._library.fiddler_finished_ns(self._pool) * 1e-9

    def read(self, tensor: torch.Tensor) -> None:
        """Reads a tensor in host memory with all threads and plain loads: the rate that the memory allows."""
        self._library.fiddler_read(self._pool, tensor.data_ptr(), tensor.nbytes)

    def __del__(self):
        if getattr(self, "_pool", None) and os.getpid() == self._pid:  # a forked process has none of the threads
            self._library.fiddler_pool_destroy(self._pool)


class PyTorchExperts(CpuExperts):
    """PyTorch's own operations, for any dtype and size; the job runs in `wait`."""

    def __init__(self):
        super().__init__()
        self._job = None
        self._times_s = 0.0, 0.0

    def submit(self, calls, states, output, finished=None, job=0):
        self.wait()
        self._job = calls, states, output, finished, job

    def wait(self, but=0, finished=None):
        if self._job is None:
            return
        started_s = time.perf_counter()
        (calls, states, output, flag, job), self._job = self._job, None
        output.zero_()
        for call in calls:
            rows, weights = torch.from_numpy(call.rows), torch.from_numpy(call.weights)
            output.index_add_(0, rows, apply_blocks(call.blocks, states[rows]) * weights.unsqueeze(1))
        self._times_s = started_s, time.perf_counter()
        if flag is not None:
            flag.fill_(job)

    def abandon(self, finished):
        self._job = None

    def times_s(self):
        return self._times_s


def cpu_experts(threads: int, pinned: bool, spin_us: int, dtype: torch.dtype, hidden: int, block_neurons: int) -> CpuExperts:
    """The fastest of the two for such blocks."""
    if dtype == torch.bfloat16 and hidden % ALIGNMENT == 0 and block_neurons % ALIGNMENT == 0 and compiled():
        return _pool(threads, spin_us, pinned)
    return PyTorchExperts()


_pool = cache(CompiledExperts)  # shared by the models of a process that use as many threads
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of the threads


@cache
def compiled() -> bool:
    """Whether the kernel was built; if not, says so once."""
    if library() is None:
        logging.getLogger("fiddler_run").warning(
            "the CPU kernel is not built, PyTorch computes experts at about half the speed; "
            "install a C++20 compiler such as g++, then install fiddler-opt again"
        )
    return library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, which the installation of this package builds where it finds a compiler."""
    names = (Path(__file__).with_name("_cpu" + suffix) for suffix in EXTENSION_SUFFIXES)
    found = next((path for path in names if path.exists()), None)
    if found is None:
        return None
    loaded = ctypes.CDLL(os.fspath(found))
    pointer, integer, text, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint64
    loaded.fiddler_supports.argtypes = [text]
    loaded.fiddler_pool_create.argtypes, loaded.fiddler_pool_create.restype = [text, integer, integer, pointer], pointer
    loaded.fiddler_pool_destroy.argtypes = [pointer]
    job = [pointer, integer, integer, pointer, integer, pointer, integer, pointer, pointer, ctypes.c_int64]
    loaded.fiddler_submit.argtypes = job
    routed = [pointer, integer, integer, pointer, integer, pointer, pointer, pointer, ctypes.c_int64]
    loaded.fiddler_submit_routed.argtypes = routed
    loaded.fiddler_wait.argtypes = [pointer, integer, ctypes.c_int64]
    loaded.fiddler_abandon.argtypes = [pointer, pointer]
    for time_of in (loaded.fiddler_started_ns, loaded.fiddler_finished_ns):
        time_of.argtypes, time_of.restype = [pointer], ctypes.c_int64
    loaded.fiddler_read.argtypes, loaded.fiddler_read.restype = [pointer, pointer, size], size
    return loaded


@cache
def supported_variants() -> list[str]:
    """The instruction sets that this build of the kernel and this CPU both have, best first."""
    return [name for name in VARIANTS if library().fiddler_supports(name.encode())]


class _Call(ctypes.Structure):
    _fields_ = [
        ("blocks", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int),
        ("tokens", ctypes.c_int),
    ]


def _describe(call: CpuCall) -> _Call:
    pointers = call.blocks.data_ptr(), call.rows.ctypes.data, call.weights.ctypes.data
    return _Call(*pointers, len(call.blocks), len(call.rows))
