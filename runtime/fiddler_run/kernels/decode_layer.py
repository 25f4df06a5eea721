"""A layer of the decode path as seen by the CPU's threads, which receive the router's choice from
the GPU.

The structures mirror those of route.h.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from fiddler_run.kernels.limits import MAX_DECODE_TOKENS, MEMORY_BOUND_TOKENS
from fiddler_run.plan.split import fading, scale_odds

GPU_TIMEOUT_S = 30.0  # after which the CPU gives up on the GPU, and the GPU on the CPU


class Job(NamedTuple):
    """The number of a CPU job: `number` more than `before`, [1] int64 on the GPU.

    A CUDA graph can be replayed for other jobs by changing `before`.
    """

    before: torch.Tensor
    number: int


class DecodeLayer:
    """A layer's experts: where their blocks are, and the share of host blocks to stream."""

    def __init__(
        self,
        resident: Sequence[torch.Tensor],
        host: Sequence[torch.Tensor],
        stream_share: Callable[[int], float],
    ):
        """Prepares a layer.

        Args:
            resident, host: for each expert, its blocks, uint8 [count, block_bytes].
            stream_share: maps the tokens of a call to the share of its expert's host blocks to
                stream.
        """
        self._blocks = (resident, host)  # kept alive as long as this object
        self.calls = np.zeros(len(resident), dtype=np.int64)  # tokens of each expert so far
        self._planned = [stream_share(tokens) for tokens in range(1, MAX_DECODE_TOKENS + 1)]
        self.num_experts = len(resident)
        self.places = (_Places * self.num_experts)(
            *(
                (there.data_ptr(), here.data_ptr(), len(there), len(here))
                for here, there in zip(resident, host, strict=True)
            )
        )
        self.shares = (ctypes.c_double * (MAX_DECODE_TOKENS + 1))(0.0, *self._planned)
        counts = (len(here) + len(there) for here, there in zip(resident, host, strict=True))
        self._num_blocks = sorted(counts, reverse=True)
        by_tokens = enumerate(self.shares) if any(map(len, host)) else ()
        streaming = (tokens for tokens, share in by_tokens if share > 0)
        self._streams_from = next(streaming, MAX_DECODE_TOKENS + 1)

    def scale_odds(self, factor: float) -> None:
        """Scales the plan's odds, streamed : CPU, by `factor` at one token.

        The factor fades to 1 at `MEMORY_BOUND_TOKENS`.
        """
        for tokens in range(1, MEMORY_BOUND_TOKENS):
            faded = fading(factor, tokens, MEMORY_BOUND_TOKENS)
            self.shares[tokens] = scale_odds(self._planned[tokens - 1], faded)

    def streams(self, tokens: int) -> bool:
        """True if the GPU may read host blocks for a batch of `tokens` tokens."""
        return tokens >= self._streams_from

    def max_blocks(self, choices: int) -> int:
        """Upper bound on the GPU's blocks for this many (token, expert) pairs. At least 1."""
        return max(1, sum(self._num_blocks[:choices]))

    def max_groups(self, choices: int) -> int:
        """Upper bound on the called experts for this many (token, expert) pairs. At least 1."""
        return max(1, min(choices, self.num_experts))


@dataclass(frozen=True)
class DecodeInputs:
    """A job's inputs from the GPU, and the table that answers them, in page-locked host memory.

    Flags hold job numbers and only grow. The layer's `states` [tokens, hidden] and the router's
    `index` [tokens, k] int64 and `weights` [tokens, k] float32 are complete when each of
    `inputs_ready` [tokens] int64 is at least the job's number. `table` [table_size()] int64 has
    room for `max_blocks` blocks and `max_groups` called experts, and is complete when `table_ready`
    [1] int64 is the job's number.
    `timed_out` [1] int64 is set to the number of a job whose inputs did not arrive in time.
    """

    states: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    inputs_ready: torch.Tensor
    table: torch.Tensor
    table_ready: torch.Tensor
    timed_out: torch.Tensor
    max_blocks: int
    max_groups: int


def route_arguments(
    layer: DecodeLayer, inputs: DecodeInputs, traffic: np.ndarray
) -> ctypes.Structure:
    """RouteArguments of route.h, pointing to the given objects."""
    return _Route(
        ctypes.addressof(layer.places),
        ctypes.addressof(layer.shares),
        inputs.index.data_ptr(),
        inputs.weights.data_ptr(),
        inputs.inputs_ready.data_ptr(),
        inputs.table.data_ptr(),
        inputs.table_ready.data_ptr(),
        inputs.timed_out.data_ptr(),
        traffic.ctypes.data,
        layer.calls.ctypes.data,
        int(GPU_TIMEOUT_S * 1e9),
        layer.num_experts,
        inputs.index.shape[1],
        inputs.max_blocks,
        inputs.max_groups,
    )


class _Places(ctypes.Structure):
    _fields_ = [
        ("host", ctypes.c_void_p),
        ("resident", ctypes.c_int64),
        ("num_host", ctypes.c_int),
        ("num_resident", ctypes.c_int),
    ]


class _Route(ctypes.Structure):
    _fields_ = [
        ("experts", ctypes.c_void_p),
        ("shares", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("inputs_ready", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("table_ready", ctypes.c_void_p),
        ("timed_out", ctypes.c_void_p),
        ("traffic", ctypes.c_void_p),
        ("calls", ctypes.c_void_p),
        ("patience_ns", ctypes.c_int64),
        ("num_experts", ctypes.c_int),
        ("top_k", ctypes.c_int),
        ("max_blocks", ctypes.c_int),
        ("max_groups", ctypes.c_int),
    ]
