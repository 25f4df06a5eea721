"""Holds all experts of a model in GPU memory, host memory and on disk."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import torch

from fiddler_run.plan.schema import Plan
from fiddler_run.plan.shape import LOADING_THREADS
from fiddler_run.weights.arena import Arena
from fiddler_run.weights.checkpoint import Weights

STAGED_BYTES = 2**24  # of an expert on the way to GPU memory; a copy of few bytes is slow
Places = list[list[torch.Tensor]]  # by layer and expert: uint8 [count, block_bytes]


class ExpertStore:
    """A rank's part of the experts of a model, placed by the plan.

    `resident`, `host` and `on_disk` are views of three arenas.
    """

    def __init__(self, plan: Plan, device: torch.device, disk_folder: Path, number: int = 0):
        """Allocates the memory of rank `number`."""
        rank = plan.ranks[number]
        host = torch.device("cpu")
        self.block_format = plan.block_format
        self._device = device
        self._streams = rank.streams
        size = plan.block_bytes
        self._device_arena = Arena(rank.num_resident_blocks, size, device)
        self._host_arena = Arena(plan.host_blocks_of(number), size, host)
        self._disk_arena = Arena(rank.num_disk_blocks, size, host, disk_folder)
        self.resident: Places = []
        self.host: Places = []
        self.on_disk: Places = []
        self._referred: list[torch.Tensor] = []  # memory that blocks refer to
        self._parts = [plan.parts_of(number, layer) for layer in range(plan.model.num_layers)]
        for parts in self._parts:
            self.resident.append([self._device_arena.take(part.resident) for part in parts])
            self.host.append([self._host_arena.take(part.host) for part in parts])
            self.on_disk.append([self._disk_arena.take(part.on_disk) for part in parts])

    def load(self, weights: Weights, on_bytes: Callable[[int], None] = lambda _: None) -> None:
        """Fills the arenas, several experts at a time.

        Calls `on_bytes` with the bytes loaded since its last call.
        """
        experts = [
            (layer, expert) for layer, row in enumerate(self.resident) for expert in range(len(row))
        ]
        with one_thread_each(), ThreadPoolExecutor(LOADING_THREADS) as threads:
            try:
                placing = [threads.submit(self._place, weights, *each) for each in experts]
                for placed in as_completed(placing):
                    on_bytes(placed.result())
            except BaseException:  # even an interrupt must not wait for the remaining experts
                threads.shutdown(cancel_futures=True)
                raise
        if self._device.type == "cuda" and self._streams:
            self._host_arena.pin()

    @property
    def notes(self) -> list[str]:
        """How many blocks take more memory than the plan states, if there are any."""
        if not self._referred:
            return []
        more_bytes = sum(tensor.nbytes for tensor in self._referred)
        return [
            f"{len(self._referred)} blocks have more unusual weights than {self.block_format.name}"
            f" has room for: they take {more_bytes / 1e6:.1f} MB more host memory, and more time"
        ]

    def _place(self, weights: Weights, layer: int, expert: int) -> int:
        """Puts a rank's part of one expert into its three places, encoded. Returns its bytes."""
        start = self._parts[layer][expert].first
        resident = self.resident[layer][expert]
        host = self.host[layer][expert]
        on_disk = self.on_disk[layer][expert]
        if not len(resident) + len(host) + len(on_disk):
            return 0
        stored = weights.blocks(layer, expert, self.block_format)
        matrices = weights.expert(layer, expert) if stored is None else ()
        neurons = self.block_format.block_neurons

        def fill(blocks: torch.Tensor, first: int) -> None:
            first += start
            if stored is not None:
                blocks.copy_(stored[first : first + len(blocks)])
                return
            self._referred += self.block_format.encode(blocks, *matrices, first * neurons)

        fill(host, len(resident))
        fill(on_disk, len(resident) + len(host))
        if resident.is_cuda:
            at_once = max(1, STAGED_BYTES // self.block_format.block_bytes)
            staged = torch.empty_like(resident[:at_once], device="cpu", pin_memory=True)
            for first in range(0, len(resident), at_once):
                blocks = resident[first:][:at_once]
                fill(staged[: len(blocks)], first)
                blocks.copy_(staged[: len(blocks)])
        else:
            fill(resident, 0)
        return resident.nbytes + host.nbytes + on_disk.nbytes


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Restricts PyTorch's operations to the calling thread, because several threads call them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
