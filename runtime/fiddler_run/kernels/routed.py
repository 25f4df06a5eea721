"""What a job needs whose tokens and experts a GPU names, as route.h takes it."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import torch

from fiddler_run.plan import MOST_ROUTED_TOKENS

PATIENCE_S = 30.0  # with a GPU that does not send what a job needs


class RoutedLayer:
    """A layer's experts, as `submit_routed` needs to know them."""

    def __init__(self, resident: Sequence[torch.Tensor], absent: Sequence[torch.Tensor], stream_share: Callable[[int], float]):
        """
        Args:
            resident, absent: for each expert, its blocks [count, block_elements] on the GPU, and in host memory.
            stream_share: tokens of a call -> the share of its expert's absent blocks that the GPU reads.
        """
        self._blocks = resident, absent  # in use as long as this is
        experts = [(off.data_ptr(), on.data_ptr(), len(off), len(on)) for on, off in zip(resident, absent, strict=True)]
        self.num_experts, self.places = len(experts), (_Places * len(experts))(*experts)
        self.shares = (ctypes.c_double * (MOST_ROUTED_TOKENS + 1))(0.0, *map(stream_share, range(1, MOST_ROUTED_TOKENS + 1)))
        self._num_blocks = sorted((off + on for *_, off, on in experts), reverse=True)
        by_tokens = enumerate(self.shares) if any(map(len, absent)) else ()
        self._streams_from = next((tokens for tokens, share in by_tokens if share > 0), MOST_ROUTED_TOKENS + 1)

    def favour_link(self, factor: float, few_tokens: int) -> None:
        """The link gets `factor` times as many blocks for each of the CPU's for one token, for `few_tokens` as many as before, and
        for a number of tokens in between something in between."""
        for tokens in range(1, few_tokens):
            self.shares[tokens] = favoured(self.shares[tokens], factor ** (1 - log(tokens, few_tokens)))

    def streams(self, tokens: int) -> bool:
        """Whether so many tokens could have the GPU read blocks in host memory."""
        return tokens >= self._streams_from

    def most_blocks(self, choices: int) -> int:
        """That the GPU could have to compute for so many choices of experts; at least 1."""
        return max(1, sum(self._num_blocks[:choices]))


@dataclass(frozen=True)
class RoutedInput:
    """What a GPU sends a job, and what it is told, in page-locked host memory; flags hold numbers of jobs, and only grow.

    `states` [tokens, hidden], `index` [tokens, k] int64 and `weights` [tokens, k] float32 of the router have come when each of
    `arrived` [tokens] int64 is the job's number or more. `table` [table_size()] int64 has room for `max_blocks`
    blocks and is complete when `described` [1] int64 is the job's number. `timed_out` [1] int64 becomes the number of a job whose
    tokens have not come in time.
    """

    states: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    arrived: torch.Tensor
    table: torch.Tensor
    described: torch.Tensor
    timed_out: torch.Tensor
    max_blocks: int


def favoured(share: float, factor: float) -> float:
    """The link's share, if for each of the CPU's blocks it had `factor` times as many as with `share`."""
    return share * factor / (share * factor + 1 - share) if factor != 1 else share  # exactly


def table_size(max_blocks: int, num_experts: int, choices: int) -> int:
    """Of the table that tells a GPU its part of a layer: number of blocks | address of each | expert of each | first block of each
    expert, and the number of blocks | first choice of each expert, and the number of choices | choices [tokens * k], by expert."""
    return 1 + 2 * max_blocks + 2 * (num_experts + 1) + choices


def route_of(layer: RoutedLayer, given: RoutedInput, traffic: np.ndarray) -> ctypes.Structure:
    """route.h's RouteArguments; it points to all of these."""
    tensors = given.index, given.weights, given.arrived, given.table, given.described, given.timed_out
    return _Route(
        ctypes.addressof(layer.places),
        ctypes.addressof(layer.shares),
        *(tensor.data_ptr() for tensor in tensors),
        traffic.ctypes.data,
        int(PATIENCE_S * 1e9),
        layer.num_experts,
        given.index.shape[1],
        given.max_blocks,
    )


class _Places(ctypes.Structure):
    _fields_ = [
        ("absent", ctypes.c_void_p),
        ("resident", ctypes.c_int64),
        ("num_absent", ctypes.c_int),
        ("num_resident", ctypes.c_int),
    ]


class _Route(ctypes.Structure):
    _fields_ = [
        ("experts", ctypes.c_void_p),
        ("shares", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("described", ctypes.c_void_p),
        ("timed_out", ctypes.c_void_p),
        ("traffic", ctypes.c_void_p),
        ("patience_ns", ctypes.c_int64),
        ("num_experts", ctypes.c_int),
        ("top_k", ctypes.c_int),
        ("max_blocks", ctypes.c_int),
    ]
