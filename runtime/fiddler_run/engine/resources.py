"""What all layers of a model share: CPU threads, link, buffers. It takes no decisions."""

import threading

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
    """The shared parts of one model's engine.

    `kernels` compute blocks. `jobs`: the CPU's. `ring`: None if nothing is ever streamed. `counted`
    [3] int64: blocks that calls needed so far, resident, streamed, on the CPU. `lock` is held for a
    layer's call: buffers and jobs are of one at a time.
    """

    def __init__(self, block_format: Encoding, kernels: Kernels, device: torch.device, slots: int):
        """
        Args:
            device: where resident blocks are.
            slots: blocks of device memory to stream through.
        """
        self.kernels = kernels
        self.device = device
        self.dtype = getattr(torch, block_format.dtype)
        self.timeline = Timeline(device)
        self.buffers = PinnedBuffers(device)
        self.ring = StagingRing(slots, block_format.block_bytes, device) if slots else None
        self.jobs = CpuJobs(kernels.cpu, self.buffers.output_ready, self.timeline)
        self.counted = np.zeros(3, dtype=np.int64)
        self.lock = threading.RLock()

    @property
    def traffic(self) -> Traffic:
        """Blocks of all calls so far, if the device has finished its work."""
        return Traffic(*self.counted.tolist())

    def forget_traffic(self) -> None:
        self.counted[:] = 0

    def check_dtype(self, hidden_states: torch.Tensor) -> None:
        """
        Raises:
            FiddlerError: the states are not of the experts' dtype.
        """
        if hidden_states.dtype != self.dtype:
            raise FiddlerError(
                f"the model computes in {hidden_states.dtype}, but its experts are {self.dtype};"
                " leave a loaded model's dtype"
            )

    def settle(self) -> None:
        """Returns when CPU and device have done what was queued.

        Raises:
            FiddlerError: one of them gave up waiting for the other: the result is wrong.
        """
        with self.lock:
            self.jobs.finish()
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            self.check_hand_over()

    def abandon(self) -> None:
        """Ends the CPU's jobs under way, without results. The device goes on without them."""
        with self.lock:
            self.jobs.abandon()

    def check_hand_over(self) -> None:
        """
        Raises:
            FiddlerError: the GPU gave up waiting for the CPU's threads.
        """
        gave_up = self.buffers.gave_up
        if gave_up.item():
            torch.cuda.synchronize(self.device)
            gave_up.zero_()
            raise FiddlerError(
                f"the GPU waited {GPU_TIMEOUT_S:g} s for this process, which was stopped or had no"
                " CPU time, and gave up; start again"
            )
