"""Where expert weights live: one arena of blocks in device memory, one in host memory.

A block is `block_neurons` neurons of one expert, stored contiguously: gate rows [b, hidden], up rows [b, hidden], down
columns [hidden, b]. It is a small dense expert of its own, and one contiguous copy over the link.
"""

from collections.abc import Callable

import torch

from fiddler_run.checkpoint import Checkpoint
from fiddler_run.errors import FiddlerError
from fiddler_run.plan import Plan

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Arena:
    """`num_blocks` equal blocks in one allocation of exactly their size, handed out in order.

    In host memory beside a CUDA device the allocation is page-locked, so that copies from it are asynchronous and at full
    speed. (`Tensor.pin_memory()` would round the size up to a power of two.)
    """

    def __init__(self, num_blocks: int, block_elements: int, dtype: torch.dtype, device: torch.device, pinned: bool = False):
        self.blocks = torch.empty((num_blocks, block_elements), dtype=dtype, device=device)
        self._taken = 0
        self._pinned = pinned and num_blocks > 0
        if self._pinned:
            status = torch.cuda.cudart().cudaHostRegister(self.blocks.data_ptr(), self.blocks.nbytes, 0)
            if int(status) != 0:
                self._pinned = False
                raise FiddlerError(
                    f"cannot page-lock {self.blocks.nbytes / 1e9:.1f} GB of host memory for experts ({status}); "
                    "raise the limit with `ulimit -l unlimited` or free host memory"
                )

    def take(self, count: int) -> torch.Tensor:
        """The next `count` blocks: [count, block_elements]."""
        assert self._taken + count <= len(self.blocks)
        self._taken += count
        return self.blocks[self._taken - count : self._taken]

    def __del__(self):
        if getattr(self, "_pinned", False):
            torch.cuda.synchronize()  # copies from it may still be under way
            torch.cuda.cudart().cudaHostUnregister(self.blocks.data_ptr())


class ExpertStore:
    """All experts of a model, placed as the plan says.

    `resident[layer][expert]` and `absent[layer][expert]` are [count, block_elements] views of the two arenas.
    """

    def __init__(self, plan: Plan, device: torch.device):
        self.block_neurons = plan.block_neurons
        elements = 3 * plan.block_neurons * plan.model.hidden_size
        dtype = TORCH_DTYPES[plan.model.dtype]
        on_gpu = device.type == "cuda"
        device_arena = Arena(plan.num_resident_blocks, elements, dtype, device)
        host_arena = Arena(plan.num_absent_blocks, elements, dtype, torch.device("cpu"), pinned=on_gpu)
        self.arenas = (device_arena, host_arena)
        rows = [plan.resident_blocks[layer] for layer in range(plan.model.num_layers)]
        self.resident = [[device_arena.take(count) for count in row] for row in rows]
        self.absent = [[host_arena.take(plan.blocks_per_expert - count) for count in row] for row in rows]

    def load(self, checkpoint: Checkpoint, on_bytes: Callable[[int], None] = lambda _: None) -> None:
        """Fills the arenas; calls `on_bytes` with the bytes placed since the last call."""
        for layer, (resident_row, absent_row) in enumerate(zip(self.resident, self.absent, strict=True)):
            for expert, (resident, absent) in enumerate(zip(resident_row, absent_row, strict=True)):
                gate, up, down = checkpoint.expert(layer, expert)
                fill_blocks(absent, gate, up, down, first_neuron=len(resident) * self.block_neurons)
                packed = torch.empty_like(resident, device="cpu")
                fill_blocks(packed, gate, up, down, first_neuron=0)
                resident.copy_(packed)
                on_bytes(resident.nbytes + absent.nbytes)


def fill_blocks(blocks: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, first_neuron: int) -> None:
    """Cuts neurons from `first_neuron` on into `blocks` [count, block_elements] in host memory.

    Neurons past the expert's last one are zeros, which add nothing to its output.
    """
    intermediate, hidden = gate.shape
    count, block_neurons = len(blocks), blocks.shape[1] // (3 * hidden)
    whole = min(count, max(0, intermediate - first_neuron) // block_neurons)
    stop = first_neuron + whole * block_neurons
    gate_up_rows, down_columns = block_views(blocks, hidden)
    gate_rows, up_rows = gate_up_rows.split(block_neurons, dim=1)
    gate_rows[:whole] = gate[first_neuron:stop].view(whole, block_neurons, hidden)
    up_rows[:whole] = up[first_neuron:stop].view(whole, block_neurons, hidden)
    down_columns[:whole] = down[:, first_neuron:stop].unflatten(1, (whole, block_neurons)).transpose(0, 1)
    if whole < count:
        rest = intermediate - stop
        blocks[whole].zero_()
        gate_rows[whole, :rest] = gate[stop:]
        up_rows[whole, :rest] = up[stop:]
        down_columns[whole, :, :rest] = down[:, stop:]


def block_views(blocks: torch.Tensor, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate above up [count, 2 * b, hidden], and down [count, hidden, b], inside `blocks` [count, 3 * b * hidden]."""
    third = blocks.shape[1] // 3
    gate_up, down = blocks.split((2 * third, third), dim=1)
    return gate_up.unflatten(1, (-1, hidden)), down.unflatten(1, (hidden, -1))
