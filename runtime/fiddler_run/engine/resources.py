"""The resources that all layers of a model share: CPU threads, link, buffers. No decisions."""

import threading
from collections.abc import Callable

import numpy as np
import torch

from fiddler_run.encodings.base import Encoding
from fiddler_run.engine.buffers import PinnedBuffers
from fiddler_run.engine.calls import Traffic
from fiddler_run.engine.cpu_jobs import CpuJobs
from fiddler_run.engine.ring import StagingRing
from fiddler_run.engine.timeline import Timeline
from fiddler_run.errors import FiddlerError
from fiddler_run.kernels.decode_layer import GPU_TIMEOUT_S
from fiddler_run.kernels.table import Kernels


class Resources:
    """The shared resources of one model's engine.

    `kernels` compute blocks, in `dtype`. `output_dtype` is that of a layer's output. `jobs` are the
    CPU's. `ring` is None if nothing is streamed. `counted`
    [3] int64 counts the blocks that calls needed so far: resident, streamed, on the CPU. A layer's
    call holds `lock`, because buffers and jobs serve one call at a time.
    """

    def __init__(
        self,
        block_format: Encoding,
        kernels: Kernels,
        device: torch.device,
        slots: int,
        output_dtype: torch.dtype | None = None,
    ):
        """Allocates the shared resources.

        Args:
            device: holds the resident blocks.
            slots: blocks of device memory to stream through.
            output_dtype: None: the experts' dtype.
        """
        self.kernels = kernels
        self.device = device
        self.dtype = getattr(torch, block_format.dtype)
        self.output_dtype = output_dtype or self.dtype
        self.timeline = Timeline(device)
        self.buffers = PinnedBuffers(device)
        self.ring = StagingRing(slots, block_format.block_bytes, device) if slots else None
        self.jobs = CpuJobs(kernels.cpu, self.buffers.output_ready, self.timeline)
        self.counted = np.zeros(3, dtype=np.int64)
        # on the device, for numbers of jobs: zero, and the last job before a step
        self.no_job, self.job_before_step = (
            torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2)
        )
        self.lock = threading.RLock()
        # raises if another rank has failed; ends the other ranks within a layer
        self.check_others: Callable[[], None] = lambda: None
        self.abandon_others: Callable[[], None] = lambda: None

    @property
    def traffic(self) -> Traffic:
        """The blocks of all calls so far, complete once the device has finished."""
        return Traffic(*self.counted.tolist())

    def forget_traffic(self) -> None:
        self.counted[:] = 0

    def check_dtype(self, hidden_states: torch.Tensor) -> None:
        """Checks the dtype of the hidden states.

        Raises:
            FiddlerError: it is not the experts' dtype.
        """
        if hidden_states.dtype != self.dtype:
            raise FiddlerError(
                f"the model computes in {hidden_states.dtype}, but its experts are {self.dtype};"
                " do not convert a loaded model"
            )

    def settle(self) -> None:
        """Waits until CPU and device have finished all queued work.

        Raises:
            FiddlerError: one of them timed out waiting for the other, so the result is wrong.
        """
        with self.lock:
            self.jobs.finish()
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            self.check_hand_over()

    def abandon(self) -> None:
        """Ends the CPU's unfinished jobs without results. The device continues without them."""
        with self.lock:
            self.abandon_others()
            self.jobs.abandon()

    def check_hand_over(self) -> None:
        """Checks that no hand-over has failed.

        Raises:
            FiddlerError: the GPU timed out waiting for the CPU's threads, or another rank failed.
        """
        self.check_others()
        gave_up = self.buffers.gave_up
        if gave_up.item():
            torch.cuda.synchronize(self.device)
            gave_up.zero_()
            raise FiddlerError(
                f"the GPU timed out after {GPU_TIMEOUT_S:g} s waiting for this process, which was"
                " stopped or had no CPU time; start again"
            )
