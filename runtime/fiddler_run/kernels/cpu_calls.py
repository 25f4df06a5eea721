"""Calls of experts whose blocks the CPU computes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class CpuCall:
    """Some blocks of one expert, uint8 [count, block_bytes], and the tokens that call it.

    `rows` [n] int64 index the layer's tokens. `weights` [n] float32 are the router's, contiguous.
    """

    blocks: torch.Tensor
    rows: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class CpuCalls:
    """Calls of a layer, as arrays: hundreds of objects would keep the CPU waiting.

    Call i computes the `count[i]` blocks at `address[i]` for the tokens `rows` and with the
    router's `weights` [n], both from `start[i]` to `stop[i]`. Arrays are int64, except `weights`,
    float32. `memory` keeps the blocks alive.
    """

    address: np.ndarray
    count: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    rows: np.ndarray
    weights: np.ndarray
    memory: object

    def __len__(self) -> int:
        return len(self.address)

    @classmethod
    def of(cls, calls: Sequence[CpuCall]) -> CpuCalls:
        """The same calls."""
        stop = np.cumsum([len(call.rows) for call in calls], dtype=np.int64)
        return cls(
            np.array([call.blocks.data_ptr() for call in calls], dtype=np.int64),
            np.array([len(call.blocks) for call in calls], dtype=np.int64),
            stop - [len(call.rows) for call in calls],
            stop,
            np.concatenate([call.rows for call in calls]) if calls else np.zeros(0, np.int64),
            np.concatenate([call.weights for call in calls]) if calls else np.zeros(0, np.float32),
            calls,
        )

    def each(self, block_bytes: int) -> Iterator[CpuCall]:
        """Yields the calls that have blocks."""
        some = self.count.nonzero()
        arrays = (each[some].tolist() for each in (self.address, self.count, self.start, self.stop))
        for address, count, start, stop in zip(*arrays, strict=True):
            memory = (ctypes.c_uint8 * (count * block_bytes)).from_address(address)
            blocks = torch.frombuffer(memory, dtype=torch.uint8).view(count, block_bytes)
            yield CpuCall(blocks, self.rows[start:stop], self.weights[start:stop])
