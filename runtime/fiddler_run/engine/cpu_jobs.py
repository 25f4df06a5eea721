"""Tracks the CPU's unfinished jobs: who waits for them, and their place on the timeline."""

import os
import time
from collections import deque

import numpy as np
import torch

from fiddler_run.engine.timeline import Lane, Place, Timeline, Work
from fiddler_run.kernels.cpu import CpuExperts
from fiddler_run.kernels.cpu_calls import CpuCalls
from fiddler_run.kernels.decode_layer import DecodeInputs, DecodeLayer


class CpuJobs:
    """The jobs of one model, numbered from 1. A finished job sets `flag` to its number."""

    def __init__(self, cpu: CpuExperts, flag: torch.Tensor, timeline: Timeline):
        self.last = 0  # number of the last job
        self._cpu = cpu
        self._flag = flag
        self._timeline = timeline
        self._pid = os.getpid()
        # For each job, its layer and the time since when it has waited for the router.
        self._under_way: deque[tuple[Place, float | None]] = deque()

    def __len__(self) -> int:
        """Number of unfinished jobs."""
        return len(self._under_way)

    def submit(self, calls: CpuCalls, states: torch.Tensor, output: torch.Tensor) -> None:
        """Starts a job; see `CpuExperts.submit`."""
        self.begin(None)
        self._cpu.submit(calls, states, output, self._flag, self.last)

    def begin(self, waits_since_s: float | None) -> None:
        """Assigns a number to a job that is about to be submitted."""
        self.last += 1
        self._under_way.append((self._timeline.place, waits_since_s))

    def begin_decode(self) -> None:
        """Assigns a number to a job of the decode path, which starts by waiting for the router."""
        self.begin(time.perf_counter())

    def submit_decode(
        self, layer: DecodeLayer, inputs: DecodeInputs, traffic: np.ndarray, output: torch.Tensor
    ) -> None:
        """Submits the job that `begin_decode` numbered."""
        self._cpu.submit_routed(layer, inputs, traffic, output, self._flag, self.last)

    def finish(self, max_pending: int = 0) -> None:
        """Helps with the jobs until at most `max_pending`, 0 or 1, are unfinished."""
        timeline = self._timeline
        while len(self._under_way) > max_pending:
            timeline.begin(Lane.PYTHON, Work.HELP)
            self._cpu.wait(len(self._under_way) - 1, self._flag)
            timeline.end(Lane.PYTHON, Work.HELP)
            # Before the wait: an interrupted wait leaves the job to `abandon`.
            place, waits_since_s = self._under_way.popleft()
            if not timeline.on:
                continue
            started_s, finished_s = self._cpu.times_s()
            if waits_since_s is not None:
                timeline.add(Lane.CPU, Work.ROUTER, place, waits_since_s, started_s)
            timeline.add(Lane.CPU, Work.BLOCKS, place, started_s, finished_s)

    def abandon(self) -> None:
        """Ends the unfinished jobs without results. The device continues without them."""
        if self._under_way:
            self._under_way.clear()
            self._cpu.abandon(self._flag)

    def __del__(self):
        if getattr(self, "_under_way", None) and os.getpid() == self._pid:
            self._cpu.wait()  # the jobs hold views of the model's memory
