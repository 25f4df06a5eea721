"""Where expert weights live: one arena of blocks in device memory, one in host memory, and one on disk if those are too small.

A block is `block_neurons` neurons of one expert, stored contiguously: gate rows [b, hidden], up rows [b, hidden], down
columns [hidden, b]. It is a small dense expert of its own, and one contiguous copy over the link.
"""

import ctypes
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from fiddler_run.checkpoint import Weights
from fiddler_run.errors import FiddlerError
from fiddler_run.kernels.pytorch import block_views
from fiddler_run.plan import Plan

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LOADING_THREADS = 8  # more hold more memory and read no faster


class Arena:
    """`num_blocks` equal blocks in one allocation of exactly their size, handed out in order.

    With a `folder` they lie in a file there, which has no name and is gone with the process; the system keeps in memory what
    of it there is room for.

    In host memory it consists of huge pages where the system grants them; `pin` page-locks it, so that copies to a GPU are
    asynchronous and at full speed. (`Tensor.pin_memory()` would round the size up to a power of two.)
    """

    def __init__(self, num_blocks: int, block_elements: int, dtype: torch.dtype, device: torch.device, folder: Path | None = None):
        self._memory: mmap.mmap | None = None  # what the blocks lie in; it lives as long as any view of them
        size = num_blocks * block_elements * dtype.itemsize
        if size > 0 and (folder is not None or device.type == "cpu"):
            self._memory = _huge_pages(size) if folder is None else _on_disk(size, folder)
            self.blocks = torch.frombuffer(self._memory, dtype=dtype).view(num_blocks, block_elements)
        else:
            self.blocks = torch.empty((num_blocks, block_elements), dtype=dtype, device=device)
        self._taken = 0

    def take(self, count: int) -> torch.Tensor:
        """The next `count` blocks: [count, block_elements]."""
        assert self._taken + count <= len(self.blocks)
        self._taken += count
        return self.blocks[self._taken - count : self._taken]

    def pin(self) -> None:
        """Page-locks an arena in host memory, as long as any view of it lives. Best once it has been filled, by several threads:
        that gives it its pages.

        Raises:
            FiddlerError: the system refuses.
        """
        if len(self.blocks) == 0:
            return
        status = torch.cuda.cudart().cudaHostRegister(self.blocks.data_ptr(), self.blocks.nbytes, 0)
        if int(status) != 0:
            with suppress(RuntimeError):
                torch.zeros(1, device="cuda")  # raises the same error again, which CUDA then forgets
            raise FiddlerError(
                f"cannot page-lock {self.blocks.nbytes / 1e9:.1f} GB of host memory for experts ({status}); free some, raise the "
                "limit with `ulimit -l unlimited`, or leave them to the CPU: `staging: 0` and `stream_share: {1: 0.0}` in the plan"
            )
        weakref.finalize(self._memory, _unpin, self.blocks.data_ptr(), os.getpid()).atexit = False


def _unpin(address: int, pid: int) -> None:
    if os.getpid() == pid:  # a forked process has no CUDA
        torch.cuda.synchronize()  # copies from it may still be under way
        torch.cuda.cudart().cudaHostUnregister(address)


def _huge_pages(size: int) -> mmap.mmap:
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise FiddlerError(f"cannot take {size / 1e9:.1f} GB of host memory for experts ({error}); free some") from None
    with suppress(OSError, AttributeError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _on_disk(size: int, folder: Path) -> mmap.mmap:
    """A mapped file in `folder` that no other process sees.

    Raises:
        FiddlerError: the folder cannot be written, or has no room.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # The room is taken now: a process that writes to a mapped file when the disk is full is killed.
            os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise FiddlerError(
            f"{folder}: cannot keep experts there: {error.strerror or error}; name another folder with --disk-folder"
        ) from None


def will_need(blocks: torch.Tensor) -> None:
    """Asks the system to read blocks of an arena on disk [count, block_elements] ahead of their use."""
    start = blocks.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(blocks.data_ptr() + blocks.nbytes - start), mmap.MADV_WILLNEED)


_libc = ctypes.CDLL(None)


class ExpertStore:
    """All experts of a model, placed as the plan says.

    `resident[layer][expert]`, `absent[layer][expert]`, `on_disk[layer][expert]`: [count, block_elements] views of three arenas.
    """

    def __init__(self, plan: Plan, device: torch.device, disk_folder: Path):
        self.block_neurons = plan.block_neurons
        self.block_elements = 3 * plan.block_neurons * plan.model.hidden_size
        self.dtype, self.device, self._streams = TORCH_DTYPES[plan.model.dtype], device, plan.streams
        self._device_arena = Arena(plan.num_resident_blocks, self.block_elements, self.dtype, device)
        self._host_arena = Arena(plan.num_absent_blocks, self.block_elements, self.dtype, torch.device("cpu"))
        self._disk_arena = Arena(plan.num_disk_blocks, self.block_elements, self.dtype, torch.device("cpu"), disk_folder)
        rows = [plan.resident_blocks[layer] for layer in range(plan.model.num_layers)]
        spilt = [plan.disk_blocks.get(layer, [0] * plan.model.num_experts) for layer in range(plan.model.num_layers)]
        blocks = plan.blocks_per_expert
        self.resident = [[self._device_arena.take(count) for count in row] for row in rows]
        self.on_disk = [[self._disk_arena.take(count) for count in row] for row in spilt]
        self.absent = [
            [self._host_arena.take(blocks - count - disk) for count, disk in zip(row, of_disk, strict=True)]
            for row, of_disk in zip(rows, spilt, strict=True)
        ]

    def load(self, weights: Weights, on_bytes: Callable[[int], None] = lambda _: None) -> None:
        """Fills the arenas, several experts at once; calls `on_bytes` with the bytes placed since the last call."""
        experts = [(layer, expert) for layer, row in enumerate(self.resident) for expert in range(len(row))]
        with _one_thread_each(), ThreadPoolExecutor(LOADING_THREADS) as threads:
            try:
                for placed in as_completed([threads.submit(self._place, weights, *each) for each in experts]):
                    on_bytes(placed.result())
            except BaseException:  # an interrupt too must not wait until the rest is loaded
                threads.shutdown(cancel_futures=True)
                raise
        if self.device.type == "cuda" and self._streams:
            self._host_arena.pin()

    def _place(self, weights: Weights, layer: int, expert: int) -> int:
        """Cuts one expert into its three places: bytes."""
        resident, absent, on_disk = (place[layer][expert] for place in (self.resident, self.absent, self.on_disk))
        gate, up, down = weights.expert(layer, expert)
        fill_blocks(absent, gate, up, down, first_neuron=len(resident) * self.block_neurons)
        fill_blocks(on_disk, gate, up, down, first_neuron=(len(resident) + len(absent)) * self.block_neurons)
        if resident.is_cuda:
            packed = torch.empty_like(resident[:1], device="cpu", pin_memory=True)
            for number, block in enumerate(resident):
                fill_blocks(packed, gate, up, down, first_neuron=number * self.block_neurons)
                block.copy_(packed[0])
        else:
            fill_blocks(resident, gate, up, down, first_neuron=0)
        return resident.nbytes + absent.nbytes + on_disk.nbytes


@contextmanager
def _one_thread_each():
    """PyTorch's operations use the thread that calls them and no other: several of those call at once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
