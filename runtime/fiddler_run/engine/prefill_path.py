"""The prefill path: runs a large batch through one layer's experts.

Python waits for the router's choice and splits the blocks. Resident blocks are computed in place,
streamed blocks in the staging ring as they arrive, and the others by the CPU, all at the same time.
It also serves small batches where the decode path cannot: without a GPU, without decode kernels,
and in layers with blocks on disk.
"""

import numpy as np
import torch

from fiddler_run.encodings.base import Encoding
from fiddler_run.engine.calls import ExpertCalls, Runs
from fiddler_run.engine.device_part import Inputs, device_part, queue
from fiddler_run.engine.resources import Resources
from fiddler_run.engine.timeline import Lane, Work
from fiddler_run.kernels.cpu_calls import CpuCalls
from fiddler_run.kernels.decode_layer import Job
from fiddler_run.weights.arena import will_need

# Tokens times weights on the CPU beyond which Python waits for the CPU's job, rather than a kernel:
# a long-spinning kernel trips the display watchdog. 512 tokens of one of Mixtral-8x7B's experts.
MAX_GPU_WAIT = 512 * 3 * 4096 * 14336


class PrefillPath:
    """Runs layers of large batches."""

    def __init__(self, resources: Resources):
        self._resources = resources
        # Without a GPU, the CPU computes both parts in turn. If nothing is streamed, one job
        # computes them.
        self._cpu_does_all = resources.device.type == "cpu" and resources.ring is None

    def receive(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Copies the device's tensors to host memory. The copies are valid until the next call.

        Meanwhile, finishes the previous layer's CPU job.
        """
        return self._resources.buffers.receive(*tensors, meanwhile=self._resources.jobs.finish)

    def run(
        self,
        calls: ExpertCalls,
        host_states: torch.Tensor,
        *inputs: *Inputs,
        next_runs: Runs | None = None,
    ) -> torch.Tensor:
        """Queues the calls' weighted sums [tokens, hidden] on the device, in `output_dtype`.

        Args:
            calls: of one layer.
            host_states: the states in host memory.
            inputs: states, index and weights on the device.
            next_runs: what the next layer will probably stream. The link begins with it once it has
                carried this layer's blocks.
        """
        resources = self._resources
        resources.check_dtype(inputs[0])
        resources.counted += calls.traffic
        cpu_output = self._start_cpu(calls, host_states)
        if resources.device.type == "cpu":
            resources.jobs.finish()
            if self._cpu_does_all and cpu_output is not None:
                # a copy, because the next layer reuses the buffer
                return cpu_output.to(resources.output_dtype, copy=True)
        timeline = resources.timeline
        timeline.begin(Lane.PYTHON, Work.QUEUE)
        ring = resources.ring
        stream = ring.stream(calls.runs(), timeline) if ring else None
        part = device_part(resources, calls, inputs, stream.pieces if stream else [])
        queue(part, stream, resources)

        def receive() -> torch.Tensor | None:
            if cpu_output is None:
                return None
            self._wait_for_cpu(calls)
            return cpu_output.to(resources.device, non_blocking=True)

        output = part.output(receive)
        if next_runs is not None and ring is not None and ring.copy_stream is not None:
            ring.prefetch(next_runs, timeline)
        timeline.end(Lane.PYTHON, Work.QUEUE)
        return output

    def _start_cpu(self, calls: ExpertCalls, host_states: torch.Tensor) -> torch.Tensor | None:
        """Starts the CPU's part of all calls. Returns its result, or None if it has no part."""
        layer = calls.layer
        experts = calls.choices.experts
        host = layer.host.address[experts] + calls.num_streamed * layer.block_bytes
        address = [host]
        count = [calls.num_host - calls.num_streamed]
        if self._cpu_does_all:
            address.insert(0, layer.resident.address[experts])
            count.insert(0, calls.num_resident)
        # by expert; last, those on disk, because the disk reads them in the meantime
        addresses = np.concatenate((np.stack(address, 1).ravel(), layer.on_disk.address[experts]))
        counts = np.concatenate((np.stack(count, 1).ravel(), calls.num_on_disk))
        call = np.concatenate(
            (np.repeat(np.arange(len(experts)), len(count)), np.arange(len(experts)))
        )
        for expert in experts[calls.num_on_disk.nonzero()].tolist():
            will_need(layer.on_disk.blocks[expert])
        some = counts.nonzero()[0]
        if not len(some):
            return None
        call = call[some]
        choices = calls.choices
        start, stop = choices.starts[call], choices.starts[call + 1]
        for_cpu = CpuCalls(
            addresses[some], counts[some], start, stop, choices.rows, choices.weights, layer
        )
        output = self._resources.buffers.output(host_states.shape)
        self._resources.jobs.submit(for_cpu, host_states, output)
        return output

    def _wait_for_cpu(self, calls: ExpertCalls) -> None:
        resources = self._resources
        decode = resources.kernels.decode
        if decode is not None and not takes_long(calls, resources.kernels.cpu.block_format):
            buffers = resources.buffers
            job = Job(resources.no_job, resources.jobs.last)
            decode.wait(buffers.output_ready, buffers.gave_up, job)
        else:
            resources.jobs.finish()


def takes_long(calls: ExpertCalls, block_format: Encoding) -> bool:
    """True if the CPU's part of the calls takes too long for a GPU to wait for."""
    work = int((calls.choices.tokens * calls.num_on_cpu).sum()) * block_format.block_weights
    return work > MAX_GPU_WAIT or bool(calls.num_on_disk.any())
