"""Computes experts' blocks on the CPU: by cpu.cpp, or by PyTorch where cpu.cpp cannot be used.

Both start a job in `submit` and finish it in `wait`, where the calling thread helps; Python is free
in between. The compiled kernel also accepts jobs whose tokens and experts a GPU names later.
"""

import threading
import time

import numpy as np
import torch

from fiddler_run.encodings.base import Encoding
from fiddler_run.kernels.cpu_calls import CpuCall, CpuCalls
from fiddler_run.kernels.decode_layer import DecodeInputs, DecodeLayer, route_arguments
from fiddler_run.kernels.pool import Experts, Pool
from fiddler_run.kernels.pytorch import apply_blocks
from fiddler_run.plan.activation import SILU, Activation

NUMBERED = ("bf16", "lossless12")  # as in layout.h
FUNCTIONS = ("silu", "gelu_tanh", "relu2")  # as in activation.h


class CpuExperts:
    """Computes blocks in host memory, stored as `block_format`, with the experts' activation."""

    variant = "PyTorch"
    finishes_alone = False  # True if a job finishes without `wait`

    def __init__(self, block_format: Encoding, activation: Activation = SILU):
        self.block_format = block_format
        self.activation = activation
        self.lock = threading.RLock()

    def submit(
        self,
        calls: CpuCalls,
        states: torch.Tensor,
        output: torch.Tensor,
        flag: torch.Tensor | None = None,
        job: int = 0,
    ) -> None:
        """Starts a job: output [tokens, hidden] float32 = the calls' weighted sums over the states.

        `states` [tokens, hidden] and `output` are contiguous in host memory and must stay untouched
        until the job is finished. Then `flag` [1] int64 is set to `job`. At most one unfinished job
        may precede it; older ones are finished first.
        """
        raise NotImplementedError

    def submit_routed(
        self,
        layer: DecodeLayer,
        inputs: DecodeInputs,
        traffic: np.ndarray,
        output: torch.Tensor,
        flag: torch.Tensor,
        job: int,
    ) -> None:
        """Starts a job that first waits for the GPU. Requires `finishes_alone`.

        Args:
            traffic: [3] int64, incremented by the calls' blocks: resident, streamed, CPU.
        """
        raise NotImplementedError

    def wait(self, max_pending: int = 0, flag: torch.Tensor | None = None) -> None:
        """Waits until at most `max_pending` (0 or 1) jobs are unfinished. Ctrl-C interrupts it.

        Raises:
            FiddlerError: a job that sets `flag` (None: any job) timed out waiting for the GPU.
        """
        raise NotImplementedError

    def abandon(self, flag: torch.Tensor) -> None:
        """Ends the jobs that would set `flag`, without a result, and finishes all others."""
        raise NotImplementedError

    def times_s(self) -> tuple[float, float]:
        """When the last job that was waited for started to compute, and when it was finished.

        On the clock of `time.perf_counter`.
        """
        raise NotImplementedError

    def apply(self, blocks: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The sum of `blocks` [count, block_bytes] applied to `states` [n, hidden], float32."""
        output = torch.empty(states.shape, dtype=torch.float32)
        weights = np.ones(len(states), dtype=np.float32)
        everything = CpuCall(blocks, np.arange(len(states)), weights)
        with self.lock:
            self.submit(CpuCalls.of([everything]), states.contiguous(), output)
            self.wait()
        return output


class CompiledExperts(CpuExperts):
    """The kernel of cpu.cpp, for blocks in one of NUMBERED encodings."""

    def __init__(self, block_format: Encoding, pool: Pool, activation: Activation = SILU):
        super().__init__(block_format, activation)
        self.pool = pool
        self.lock = pool.lock  # several models, each in its own thread, may share a pool
        self.variant = pool.variant
        self.finishes_alone = pool.finishes_alone
        self._experts = Experts(
            block_format.hidden_size,
            block_format.block_neurons,
            NUMBERED.index(block_format.name),
            FUNCTIONS.index(activation.function),
            activation.alpha,
            activation.offset,
            activation.bound,
        )

    def submit(self, calls, states, output, flag=None, job=0):
        assert states.dtype == torch.bfloat16, states.dtype
        assert states.is_contiguous()
        self.pool.submit(self._experts, states, calls, output, flag, job)

    def submit_routed(self, layer, inputs, traffic, output, flag, job):
        route = route_arguments(layer, inputs, traffic)
        self.pool.submit_routed(self._experts, route, inputs, output, flag, job, (layer, traffic))

    def wait(self, max_pending=0, flag=None):
        self.pool.wait(max_pending, flag)

    def abandon(self, flag):
        self.pool.abandon(flag)

    def times_s(self):
        return self.pool.times_s()


class PyTorchExperts(CpuExperts):
    """PyTorch's own operations, for any encoding, dtype and size. A job runs inside `wait`."""

    def __init__(self, block_format: Encoding, activation: Activation = SILU):
        super().__init__(block_format, activation)
        self._job = None
        self._times_s = (0.0, 0.0)

    def submit(self, calls, states, output, flag=None, job=0):
        self.wait()
        self._job = calls, states, output, flag, job

    def wait(self, max_pending=0, flag=None):
        if self._job is None:
            return
        started_s = time.perf_counter()
        calls, states, output, flag, job = self._job
        self._job = None
        output.zero_()
        for call in calls.each(self.block_format.block_bytes):
            rows = torch.from_numpy(call.rows)
            weights = torch.from_numpy(call.weights).unsqueeze(1)
            result = apply_blocks(
                self.block_format, call.blocks, states[rows], activation=self.activation
            )
            output.index_add_(0, rows, result * weights)
        self._times_s = (started_s, time.perf_counter())
        if flag is not None:
            flag.fill_(job)

    def abandon(self, flag):
        self._job = None

    def times_s(self):
        return self._times_s

    def apply(self, blocks, states):
        return apply_blocks(self.block_format, blocks, states, activation=self.activation)
