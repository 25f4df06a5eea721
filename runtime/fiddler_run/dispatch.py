"""What one layer does with its experts: every called expert's blocks split over three executors, summed in float32.

    [0 ... resident) device, in place  |  [resident ... streamed) over the link, then device  |  [streamed ... end) CPU, in place

Any split gives the same result up to the order of addition, because an expert is a sum over its neurons. The host waits for
the device once, for the router's result; then CPU, link and device work at the same time.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import islice

import numpy as np
import torch

from fiddler_run.kernels.cpu import CpuCall, CpuExperts
from fiddler_run.kernels.pytorch import apply_blocks
from fiddler_run.timeline import Timeline


@dataclass
class Traffic:
    """Expert blocks that calls needed so far, by where they were computed."""

    resident_blocks: int = 0
    streamed_blocks: int = 0
    cpu_blocks: int = 0

    def __sub__(self, earlier: "Traffic") -> "Traffic":
        return Traffic(*(getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self)))

    @property
    def needed_blocks(self) -> int:
        return self.resident_blocks + self.streamed_blocks + self.cpu_blocks

    @property
    def hit_rate(self) -> float:
        return self.resident_blocks / self.needed_blocks if self.needed_blocks else 0.0


class Expert:
    """One expert's blocks [count, block_elements]: `resident` in device memory, `absent` in host memory; their addresses."""

    def __init__(self, resident: torch.Tensor, absent: torch.Tensor):
        self.resident, self.absent = resident, absent
        self.num_resident, self.num_absent = len(resident), len(absent)
        self.resident_address, self.absent_address = resident.data_ptr(), absent.data_ptr()


@dataclass(frozen=True)
class ExpertCall:
    """The tokens that chose one expert, and how many of its absent blocks are streamed; the CPU computes the others.

    Its tokens are choices `start` to `start + len(rows)` of the layer's choices sorted by expert: `rows` [n] int64 into the
    layer's tokens, the router's `weights` [n] float32.
    """

    expert: Expert
    start: int
    rows: np.ndarray
    weights: np.ndarray
    num_streamed: int

    @property
    def num_on_cpu(self) -> int:
        return self.expert.num_absent - self.num_streamed

    @property
    def on_device(self) -> bool:
        return self.expert.num_resident > 0 or self.num_streamed > 0


class LayerDispatch:
    """Serves one layer's experts module: (hidden_states, top_k_index, top_k_weights) -> hidden_states."""

    def __init__(
        self,
        layer: int,
        resident: list[torch.Tensor],
        absent: list[torch.Tensor],
        stream_share: Callable[[int], float],
        executors: "Executors",
    ):
        """
        Args:
            layer: its number.
            resident: for each expert, its blocks in device memory, [count, block_elements].
            absent: for each expert, its other blocks, in host memory.
            stream_share: tokens of a call -> the share of its expert's absent blocks that goes over the link.
            executors: what computes them; shared by all layers.
        """
        self.layer, self.experts = layer, [Expert(*blocks) for blocks in zip(resident, absent, strict=True)]
        self.stream_share, self.executors = stream_share, executors

    def __call__(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """hidden_states [tokens, hidden], top_k_index [tokens, k] and top_k_weights [tokens, k] on the device: [tokens, hidden]."""
        run, timeline = self.executors, self.executors.timeline
        timeline.end("GPU", "dense")
        timeline.enter(self.layer)
        timeline.begin("host", "wait for the router")
        top_k_weights = top_k_weights.float()
        host_states, index, weights = run.mailbox.receive(hidden_states, top_k_index, top_k_weights)
        timeline.end("host", "wait for the router")
        order, groups = expert_groups(index.numpy(), weights.numpy(), len(self.experts))
        calls = self._split(groups)
        run.start_cpu(calls, host_states)
        timeline.begin("host", "queue device work")
        output = run.on_device(calls, order, hidden_states, top_k_index, top_k_weights)
        timeline.end("host", "queue device work")
        timeline.begin("host", "wait for the CPU")
        run.add_cpu(output)
        timeline.end("host", "wait for the CPU")
        result = output.to(hidden_states.dtype)
        timeline.begin("GPU", "dense")
        return result

    def _split(self, groups: list[tuple[int, np.ndarray, np.ndarray]]) -> list[ExpertCall]:
        """Divides the blocks of each called expert. What rounding to whole blocks gives the link too much or too little with
        one expert is made up for with the next."""
        calls, start, owed = [], 0, 0.0
        for number, rows, weights in groups:
            expert = self.experts[number]
            owed += self.stream_share(len(rows)) * expert.num_absent
            streamed = min(expert.num_absent, max(0, int(owed + 0.5)))
            owed -= streamed
            calls.append(ExpertCall(expert, start, rows, weights, streamed))
            start += len(rows)
        return calls


class Executors:
    """What computes a model's experts, shared by its layers: CPU, device, and the link between them."""

    def __init__(self, cpu: CpuExperts, ring: "StagingRing | None", device: torch.device, in_place: bool = False):
        """
        Args:
            cpu: computes blocks in host memory.
            ring: device memory to stream through; None if nothing is ever streamed.
            device: where resident blocks are.
            in_place: whether calls of few tokens are left to the kernels that read blocks over the link where they lie.
        """
        self.cpu, self.ring, self.device, self.in_place = cpu, ring, device, in_place
        self.mailbox, self.timeline, self.traffic = Mailbox(device), Timeline(device), Traffic()
        self._cpu_output = None
        # Without a GPU the CPU stands in for it, one step after the other.
        self._apply = apply_blocks if device.type == "cuda" else cpu.apply

    def start_cpu(self, calls: list[ExpertCall], host_states: torch.Tensor) -> None:
        """Starts the CPU on its blocks of all calls; `add_cpu` fetches the result."""
        for_cpu = [CpuCall(call.expert.absent[call.num_streamed :], call.rows, call.weights) for call in calls if call.num_on_cpu]
        if for_cpu:
            self._cpu_output = self.mailbox.output(host_states.shape)
            self.timeline.begin("CPU", "blocks")
            self.cpu.submit(for_cpu, host_states, self._cpu_output)

    def add_cpu(self, output: torch.Tensor) -> None:
        """Waits for the CPU, if it was started, and adds its result to `output` [tokens, hidden] on the device."""
        if self._cpu_output is not None:
            self.cpu.wait()
            self.timeline.end("CPU", "blocks", self.cpu.finished_s())
            output += self._cpu_output.to(self.device, non_blocking=True)
            self._cpu_output = None

    def on_device(
        self,
        calls: list[ExpertCall],
        order: np.ndarray,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Queues resident and streamed blocks of all calls: [tokens, hidden] float32.

        `order`: the layer's choices [tokens * k] sorted by expert.
        """
        for call in calls:
            self.traffic.resident_blocks += call.expert.num_resident
            self.traffic.streamed_blocks += call.num_streamed
            self.traffic.cpu_blocks += call.num_on_cpu
        if not any(call.on_device for call in calls):
            return torch.zeros_like(hidden_states, dtype=torch.float32)
        most_tokens = max(len(call.rows) for call in calls)
        if self.in_place and most_tokens <= gpu().MAX_TOKENS:
            return self._read_in_place(calls, most_tokens, order, hidden_states, top_k_weights)
        return self._stage(calls, hidden_states, top_k_index, top_k_weights)

    def _read_in_place(
        self, calls: list[ExpertCall], most_tokens: int, order: np.ndarray, hidden_states: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        kernels, block = gpu(), calls[0].expert.resident
        block_elements, block_bytes = block.shape[1], block.shape[1] * block.itemsize
        lane = ("link", "blocks") if any(call.num_streamed for call in calls) else ("GPU", "resident")
        num_blocks = sum(call.expert.num_resident + call.num_streamed for call in calls)
        table = self.mailbox.table(kernels.table_size(num_blocks, len(calls), len(order)))
        stretches = [
            ([(e.absent_address, call.num_streamed), (e.resident_address, e.num_resident)], len(call.rows))
            for call in calls
            for e in (call.expert,)
        ]
        kernels.fill_table(table.numpy(), stretches, block_bytes, order)
        self.timeline.begin(*lane)
        table = table.to(self.device, non_blocking=True)
        block_neurons = block_elements // (3 * hidden_states.shape[1])
        result = kernels.apply_calls(table, num_blocks, len(calls), most_tokens, hidden_states, weights, block_neurons)
        self.timeline.end(*lane)
        return result

    def _stage(
        self, calls: list[ExpertCall], hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Through the ring. The link starts before anything else."""
        output = torch.zeros_like(hidden_states, dtype=torch.float32)
        calls = [call for call in calls if call.on_device]
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


def gpu():
    """The GPU kernels; their compiler, Triton, comes with PyTorch where there is CUDA."""
    from fiddler_run.kernels import gpu

    return gpu


class Mailbox:
    """Page-locked host memory through which activations go to the CPU and its results come back."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._buffers: dict[str, torch.Tensor] = {}

    def receive(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The device's tensors in host memory, until the next call. Waits for the device."""
        if not self._on_gpu:
            return [tensor.contiguous() for tensor in tensors]
        received = [self._buffer(str(number), tensor.shape, tensor.dtype) for number, tensor in enumerate(tensors)]
        for host, tensor in zip(received, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream().record_event().synchronize()
        return received

    def output(self, shape: torch.Size) -> torch.Tensor:
        """Room for the CPU's result, float32, until the next call of `receive`: by then the device has read it."""
        return self._buffer("output", shape, torch.float32)

    def table(self, size: int) -> torch.Tensor:
        """Room for `size` int64 that the device will read, until the next call of `receive`."""
        return self._buffer("table", torch.Size([size]), torch.int64)

    def _buffer(self, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        buffer, elements = self._buffers.get(name), shape.numel()
        if buffer is None or len(buffer) < elements or buffer.dtype != dtype:
            with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside of it
                buffer = self._buffers[name] = torch.empty(elements, dtype=dtype, pin_memory=self._on_gpu)
        return buffer[:elements].view(shape)


class StagingRing:
    """Device memory through which absent blocks are streamed: slots are reused in turn, copies run on their own stream.

    On a machine without CUDA the ring lies in host memory and the copies are plain ones.
    """

    def __init__(self, num_slots: int, block_elements: int, dtype: torch.dtype, device: torch.device):
        self.slots = torch.empty((num_slots, block_elements), dtype=dtype, device=device)
        self.copy_stream = None
        if device.type == "cuda":
            self.copy_stream = torch.cuda.Stream(device)
            self.copy_stream.wait_stream(torch.cuda.current_stream(device))  # earlier users of the slots' memory
        self._next = 0
        self._free = [None] * num_slots  # event: the last computation that read the slot is done

    def stream(self, blocks: list[torch.Tensor], timeline: Timeline) -> Iterator[torch.Tensor]:
        """Starts to copy `blocks`; yields each [1, block_elements] on the device, to be used before the next is asked for.

        As many copies as there are slots are under way at once.
        """
        copies = (self._copy(block, timeline) for block in blocks)
        return self._arrivals(deque(islice(copies, len(self.slots))), copies)

    def _arrivals(self, under_way: deque, copies: Iterator) -> Iterator[torch.Tensor]:
        while under_way:
            slot, copied = under_way.popleft()
            if copied is not None:
                torch.cuda.current_stream(self.slots.device).wait_event(copied)
            yield self.slots[slot : slot + 1]
            if copied is not None:
                self._free[slot] = torch.cuda.current_stream(self.slots.device).record_event()
            under_way.extend(islice(copies, 1))

    def _copy(self, block: torch.Tensor, timeline: Timeline) -> tuple[int, torch.cuda.Event | None]:
        """Queues the copy of a block into the next slot: (slot, event of its end)."""
        slot, self._next = self._next, (self._next + 1) % len(self.slots)
        if self.copy_stream is None:
            timeline.begin("link", "copy")
            self.slots[slot].copy_(block)
            timeline.end("link", "copy")
            return slot, None
        with torch.cuda.stream(self.copy_stream):
            if self._free[slot] is not None:
                self.copy_stream.wait_event(self._free[slot])
            timeline.begin("link", "copy")
            self.slots[slot].copy_(block, non_blocking=True)
            timeline.end("link", "copy")
            return slot, self.copy_stream.record_event()


def expert_groups(
    top_k_index: np.ndarray, top_k_weights: np.ndarray, num_experts: int
) -> tuple[np.ndarray, list[tuple[int, np.ndarray, np.ndarray]]]:
    """Groups the router's choices [tokens, k] by expert, leaving out experts that no token chose.

    Returns:
        the choices [tokens * k] sorted by expert; of each expert its number, rows [n] int64 and weights [n] float32, contiguous.
    """
    chosen = top_k_index.ravel()
    order = chosen.argsort(kind="stable")
    rows, weights = order // top_k_index.shape[1], top_k_weights.ravel()[order]
    stops = np.bincount(chosen, minlength=num_experts).cumsum().tolist()
    groups, start = [], 0
    for expert, stop in enumerate(stops):
        if stop > start:
            groups.append((expert, rows[start:stop], weights[start:stop]))
        start = stop
    return order, groups
