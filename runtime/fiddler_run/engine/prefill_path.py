"""The prefill path: runs a large batch through one layer's experts.

Python waits for the router's choice and splits the blocks. Resident blocks are computed in place,
streamed blocks in the staging ring as they arrive, and the others by the CPU, all at the same time.
It also serves small batches where the decode path cannot: without a GPU, without decode kernels,
and in layers with blocks on disk.
"""

from collections.abc import Iterator
from itertools import chain

import torch

from fiddler_run.engine.calls import ExpertCall
from fiddler_run.engine.resources import Resources
from fiddler_run.engine.ring import Stream
from fiddler_run.engine.timeline import Lane, Work
from fiddler_run.kernels.cpu import CpuCall
from fiddler_run.weights.arena import will_need

# Tokens times experts on the CPU beyond which Python waits for the CPU's job, rather than a kernel:
# a long-spinning kernel trips the display watchdog.
MAX_GPU_WAIT = 512


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
        calls: list[ExpertCall],
        host_states: torch.Tensor,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Queues the calls' weighted sums [tokens, hidden] on the device, in the states' dtype.

        Args:
            calls: of one layer.
            host_states: `hidden_states` in host memory.
        """
        resources = self._resources
        resources.check_dtype(hidden_states)
        for call in calls:
            resources.counted += (call.expert.num_resident, call.num_streamed, call.num_on_cpu)
        cpu_output = self._start_cpu(calls, host_states)
        if resources.device.type == "cpu":
            resources.jobs.finish()
            if self._cpu_does_all and cpu_output is not None:
                # a copy, because the next layer reuses the buffer
                return cpu_output.to(hidden_states.dtype, copy=True)
        resources.timeline.begin(Lane.PYTHON, Work.QUEUE)
        output = DevicePart(resources, hidden_states, top_k_index, top_k_weights).compute(calls)
        if cpu_output is not None:
            self._wait_for_cpu(calls)
            output += cpu_output.to(resources.device, non_blocking=True)
        resources.timeline.end(Lane.PYTHON, Work.QUEUE)
        return output.to(hidden_states.dtype)

    def prefetch(self, calls: list[ExpertCall]) -> None:
        """Starts to copy the blocks that the next layer will probably need first."""
        ring = self._resources.ring
        if ring is not None and ring.copy_stream is not None:
            pieces = chain(*(pieces_of(call, ring.at_once) for call in calls))
            ring.prefetch(list(pieces), self._resources.timeline)

    def _start_cpu(self, calls: list[ExpertCall], host_states: torch.Tensor) -> torch.Tensor | None:
        """Starts the CPU's part of all calls. Returns its result, or None if it has no part."""
        for_cpu = []
        for call in calls:
            expert = call.expert
            if self._cpu_does_all and expert.num_resident:
                for_cpu.append(CpuCall(expert.resident, call.rows, call.weights))
            if call.num_streamed < expert.num_host:
                rest = expert.host[call.num_streamed :]
                for_cpu.append(CpuCall(rest, call.rows, call.weights))
        for call in calls:  # last, because the disk reads them in the meantime
            if call.expert.num_on_disk:
                will_need(call.expert.on_disk)
                for_cpu.append(CpuCall(call.expert.on_disk, call.rows, call.weights))
        if not for_cpu:
            return None
        output = self._resources.buffers.output(host_states.shape)
        self._resources.jobs.submit(for_cpu, host_states, output)
        return output

    def _wait_for_cpu(self, calls: list[ExpertCall]) -> None:
        resources = self._resources
        decode = resources.kernels.decode
        if decode is not None and not _takes_long(calls):
            buffers = resources.buffers
            decode.wait(buffers.output_ready, buffers.gave_up, resources.jobs.last)
        else:
            resources.jobs.finish()


class DevicePart:
    """The device's part of one layer.

    To keep the link busy, streamed blocks are computed as they arrive, which frees their place in
    the ring, and resident blocks between two arrivals. The first piece comes before all resident
    blocks, because prefetched blocks fill the ring until it has been computed.
    """

    def __init__(
        self,
        resources: Resources,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ):
        self._resources = resources
        self._hidden_states = hidden_states
        self._index = top_k_index
        self._weights = top_k_weights
        self._rows: torch.Tensor | None = None
        # the states of each call's tokens, by the call's first choice
        self._states: dict[int, torch.Tensor] = {}
        self._sums: dict[int, torch.Tensor] = {}

    def compute(self, calls: list[ExpertCall]) -> torch.Tensor:
        """The weighted sums of resident and streamed blocks, [tokens, hidden] float32."""
        output = torch.zeros_like(self._hidden_states, dtype=torch.float32)
        calls = [call for call in calls if call.on_device]
        if not calls:
            return output
        ring = self._resources.ring
        pieces = [pieces_of(call, ring.at_once) if ring else () for call in calls]
        stream = ring.stream(list(chain(*pieces)), self._resources.timeline) if ring else None
        # The order of `expert_groups`. Choices of nonexistent experts come last.
        chosen = self._index.flatten()
        last = torch.iinfo(chosen.dtype).max
        order = chosen.where(chosen >= 0, last).argsort(stable=True)
        self._rows = order // self._index.shape[1]
        weights = self._weights.flatten()[order].unsqueeze(1)
        arriving = [call for call, streamed in zip(calls, pieces, strict=True) for _ in streamed]
        self._add_blocks(arriving, iter(calls), stream)
        for start, total in self._sums.items():
            tokens = slice(start, start + len(total))
            output.index_add_(0, self._rows[tokens], total * weights[tokens])
        return output

    def _add_blocks(
        self, arriving: list[ExpertCall], calls: Iterator[ExpertCall], stream: Stream | None
    ) -> None:
        """Computes each arriving piece and, after it, one call's resident blocks; then the rest."""
        resident = (call for call in calls if call.expert.num_resident)
        for call in arriving:
            with stream.next() as blocks:
                self._add(Work.STREAMED, blocks, call)
            between = next(resident, None)
            if between is not None:
                self._add(Work.RESIDENT, between.expert.resident, between)
        for call in resident:
            self._add(Work.RESIDENT, call.expert.resident, call)

    def _add(self, work: Work, blocks: torch.Tensor, call: ExpertCall) -> None:
        start = call.start
        if start not in self._states:
            rows = self._rows[start : start + len(call.rows)]
            self._states[start] = self._hidden_states[rows]
        timeline = self._resources.timeline
        timeline.begin(Lane.GPU, work)
        part = self._resources.kernels.apply(blocks, self._states[start])
        self._sums[start] = self._sums[start].add_(part) if start in self._sums else part
        timeline.end(Lane.GPU, work)


def pieces_of(call: ExpertCall, at_once: int) -> tuple[torch.Tensor, ...]:
    """The pieces of up to `at_once` blocks that the link carries for a call, in order."""
    return call.expert.host[: call.num_streamed].split(at_once) if call.num_streamed else ()


def _takes_long(calls: list[ExpertCall]) -> bool:
    """True if the CPU's part of the calls takes too long for a GPU to wait for."""
    whole_experts = sum(len(call.rows) * call.num_on_cpu / call.expert.num_blocks for call in calls)
    return whole_experts > MAX_GPU_WAIT or any(call.expert.num_on_disk for call in calls)
