"""The work of a layer's experts for the current tokens, as plain data for both paths."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class ExpertCall:
    """The tokens that chose one expert, and how many of its host blocks to stream.

    If the layer's choices are sorted by expert, the call holds choices `start` to `start +
    len(rows)`: `rows` [n] int64 index the layer's tokens, `weights` [n] float32 are the router's.
    The CPU computes the blocks that are neither resident nor streamed.
    """

    expert: Expert
    start: int
    rows: np.ndarray
    weights: np.ndarray
    num_streamed: int

    @property
    def num_on_cpu(self) -> int:
        return self.expert.num_host - self.num_streamed + self.expert.num_on_disk

    @property
    def on_device(self) -> bool:
        return self.expert.num_resident > 0 or self.num_streamed > 0


@dataclass(frozen=True)
class Group:
    """The choices of one expert: `rows` [n] int64 index the tokens, `weights` [n] float32."""

    expert: int
    rows: np.ndarray
    weights: np.ndarray


def expert_groups(
    top_k_index: np.ndarray, top_k_weights: np.ndarray, num_experts: int
) -> list[Group]:
    """Groups the router's choices [tokens, k] by expert. Leaves out experts without a token.

    Choices of nonexistent experts are ignored: transformers uses the index `num_experts` for
    experts that other processes compute.
    """
    chosen = top_k_index.ravel()
    chosen = np.where((chosen >= 0) & (chosen < num_experts), chosen, num_experts)
    order = chosen.argsort(kind="stable")
    rows = order // top_k_index.shape[1]
    weights = top_k_weights.ravel()[order]
    stops = np.bincount(chosen, minlength=num_experts)[:num_experts].cumsum().tolist()
    groups = []
    start = 0
    for expert, stop in enumerate(stops):
        if stop > start:
            groups.append(Group(expert, rows[start:stop], weights[start:stop]))
        start = stop
    return groups
