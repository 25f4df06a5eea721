"""What computes a model's experts: the CPU, the device, and the link between them, at the same time.

Calls of few tokens, as in decode, go to GPU kernels that read resident blocks from GPU memory and streamed ones over the link
where they lie; those of many tokens, as in prefill, to matrix products over blocks that are copied into a staging ring.
"""

import logging
from importlib.util import find_spec

import numpy as np
import torch

from fiddler_run.arena import will_need
from fiddler_run.dispatch import ExpertCall, Traffic
from fiddler_run.errors import FiddlerError
from fiddler_run.kernels.cpu import CpuCall, cpu_experts
from fiddler_run.kernels.pytorch import apply_blocks
from fiddler_run.timeline import Timeline
from fiddler_run.transfer import Mailbox, StagingRing

SPIN_US = 1000  # longer than a GPU takes for the dense part of a layer
SPIN_BESIDE_PYTORCH_US = 20  # where PyTorch needs the same cores for it


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
        self._block_bytes = 3 * block_neurons * hidden * dtype.itemsize
        spin_us = SPIN_US if on_gpu else SPIN_BESIDE_PYTORCH_US
        self.cpu = cpu_experts(threads, pinned, spin_us, dtype, hidden, block_neurons)
        self.ring = StagingRing(slots, 3 * block_neurons * hidden, dtype, device) if slots else None
        self.mailbox, self.timeline, self.traffic = Mailbox(device), Timeline(device), Traffic()
        self.kernels = _gpu_kernels(dtype, hidden, block_neurons) if on_gpu else None
        # Without a GPU the CPU stands in for it, one step after the other; where nothing is ever streamed, in the same job.
        self._apply = apply_blocks if on_gpu else self.cpu.apply
        self._cpu_does_all = not on_gpu and self.ring is None
        self._jobs, self._job_under_way = 0, False  # of the CPU

    def receive(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The device's tensors in host memory, until the next call; meanwhile the last layer's CPU job is finished."""
        return self.mailbox.receive(*tensors, meanwhile=self.finish_cpu)

    def run(
        self,
        calls: list[ExpertCall],
        order: np.ndarray,
        host_states: torch.Tensor,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """The calls' weighted sums: [tokens, hidden] on the device, queued there, in the dtype of `hidden_states`.

        Args:
            calls: of one layer.
            order: the layer's choices [tokens * k] sorted by expert.
            host_states: `hidden_states` in host memory.
        """
        if hidden_states.dtype != self._dtype:
            raise FiddlerError(
                f"the model computes in {hidden_states.dtype}, but its experts are {self._dtype}; leave a loaded model's dtype"
            )
        self._count(calls)
        cpu_output = self._start_cpu(calls, host_states)
        if self.device.type == "cpu":  # one after the other
            self.finish_cpu()
            if self._cpu_does_all and cpu_output is not None:
                return cpu_output.to(hidden_states.dtype)
        most_tokens = max(len(call.rows) for call in calls)
        self.timeline.begin("host", "queue device work")
        if self.kernels and most_tokens <= self.kernels.MAX_TOKENS:
            output = self._read_in_place(calls, most_tokens, order, hidden_states, top_k_weights, cpu_output)
        else:
            output = self._stage(calls, hidden_states, top_k_index, top_k_weights)
            if cpu_output is not None:
                self.finish_cpu()
                output += cpu_output.to(self.device, non_blocking=True)
            output = output.to(hidden_states.dtype)
        self.timeline.end("host", "queue device work")
        return output

    def _count(self, calls: list[ExpertCall]) -> None:
        for call in calls:
            self.traffic.resident_blocks += call.expert.num_resident
            self.traffic.streamed_blocks += call.num_streamed
            self.traffic.cpu_blocks += call.num_on_cpu

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
        self._job_under_way = True
        self.timeline.begin("CPU", "blocks")
        self.cpu.submit(for_cpu, host_states, output, self.mailbox.finished, self._jobs)
        return output

    def finish_cpu(self) -> None:
        """Takes part in the CPU's job, if there is one, until it is finished."""
        if self._job_under_way:
            self.timeline.begin("host", "help the CPU")
            self.cpu.wait()
            self.timeline.end("host", "help the CPU")
            self.timeline.end("CPU", "blocks", self.cpu.finished_s())
            self._job_under_way = False

    def __del__(self):
        if getattr(self, "_job_under_way", False):
            self.cpu.wait()  # the job holds views of the model's memory

    def _read_in_place(
        self,
        calls: list[ExpertCall],
        most_tokens: int,
        order: np.ndarray,
        hidden_states: torch.Tensor,
        weights: torch.Tensor,
        cpu_output: torch.Tensor | None,
    ) -> torch.Tensor:
        """The device itself waits for the CPU's result, so that Python can queue the next layer's dense part meanwhile."""
        results = None
        if any(call.on_device for call in calls):
            lane = ("link", "in place") if any(call.num_streamed for call in calls) else ("GPU", "resident")
            table = self.mailbox.table(self.kernels.table_size(calls, order))
            num_blocks = self.kernels.fill_table(table.numpy(), calls, self._block_bytes, order)
            self.timeline.begin(*lane)
            table = table.to(self.device, non_blocking=True)
            results = self.kernels.apply_calls(
                table, num_blocks, len(calls), most_tokens, hidden_states, weights, self._block_neurons
            )
            self.timeline.end(*lane)
        # A kernel that waits for a disk could hold up a screen, or be ended for taking too long.
        if cpu_output is not None and (not self.cpu.finishes_alone or any(call.expert.num_on_disk for call in calls)):
            self.finish_cpu()
        return self.kernels.add_up(results, cpu_output, self.mailbox.finished, self._jobs, hidden_states)

    def _stage(
        self, calls: list[ExpertCall], hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Resident and streamed blocks, these through the ring: [tokens, hidden] float32. The link starts before anything else."""
        output = torch.zeros_like(hidden_states, dtype=torch.float32)
        calls = [call for call in calls if call.on_device]
        if not calls:
            return output
        streamed = [block for call in calls for block in call.expert.absent[: call.num_streamed]]
        arriving = self.ring.stream(streamed, self.timeline) if streamed else iter(())
        # The same order that `expert_groups` finds on the host.
        order = top_k_index.flatten().argsort(stable=True)
        rows, weights = order // top_k_index.shape[1], top_k_weights.flatten()[order].unsqueeze(1)
        chosen = [slice(call.start, call.start + len(call.rows)) for call in calls]
        states = [hidden_states[rows[tokens]] for tokens in chosen]
        self.timeline.begin("GPU", "resident")
        sums = [self._resident(call, x) for call, x in zip(calls, states, strict=True)]  # while the first copies are under way
        self.timeline.end("GPU", "resident")
        for call, x, total, tokens in zip(calls, states, sums, chosen, strict=True):
            for _ in range(call.num_streamed):
                block = next(arriving)
                self.timeline.begin("GPU", "streamed")
                total += self._apply(block, x)
                self.timeline.end("GPU", "streamed")
            output.index_add_(0, rows[tokens], total * weights[tokens])
        return output

    def _resident(self, call: ExpertCall, states: torch.Tensor) -> torch.Tensor:
        if call.expert.num_resident == 0:
            return torch.zeros_like(states, dtype=torch.float32)
        return self._apply(call.expert.resident, states)


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
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        logging.getLogger("fiddler_run").warning("the GPU kernels cannot be compiled, decode will be slower (%s)", reason)
        return None
    return gpu
