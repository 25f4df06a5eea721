"""The table that tells a GPU which blocks to apply to which tokens.

A *group* is some choices of one expert and the blocks to apply to their tokens. In decode, a CPU
thread writes a table with one group for each called expert (route.h). In prefill, Python writes it:
a group has at most as many choices as a kernel computes at once, and each launch of the kernels
takes some consecutive groups.

A table is int64: number of blocks | address of each [max_blocks] | group of each [max_blocks] |
groups [max_groups, 4]: first and last block, first and last choice (each last one excluded) |
choices [tokens * k], sorted by expert. A choice is token * k + place.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


def table_size(max_blocks: int, max_groups: int, choices: int) -> int:
    """Elements of a table."""
    return 1 + 2 * max_blocks + 4 * max_groups + choices


@dataclass(frozen=True)
class Launch:
    """The blocks and groups of a table that one launch of the kernels takes."""

    first_block: int
    num_blocks: int
    first_group: int
    num_groups: int


@dataclass(frozen=True)
class BlockTable:
    """A table, int64, with `num_blocks` blocks and `num_groups` groups.

    `launches`: by step, the step's launches.
    """

    table: np.ndarray
    num_blocks: int
    num_groups: int
    launches: list[list[Launch]]


@dataclass(frozen=True)
class Parts:
    """Blocks for a GPU, in parts of consecutive blocks of one call.

    `step` [n] int64 ascends: parts of one step are computed together. `call` [n] int64 is the
    part's call, `address` [n] int64 and `count` [n] int64 say where its blocks are.
    """

    step: np.ndarray
    call: np.ndarray
    address: np.ndarray
    count: np.ndarray


def build_table(
    parts: Parts,
    num_steps: int,
    starts: np.ndarray,
    choices: np.ndarray,
    block_bytes: int,
    group_tokens: int,
    max_blocks: int,
) -> BlockTable:
    """Builds the table of a layer.

    Args:
        starts: call i has choices `starts[i]` to `starts[i + 1]`; int64.
        choices: [n] int64, sorted by expert.
        group_tokens: the most choices of a group.
        max_blocks: the most blocks of a launch, counted once for each group.
    """
    tokens = starts[1:] - starts[:-1]
    per_part = -(-tokens[parts.call] // group_tokens)
    part = np.repeat(np.arange(len(per_part)), per_part)  # of each group
    tile = _positions(per_part)
    call = parts.call[part]
    first_choice = starts[call] + tile * group_tokens
    last_choice = np.minimum(first_choice + group_tokens, starts[call + 1])
    counts = parts.count[part]
    last_block = counts.cumsum()
    groups = np.stack((last_block - counts, last_block, first_choice, last_choice), axis=1)
    group = np.repeat(np.arange(len(part)), counts)  # of each block
    addresses = np.repeat(parts.address[part], counts) + _positions(counts) * block_bytes
    steps = np.arange(num_steps)
    step = parts.step[part]
    bounds = zip(np.searchsorted(step, steps), np.searchsorted(step, steps, "right"), strict=True)
    edges = np.concatenate(([0], last_block))
    launches = [list(_launches(edges, *map(int, each), max_blocks)) for each in bounds]
    table = np.concatenate(([len(group)], addresses, group, groups.ravel(), choices))
    return BlockTable(table, len(group), len(part), launches)


def _positions(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... `counts[0]` - 1, 0, 1, ... `counts[1]` - 1, and so on."""
    ends = counts.cumsum()
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def _launches(edges: np.ndarray, start: int, stop: int, max_blocks: int) -> Iterator[Launch]:
    """Cuts the groups `start` to `stop` into launches. `edges`: the first block of each group."""
    while start < stop:
        fitting = int(np.searchsorted(edges, edges[start] + max_blocks, "right")) - 1
        end = min(stop, max(fitting, start + 1))
        yield Launch(int(edges[start]), int(edges[end] - edges[start]), start, end - start)
        start = end
