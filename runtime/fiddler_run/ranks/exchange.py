"""Carries a layer's inputs from rank 0 to the other ranks, and their partial sums back.

By torch.distributed: NCCL between the GPUs of one machine, on the stream and within CUDA graphs;
otherwise gloo, through host memory.
"""

from __future__ import annotations

import ctypes
import os
from abc import ABC, abstractmethod
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as distributed
from torch import Tensor

from fiddler_run.command import ends_at_once

CONNECT_TIMEOUT = timedelta(seconds=60)
LAYER_TIMEOUT = timedelta(minutes=30)  # a rank that ends is noticed at once
MAX_CHANNELS = 8  # of NCCL: more take GPU memory, and layers send little
ALIGNMENT = 16  # bytes, of each tensor in a message; Triton compiles other variants for less


class Inputs(NamedTuple):
    """hidden_states [tokens, hidden], top_k_index [tokens, k] int64, top_k_weights [tokens, k]
    float32.
    """

    states: Tensor
    index: Tensor
    weights: Tensor


class Sizes(NamedTuple):
    """The sizes of a layer's inputs."""

    tokens: int
    choices: int  # of each token
    hidden: int
    dtype: torch.dtype

    @classmethod
    def of(cls, inputs: Inputs) -> Sizes:
        return cls(*inputs.index.shape, inputs.states.shape[1], inputs.states.dtype)

    def message(self, device: torch.device, pinned: bool = False) -> tuple[Tensor, Inputs]:
        """An empty message, uint8, and its views. `pinned`: in page-locked host memory."""
        shapes = [
            ((self.tokens, self.hidden), self.dtype),
            ((self.tokens, self.choices), torch.int64),
            ((self.tokens, self.choices), torch.float32),
        ]
        sizes = [rows * columns * dtype.itemsize for (rows, columns), dtype in shapes]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        message = torch.empty(starts[-1], dtype=torch.uint8, device=device, pin_memory=pinned)
        views = (
            message[start : start + size].view(dtype).view(shape)
            for start, size, (shape, dtype) in zip(starts, sizes, shapes, strict=False)
        )
        return message, Inputs(*views)


class Exchange(ABC):
    """One rank's end. `device` holds the tensors of this rank."""

    can_record = False  # True if it can be captured in a CUDA graph

    def __init__(self, num_ranks: int, device: torch.device):
        ends_at_once.set()  # threads of gloo and NCCL may crash Python's shutdown
        self.num_ranks = num_ranks
        self.device = device

    @abstractmethod
    def broadcast(self, inputs: Inputs) -> None:
        """Rank 0: sends a layer's inputs to the others."""

    @abstractmethod
    def receive(self, sizes: Sizes) -> Inputs:
        """Others: the inputs that rank 0 sends, on this rank's device."""

    @abstractmethod
    def reduce(self, partial: Tensor, dtype: torch.dtype) -> Tensor:
        """Rank 0: the sum of all ranks' partial sums [tokens, hidden] float32, in `dtype`."""

    @abstractmethod
    def send(self, partial: Tensor) -> None:
        """Others: sends a partial sum to rank 0."""

    @abstractmethod
    def abort(self) -> None:
        """Ends all pending work without results. May be called from any thread."""


class NcclExchange(Exchange):
    """Between the GPUs of one machine. The order of the sum is NCCL's, and always the same."""

    can_record = True

    # It is never destroyed in order: NCCL would wait for the CUDA graphs that hold its work. The
    # end of the process ends it.

    def __init__(self, rank: int, num_ranks: int, device: torch.device, store: distributed.Store):
        super().__init__(num_ranks, device)
        # Each rank captures its own part, when it can: nothing may depend on a capture by all.
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
        # Failures are noticed by the connections. PyTorch's watchdog would end the process by a
        # signal before its user is told anything.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        options = distributed.ProcessGroupNCCL.Options()
        options.config.max_ctas = MAX_CHANNELS
        self._group = distributed.ProcessGroupNCCL(store, rank, num_ranks, options)
        self._broadcast = distributed.BroadcastOptions()
        self._broadcast.rootRank = 0
        self._reduce = distributed.ReduceOptions()
        self._reduce.rootRank = 0
        for each in (self._broadcast, self._reduce):
            each.asyncOp = False  # on the current stream
        self._group.broadcast([torch.zeros(1, device=device)], self._broadcast)
        torch.cuda.synchronize(device)

    def broadcast(self, inputs: Inputs) -> None:
        message, views = Sizes.of(inputs).message(self.device)
        for view, tensor in zip(views, inputs, strict=True):
            view.copy_(tensor)
        self._group.broadcast([message], self._broadcast)

    def receive(self, sizes: Sizes) -> Inputs:
        message, views = sizes.message(self.device)
        self._group.broadcast([message], self._broadcast)
        return views

    def reduce(self, partial: Tensor, dtype: torch.dtype) -> Tensor:
        self._group.reduce([partial], self._reduce)
        return partial.to(dtype)

    def send(self, partial: Tensor) -> None:
        self._group.reduce([partial], self._reduce)

    def abort(self) -> None:
        _keep(self._group)
        self._group.abort()


class GlooExchange(Exchange):
    """Through host memory, between any ranks. Sums are added in the order of the ranks."""

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        device: torch.device,
        store: distributed.Store,
        address: str,
    ):
        """Connects this rank.

        Args:
            address: of this machine, to be reached by the others.
        """
        super().__init__(num_ranks, device)
        options = distributed.ProcessGroupGloo._Options()
        options._devices = [distributed.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = CONNECT_TIMEOUT
        self._group = distributed.ProcessGroupGloo(store, rank, num_ranks, options)
        self._host = torch.device("cpu")
        self._pinned = device.type == "cuda"  # otherwise, this rank uses no GPU
        self._under_way: list[tuple[distributed.Work, Tensor]] = []  # keeps messages alive

    def broadcast(self, inputs: Inputs) -> None:
        message, views = Sizes.of(inputs).message(self._host, self._pinned)
        for view, tensor in zip(views, inputs, strict=True):
            view.copy_(tensor, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        for work, _ in self._under_way:
            work.wait(LAYER_TIMEOUT)
        others = range(1, self.num_ranks)
        self._under_way = [(self._group.send([message], other, 0), message) for other in others]

    def receive(self, sizes: Sizes) -> Inputs:
        message, views = sizes.message(self._host, self._pinned)
        self._group.recv([message], 0, 0).wait(LAYER_TIMEOUT)
        return Inputs(*(view.to(self.device) for view in views))

    def reduce(self, partial: Tensor, dtype: torch.dtype) -> Tensor:
        for other in range(1, self.num_ranks):
            received = torch.empty(partial.shape, dtype=partial.dtype, pin_memory=self._pinned)
            self._group.recv([received], other, 0).wait(LAYER_TIMEOUT)
            partial += received.to(self.device)
        return partial.to(dtype)

    def send(self, partial: Tensor) -> None:
        self._group.send([partial.to(self._host)], 0, 0).wait(LAYER_TIMEOUT)

    def abort(self) -> None:
        """Ends nothing: gloo itself notices that another process has ended."""
        _keep(self._group)


def _keep(group: object) -> None:
    """Keeps a group from being destroyed: after the loss of a rank, that may crash."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
