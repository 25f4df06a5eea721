"""What computes a model's experts: the CPU, the device, and the link between them, at the same time.

Few tokens, as in decode, go to GPU kernels that read resident blocks from GPU memory and streamed ones over the link where they
lie; many, as in prefill, to matrix products over blocks that are copied into a staging ring (staging.py).
"""

import logging
import os
import threading
import time
from collections import deque
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch

from fiddler_run.arena import will_need
from fiddler_run.dispatch import ExpertCall, Traffic
from fiddler_run.errors import FiddlerError
from fiddler_run.files import reason
from fiddler_run.kernels.cpu import CpuCall, cpu_experts
from fiddler_run.kernels.pytorch import apply_blocks
from fiddler_run.kernels.routed import PATIENCE_S, RoutedLayer
from fiddler_run.plan import MOST_ROUTED_TOKENS
from fiddler_run.staging import StagedBlocks
from fiddler_run.timeline import Place, Timeline
from fiddler_run.transfer import Mailbox, StagingRing

SPIN_US = 1000  # longer than a GPU takes for the dense part of a layer
SPIN_BESIDE_PYTORCH_US = 20  # where PyTorch needs the same cores for it
MOST_WAITED_FOR = 512  # of all tokens times experts on the CPU: a GPU that waits for more may hold up a screen


class Executors:
    """CPU, link and device, shared by all layers of a model."""

    def __init__(
        self,
        dtype: torch.dtype,
        hidden: int,
        block_neurons: int,
        threads: int,
        slots: int,
        device: torch.device,
        pinned: bool = False,
    ):
        """
        Args:
            dtype, hidden, block_neurons: of the blocks.
            threads: of the CPU.
            slots: blocks of device memory to stream through; 0 if nothing is ever streamed.
            device: where resident blocks are.
            pinned: each thread stays on a CPU of its own.
        """
        on_gpu = device.type == "cuda"
        self.device, self._dtype, self._block_neurons = device, dtype, block_neurons
        spin_us = SPIN_US if on_gpu else SPIN_BESIDE_PYTORCH_US
        self.cpu = cpu_experts(threads, pinned, spin_us, dtype, hidden, block_neurons)
        self.ring = StagingRing(slots, 3 * block_neurons * hidden, dtype, device) if slots else None
        self.mailbox, self.timeline, self._blocks = Mailbox(device), Timeline(device), np.zeros(3, dtype=np.int64)
        # With them the GPU waits for the CPU's threads, which must not need Python's then.
        self.kernels = _gpu_kernels(dtype, hidden, block_neurons) if on_gpu and self.cpu.finishes_alone else None
        if on_gpu and not self.cpu.finishes_alone:
            _say_once("decode will be slower: it needs the CPU kernel, at least two of its threads, and experts in bfloat16")
        # Without a GPU the CPU stands in for it, one step after the other; where nothing is ever streamed, in the same job.
        self._staged = StagedBlocks(self.ring, apply_blocks if on_gpu else self.cpu.apply, self.timeline)
        self._cpu_does_all = not on_gpu and self.ring is None
        self.lock = threading.RLock()  # held for a layer's call: buffers and jobs are of one call at a time
        self._pid = os.getpid()
        self._jobs = 0  # of the CPU
        self._under_way: deque[tuple[Place, float | None]] = deque()  # of these: the place, and since when it waits for the router

    @property
    def traffic(self) -> Traffic:
        """Of all calls so far, if the device has finished its work."""
        return Traffic(*self._blocks.tolist())

    def forget_traffic(self) -> None:
        self._blocks[:] = 0

    def routes(self, tokens: int) -> bool:
        """Whether so many tokens are for `run_routed`."""
        return self.kernels is not None and tokens <= MOST_ROUTED_TOKENS

    def run_routed(
        self, layer: RoutedLayer, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sums [tokens, hidden] of what the router chose, queued on the GPU, in the dtype of `hidden_states`.

        Nothing waits for Python: it submits the CPU's job and queues the GPU's work while the last layer is being computed; CPU and
        GPU then tell each other when to go on. The GPU is never made to wait for what has not been submitted.
        """
        self._check(hidden_states)
        self._jobs += 1
        self._under_way.append((self.timeline.place, time.perf_counter()))
        try:
            return self._queue_routed(layer, hidden_states, top_k_index, top_k_weights)
        except BaseException:
            self.abandon()  # before anything is sent anew
            raise

    def _queue_routed(
        self, layer: RoutedLayer, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        self._check_hand_over()
        kernels, mailbox, (tokens, top_k) = self.kernels, self.mailbox, top_k_index.shape
        lane = ("link", "in place") if layer.streams(tokens) else ("GPU", "resident")
        self.timeline.begin("host", "queue device work")
        max_blocks = layer.most_blocks(tokens * top_k)
        given = mailbox.routed(hidden_states, top_k_index, top_k_weights, layer.num_experts, max_blocks)
        output = mailbox.output(hidden_states.shape)
        tensors = hidden_states, top_k_index, top_k_weights
        kernels.send(tensors, [given.states, given.index, given.weights], given.arrived, self._jobs)
        self.cpu.submit_routed(layer, given, self._block_neurons, self._blocks, output, mailbox.finished, self._jobs)
        table = kernels.fetch(given.table, given.described, mailbox.gave_up, self._jobs, self.device)
        self.timeline.begin(*lane)
        results = kernels.apply(table, max_blocks, layer.num_experts, hidden_states, top_k_weights, self._block_neurons)
        self.timeline.end(*lane)
        cpu_result = output, mailbox.finished, mailbox.gave_up, self._jobs
        total = kernels.add_up(results, top_k_index, layer.num_experts, *cpu_result, hidden_states)
        self.timeline.end("host", "queue device work")
        self.finish_cpu(but=1)  # this layer's job has just begun
        return total

    def stream_ahead(self, calls: list[ExpertCall]) -> None:
        """Starts to copy what the next layer will probably need first, so that the link has work while its router decides."""
        self._staged.copy_ahead(calls)

    def receive(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The device's tensors in host memory, until the next call; meanwhile the last layer's CPU job is finished."""
        return self.mailbox.receive(*tensors, meanwhile=self.finish_cpu)

    def run(
        self,
        calls: list[ExpertCall],
        host_states: torch.Tensor,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """The calls' weighted sums: [tokens, hidden] on the device, queued there, in the dtype of `hidden_states`.

        Args:
            calls: of one layer.
            host_states: `hidden_states` in host memory.
        """
        self._check(hidden_states)
        for call in calls:
            self._blocks += (call.expert.num_resident, call.num_streamed, call.num_on_cpu)
        cpu_output = self._start_cpu(calls, host_states)
        if self.device.type == "cpu":  # one after the other
            self.finish_cpu()
            if self._cpu_does_all and cpu_output is not None:
                return cpu_output.to(hidden_states.dtype, copy=True)  # the next layer's result takes its place
        self.timeline.begin("host", "queue device work")
        output = self._staged.compute(calls, hidden_states, top_k_index, top_k_weights)
        if cpu_output is not None:
            if self.kernels and not _takes_long(calls):
                self.kernels.wait(self.mailbox.finished, self.mailbox.gave_up, self._jobs)
            else:
                self.finish_cpu()
            output += cpu_output.to(self.device, non_blocking=True)
        self.timeline.end("host", "queue device work")
        return output.to(hidden_states.dtype)

    def _check(self, hidden_states: torch.Tensor) -> None:
        if hidden_states.dtype != self._dtype:
            raise FiddlerError(
                f"the model computes in {hidden_states.dtype}, but its experts are {self._dtype}; leave a loaded model's dtype"
            )

    def _start_cpu(self, calls: list[ExpertCall], host_states: torch.Tensor) -> torch.Tensor | None:
        """Starts the CPU on its blocks of all calls: where its result will be, or None if there are none."""
        for_cpu = []
        for call in calls:
            if self._cpu_does_all and call.expert.num_resident:
                for_cpu.append(CpuCall(call.expert.resident, call.rows, call.weights))
            if call.num_streamed < call.expert.num_absent:
                for_cpu.append(CpuCall(call.expert.absent[call.num_streamed :], call.rows, call.weights))
        for call in calls:  # last: they are on their way from the disk meanwhile
            if call.expert.num_on_disk:
                will_need(call.expert.on_disk)
                for_cpu.append(CpuCall(call.expert.on_disk, call.rows, call.weights))
        if not for_cpu:
            return None
        output = self.mailbox.output(host_states.shape)
        self._jobs += 1
        self._under_way.append((self.timeline.place, None))
        self.cpu.submit(for_cpu, host_states, output, self.mailbox.finished, self._jobs)
        return output

    def finish_cpu(self, but: int = 0) -> None:
        """Takes part in the CPU's jobs, until all but the last `but`, at most 1, are finished."""
        while len(self._under_way) > but:
            self.timeline.begin("host", "help the CPU")
            self.cpu.wait(len(self._under_way) - 1, self.mailbox.finished)
            self.timeline.end("host", "help the CPU")
            place, waits_since_s = self._under_way.popleft()  # now: an interrupted wait leaves it to `abandon`
            if not self.timeline.on:
                continue
            started_s, finished_s = self.cpu.times_s()
            if waits_since_s is not None:
                self.timeline.add("CPU", "wait for the router", place, waits_since_s, started_s)
            self.timeline.add("CPU", "blocks", place, started_s, finished_s)

    def settle(self) -> None:
        """Returns when CPU and device have done what was queued.

        Raises:
            FiddlerError: one of them gave up waiting for the other, so that what was computed is wrong.
        """
        with self.lock:
            self.finish_cpu()
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            self._check_hand_over()

    def abandon(self) -> None:
        """Ends the CPU's jobs under way, whose results nobody wants any more. The device goes on without them."""
        with self.lock:
            if self._under_way:
                self._under_way.clear()
                self.cpu.abandon(self.mailbox.finished)

    def _check_hand_over(self) -> None:
        if self.mailbox.gave_up.item():
            torch.cuda.synchronize(self.device)
            self.mailbox.gave_up.zero_()
            raise FiddlerError(
                f"the GPU waited {PATIENCE_S:g} s for this process, which was stopped or had no CPU time, and gave up; start again"
            )

    def __del__(self):
        if getattr(self, "_under_way", None) and os.getpid() == self._pid:
            self.cpu.wait()  # the jobs hold views of the model's memory


def _takes_long(calls: list[ExpertCall]) -> bool:
    """Whether a GPU should not wait for the CPU's part of them: it could be stopped for taking too long."""
    whole_experts = sum(len(call.rows) * call.num_on_cpu / call.expert.num_blocks for call in calls)
    return whole_experts > MOST_WAITED_FOR or any(call.expert.num_on_disk for call in calls)


@cache
def _say_once(warning: str) -> None:
    logging.getLogger("fiddler_run").warning(warning)


def _gpu_kernels(dtype: torch.dtype, hidden: int, block_neurons: int):
    """The module of GPU kernels, if such blocks are for them and they can be compiled here; else None: the ring does it all."""
    if not find_spec("triton"):  # comes with PyTorch for CUDA on Linux
        return None
    from fiddler_run.kernels import gpu

    if not gpu.supports(dtype, hidden, block_neurons):
        return None
    try:
        gpu.compile_all(dtype, hidden, block_neurons)
    except Exception as error:  # Triton needs a C compiler and Python's headers at run time; it raises what it likes
        logging.getLogger("fiddler_run").warning("the GPU kernels cannot be compiled, decode will be slower (%s)", reason(error))
        return None
    return gpu
