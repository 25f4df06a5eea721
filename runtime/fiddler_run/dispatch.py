"""What one layer does with its experts: every called expert's blocks split over three executors, summed in float32.

    [0 ... resident) device, in place  |  [resident ... streamed) over the link, then device  |  [streamed ... end) CPU, in place

Any split gives the same result up to the order of addition, because an expert is a sum over its neurons. Device work and
copies are queued first and run while the CPU computes its share; the host waits only for the router's result and its input.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import linear, silu

from fiddler_run.arena import block_views


@dataclass
class Traffic:
    """Expert blocks that calls needed so far, and how many of them were resident."""

    needed_blocks: int = 0
    resident_blocks: int = 0

    def __sub__(self, earlier: "Traffic") -> "Traffic":
        return Traffic(self.needed_blocks - earlier.needed_blocks, self.resident_blocks - earlier.resident_blocks)

    @property
    def hit_rate(self) -> float:
        return self.resident_blocks / self.needed_blocks if self.needed_blocks else 0.0


@dataclass(frozen=True)
class ExpertCall:
    """The tokens that chose one expert, and its blocks by where they are computed.

    `rows` [n] into the layer's tokens and the router's `weights` [n, 1] float32, in host memory; blocks [count, block_elements].
    """

    rows: torch.Tensor
    weights: torch.Tensor
    resident: torch.Tensor
    streamed: torch.Tensor
    on_cpu: torch.Tensor


class StagingRing:
    """Device memory through which absent blocks are streamed: slots are reused in turn, copies run on their own stream.

    On a machine without CUDA the ring lies in host memory and the copies are plain ones.
    """

    def __init__(self, num_slots: int, block_elements: int, dtype: torch.dtype, device: torch.device):
        self.slots = torch.empty((num_slots, block_elements), dtype=dtype, device=device)
        self._next = 0
        self._copy_stream = None
        if device.type == "cuda":
            self._copy_stream = torch.cuda.Stream(device)
            self._copy_stream.wait_stream(torch.cuda.current_stream(device))  # earlier users of the slots' memory
        self._free = [None] * num_slots  # event: the last computation that read the slot is done

    def stream(self, block: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Copies one block to the device and applies it to `hidden_states` [n, hidden] there: [n, hidden] float32."""
        slot, self._next = self._next, (self._next + 1) % len(self.slots)
        staged = self.slots[slot : slot + 1]
        if self._copy_stream is None:
            staged[0].copy_(block)
            return apply_blocks(staged, hidden_states)
        compute_stream = torch.cuda.current_stream(self.slots.device)
        with torch.cuda.stream(self._copy_stream):
            if self._free[slot] is not None:
                self._copy_stream.wait_event(self._free[slot])
            staged[0].copy_(block, non_blocking=True)
            copied = self._copy_stream.record_event()
        compute_stream.wait_event(copied)
        result = apply_blocks(staged, hidden_states)
        self._free[slot] = compute_stream.record_event()
        return result


class LayerDispatch:
    """Serves one layer's experts module: (hidden_states, top_k_index, top_k_weights) -> hidden_states."""

    def __init__(
        self,
        resident: list[torch.Tensor],
        absent: list[torch.Tensor],
        streamed_blocks: Callable[[int, int], int],
        ring: StagingRing | None,
        traffic: Traffic,
    ):
        """
        Args:
            resident: for each expert, its blocks in device memory, [count, block_elements].
            absent: for each expert, its other blocks, in host memory.
            streamed_blocks: (tokens of a call, absent blocks of its expert) -> how many of them go over the link.
            ring: device memory to stream through; None if nothing is ever streamed.
            traffic: counts what calls need.
        """
        self.resident, self.absent, self.streamed_blocks = resident, absent, streamed_blocks
        self.ring, self.traffic = ring, traffic

    def __call__(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """hidden_states [tokens, hidden], top_k_index [tokens, k] and top_k_weights [tokens, k] on the device: [tokens, hidden]."""
        calls = [self._split(*group) for group in expert_groups(top_k_index.cpu(), top_k_weights.cpu(), len(self.resident))]
        self._count(calls)
        for_cpu = [call for call in calls if len(call.on_cpu)]
        host_states = hidden_states.cpu() if for_cpu else None
        output = torch.zeros_like(hidden_states, dtype=torch.float32)
        for call in calls:
            self._run_on_device(call, hidden_states, output)
        if for_cpu:
            output += _to_device(_run_on_cpu(for_cpu, host_states), output.device)
        return output.to(hidden_states.dtype)

    def _split(self, expert: int, rows: torch.Tensor, weights: torch.Tensor) -> ExpertCall:
        absent = self.absent[expert]
        streamed = self.streamed_blocks(len(rows), len(absent))
        return ExpertCall(rows, weights, self.resident[expert], absent[:streamed], absent[streamed:])

    def _count(self, calls: list[ExpertCall]) -> None:
        for call in calls:
            self.traffic.resident_blocks += len(call.resident)
            self.traffic.needed_blocks += len(call.resident) + len(call.streamed) + len(call.on_cpu)

    def _run_on_device(self, call: ExpertCall, hidden_states: torch.Tensor, output: torch.Tensor) -> None:
        """Queues the resident and the streamed blocks of one call; adds to `output`."""
        if len(call.resident) == 0 and len(call.streamed) == 0:
            return
        rows = _to_device(call.rows, output.device)
        states = hidden_states[rows]
        partial = apply_blocks(call.resident, states)
        for block in call.streamed:
            partial += self.ring.stream(block, states)
        output.index_add_(0, rows, partial * _to_device(call.weights, output.device))


def _run_on_cpu(calls: list[ExpertCall], host_states: torch.Tensor) -> torch.Tensor:
    """Computes the CPU's blocks of `calls`: [tokens, hidden] float32 in host memory."""
    output = torch.zeros_like(host_states, dtype=torch.float32)
    for call in calls:
        output.index_add_(0, call.rows, apply_blocks(call.on_cpu, host_states[call.rows]) * call.weights)
    return output


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy that does not make the host wait for the work queued on the device: only page-locked memory allows that."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def expert_groups(
    top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int
) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """Groups the router's choices [tokens, k], in host memory, by expert: (expert, rows [n], weights [n, 1] float32).

    Experts that no token chose are left out.
    """
    top_k = top_k_index.shape[1]
    chosen = top_k_index.flatten()
    order = chosen.argsort(stable=True)
    weights = top_k_weights.float().flatten()[order].unsqueeze(1)
    counts = chosen.bincount(minlength=num_experts).tolist()
    groups = zip((order // top_k).split(counts), weights.split(counts), strict=True)
    return [(expert, rows, w) for expert, (rows, w) in enumerate(groups) if len(rows)]


def apply_blocks(blocks: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """The sum of `blocks` [count, block_elements] applied to `hidden_states` [n, hidden]: [n, hidden] float32.

    Each block is silu(x gate^T) * (x up^T) times down^T in the weights' dtype. Blocks go one by one: PyTorch's batched
    bfloat16 matmul on the CPU is 40 times slower than its linear.
    """
    output = torch.zeros_like(hidden_states, dtype=torch.float32)
    for gate_up_rows, down in zip(*block_views(blocks, hidden_states.shape[1]), strict=True):
        gate, up = linear(hidden_states, gate_up_rows).chunk(2, dim=-1)
        output += linear(silu(gate) * up, down)
    return output
