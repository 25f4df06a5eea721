"""CUDA graphs: GPU work that is captured once and then launched as a whole."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


class Graphs:
    """Makes captures of CUDA graphs, which share memory."""

    def __init__(self):
        self.pool = torch.cuda.graph_pool_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []

    def __call__(self) -> GraphCapture:
        return GraphCapture(self)

    def give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """Mends PyTorch's state after a failed capture of this graph."""
        device = torch.cuda.current_device()
        # The allocator would never free cached memory, nor the pool's, again, and the generator
        # would refuse to draw numbers.
        for end in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
            with suppress(RuntimeError):
                end(device, self.pool)
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())
        # The allocator of page-locked memory offers no such function. It keeps a reference to the
        # graph, and refuses another capture with this pool.
        self._failed.append(graph)
        self.pool = torch.cuda.graph_pool_handle()


class GraphCapture:
    """A CUDA graph, captured on the current stream."""

    def __init__(self, graphs: Graphs):
        self._graphs = graphs
        self._graph = torch.cuda.CUDAGraph()
        self._has_begun = False
        self._has_ended = False

    def begin(self) -> None:
        self._graph.capture_begin(self._graphs.pool, capture_error_mode="thread_local")
        self._has_begun = True

    def end(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a piece may be empty
            self._graph.capture_end()
        self._has_ended = True
        self._graph.replay()

    def abort(self) -> None:
        if not self._has_begun or self._has_ended:
            return
        try:
            self._graph.capture_end()
        except RuntimeError:
            self._graphs.give_up(self._graph)

    def replay(self) -> None:
        self._graph.replay()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keeps the garbage collector from destroying older graphs, which would end a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def on_capture_stream(device: torch.device) -> Iterator[None]:
    """Runs on a stream that can be captured, in order with the current stream's work."""
    if device.type != "cuda":
        yield
        return
    stream = _capture_stream(device)
    current = torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all models: cuBLAS keeps up to 32 MiB for each stream it was used on."""
    return torch.cuda.Stream(device)
