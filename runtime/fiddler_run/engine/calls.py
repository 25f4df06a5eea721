"""The work of a layer's experts for the current tokens, as plain data for both paths.

Layers may have hundreds of experts, and the device waits while Python groups their tokens. So the
calls of a layer are arrays, not objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


@dataclass(frozen=True)
class Traffic:
    """Number of expert blocks that calls needed, by where they were computed."""

    resident_blocks: int = 0
    streamed_blocks: int = 0
    cpu_blocks: int = 0

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(
            self.resident_blocks - earlier.resident_blocks,
            self.streamed_blocks - earlier.streamed_blocks,
            self.cpu_blocks - earlier.cpu_blocks,
        )

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.resident_blocks + other.resident_blocks,
            self.streamed_blocks + other.streamed_blocks,
            self.cpu_blocks + other.cpu_blocks,
        )

    def bytes_by_resource(self, block_bytes: int) -> dict[str, int]:
        """Bytes by the resource that carried them: `gpu_memory`, `link`, `cpu`."""
        return {
            "gpu_memory": self.resident_blocks * block_bytes,
            "link": self.streamed_blocks * block_bytes,
            "cpu": self.cpu_blocks * block_bytes,
        }

    @property
    def needed_blocks(self) -> int:
        return self.resident_blocks + self.streamed_blocks + self.cpu_blocks

    @property
    def hit_rate(self) -> float:
        return self.resident_blocks / self.needed_blocks if self.needed_blocks else 0.0


class Expert:
    """The blocks of one expert, uint8 [count, block_bytes], by place.

    `resident` blocks are in device memory, `host` blocks in host memory, `on_disk` blocks in a
    mapped file.
    """

    def __init__(self, resident: torch.Tensor, host: torch.Tensor, on_disk: torch.Tensor):
        self.resident = resident
        self.host = host
        self.on_disk = on_disk
        self.num_resident = len(resident)
        self.num_host = len(host)
        self.num_on_disk = len(on_disk)
        self.num_blocks = max(1, self.num_resident + self.num_host + self.num_on_disk)


class Place:
    """The blocks of a layer's experts in one place: `address` and `count` [num_experts] int64."""

    def __init__(self, blocks: Sequence[torch.Tensor]):
        self.blocks = blocks
        self.address = np.array([each.data_ptr() for each in blocks], dtype=np.int64)
        self.count = np.array([len(each) for each in blocks], dtype=np.int64)


class LayerExperts:
    """A layer's experts. `block_bytes` is the size of a block."""

    def __init__(self, experts: Sequence[Expert]):
        self.resident = Place([expert.resident for expert in experts])
        self.host = Place([expert.host for expert in experts])
        self.on_disk = Place([expert.on_disk for expert in experts])
        self.num_blocks = np.array([expert.num_blocks for expert in experts], dtype=np.int64)
        self.block_bytes = experts[0].host[:1].element_size() * experts[0].host.shape[1]


@dataclass(frozen=True)
class Choices:
    """The router's choices of existing experts, sorted by expert.

    `experts` [c] int64 are the called experts. Expert `experts[i]` has the choices `starts[i]` to
    `starts[i + 1]` of `numbers`, `rows` and `weights` [n]: `numbers` int64 are token * k + place,
    `rows` int64 index the layer's tokens, `weights` float32 are the router's.
    """

    experts: np.ndarray
    starts: np.ndarray
    numbers: np.ndarray
    rows: np.ndarray
    weights: np.ndarray

    @cached_property
    def tokens(self) -> np.ndarray:
        """Tokens of each called expert, [c] int64."""
        return np.diff(self.starts)


@dataclass(frozen=True)
class ExpertCalls:
    """The calls of a layer's experts, and how many host blocks of each to stream, [c] int64.

    The CPU computes the blocks that are neither resident nor streamed. Other arrays are [c], too.
    """

    layer: LayerExperts
    choices: Choices
    num_streamed: np.ndarray

    @cached_property
    def num_resident(self) -> np.ndarray:
        return self.layer.resident.count[self.choices.experts]

    @cached_property
    def num_host(self) -> np.ndarray:
        return self.layer.host.count[self.choices.experts]

    @cached_property
    def num_on_disk(self) -> np.ndarray:
        return self.layer.on_disk.count[self.choices.experts]

    @cached_property
    def num_on_cpu(self) -> np.ndarray:
        return self.num_host - self.num_streamed + self.num_on_disk

    @cached_property
    def traffic(self) -> np.ndarray:
        """Blocks of all calls, [3] int64: resident, streamed, on the CPU."""
        return np.array([self.num_resident.sum(), self.num_streamed.sum(), self.num_on_cpu.sum()])

    @cached_property
    def streaming(self) -> np.ndarray:
        """The calls with blocks to stream."""
        return self.num_streamed.nonzero()[0]

    def runs(self) -> Runs:
        """The blocks to stream, one run for each of `streaming`."""
        return Runs.of(self.layer, self.choices.experts, self.num_streamed)


@dataclass(frozen=True)
class Runs:
    """Blocks to stream: run i is the first `counts[i]` of `blocks[i]`, uint8 [*, block_bytes]."""

    blocks: list[torch.Tensor]
    counts: list[int]

    @classmethod
    def of(cls, layer: LayerExperts, experts: np.ndarray, num_streamed: np.ndarray) -> Runs:
        """The first host blocks of each expert [c] that streams any, `num_streamed` [c] of them."""
        some = num_streamed.nonzero()[0]
        blocks = [layer.host.blocks[expert] for expert in experts[some].tolist()]
        return cls(blocks, num_streamed[some].tolist())

    def __len__(self) -> int:
        return len(self.counts)

    def addresses(self) -> list[int]:
        """Where each run begins."""
        return [blocks.data_ptr() for blocks in self.blocks]


def sorted_choices(top_k_index: np.ndarray, top_k_weights: np.ndarray, num_experts: int) -> Choices:
    """Sorts the router's choices [tokens, k] by expert.

    Choices of nonexistent experts are ignored: transformers uses the index `num_experts` for
    experts that other processes compute.
    """
    chosen = top_k_index.ravel()
    chosen = np.where((chosen >= 0) & (chosen < num_experts), chosen, num_experts)
    counts = np.bincount(chosen, minlength=num_experts)[:num_experts]
    experts = counts.nonzero()[0]
    starts = np.concatenate(([0], counts[experts].cumsum()))
    if num_experts < 2**15:
        chosen = chosen.astype(np.int16)  # which NumPy sorts in linear time
    numbers = chosen.argsort(kind="stable")[: starts[-1]]
    rows = numbers // top_k_index.shape[1]
    return Choices(experts, starts, numbers, rows, top_k_weights.ravel()[numbers])
