"""CUDA graphs: GPU work that is captured once and then launched as a whole."""

import warnings
from contextlib import suppress
from functools import cache
from typing import Protocol

import torch


class Capture(Protocol):
    """A piece of work on the device, described by the operations between `begin` and `end`."""

    def begin(self) -> None:
        """From here on, operations on the device become part of the piece."""

    def end(self) -> None:
        """Ends the piece, and does it for the first time."""

    def abort(self) -> None:
        """Ends a piece whose description failed."""

    def replay(self) -> None:
        """Does it again, with the same memory."""


class GraphCapture:
    """A CUDA graph, captured on the current stream."""

    def __init__(self, pool: tuple[int, int]):
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()

    def begin(self) -> None:
        self._graph.capture_begin(self._pool, capture_error_mode="thread_local")

    def end(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a piece may be empty
            self._graph.capture_end()
        self._graph.replay()

    def abort(self) -> None:
        try:
            self._graph.capture_end()
        except RuntimeError:
            # PyTorch omits the allocator's part if the capture failed. The allocator would then
            # never free cached memory, nor the pool's, again.
            device = torch.cuda.current_device()
            for end in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
                with suppress(RuntimeError):
                    end(device, self._pool)

    def replay(self) -> None:
        self._graph.replay()


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all models: cuBLAS keeps up to 32 MiB for each stream it was used on."""
    return torch.cuda.Stream(device)
