"""Checks the rows of blocks of all ranks, and finds a rank's part of each expert."""

from collections.abc import Sequence
from typing import NamedTuple

from fiddler_run.plan.rank import Rank, Rows


class Part(NamedTuple):
    """A rank's part of an expert: blocks from `first` on, in this order."""

    first: int
    resident: int
    host: int
    on_disk: int


def parts_of(
    ranks: Sequence[Rank], number: int, layer: int, num_experts: int, num_blocks: int
) -> list[Part]:
    """For each expert of a layer, the part of rank `number`.

    Args:
        num_blocks: blocks of an expert.
    """
    none = [0] * num_experts
    rows = [
        (
            rank.resident_blocks[layer],
            rank.host_blocks.get(layer),
            rank.disk_blocks.get(layer, none),
        )
        for rank in ranks
    ]
    if len(ranks) == 1:
        resident, _, on_disk = rows[0]
        counted = zip(resident, on_disk, strict=True)
        rows = [(resident, [num_blocks - here - there for here, there in counted], on_disk)]
    before = [
        sum(counts)
        for counts in zip(none, *(row for each in rows[:number] for row in each), strict=True)
    ]
    return [Part(*each) for each in zip(before, *rows[number], strict=True)]


def placement_problems(
    ranks: Sequence[Rank], num_layers: int, num_experts: int, num_blocks: int
) -> list[str]:
    """The reasons why the rows of blocks are not those of experts of `num_blocks` blocks each.

    Rows are added up only if each of them is right.
    """
    whole = [[num_blocks] * num_experts] * num_layers
    several = len(ranks) > 1
    problems = []
    for number, rank in enumerate(ranks):
        where = f"ranks[{number}]."
        problems += row_problems(f"{where}resident_blocks", rank.resident_blocks, whole)
        if several:
            problems += row_problems(f"{where}host_blocks", rank.host_blocks, whole)
        elif rank.host_blocks:
            problems.append(f"{where}host_blocks: only for several ranks; remove it")
    if problems:
        return problems
    if several:
        problems = [
            f"ranks[{number}].disk_blocks: only for a single rank; give them to a rank's memory"
            for number, rank in enumerate(ranks)
            if rank.disk_blocks
        ]
        return problems or sum_problems(ranks, num_layers, num_experts, num_blocks)
    if not ranks[0].disk_blocks:
        return []
    left = [
        [num_blocks - count for count in ranks[0].resident_blocks[layer]]
        for layer in range(num_layers)
    ]
    return row_problems("ranks[0].disk_blocks", ranks[0].disk_blocks, left, "that are not resident")


def sum_problems(
    ranks: Sequence[Rank], num_layers: int, num_experts: int, num_blocks: int
) -> list[str]:
    """The experts whose blocks do not add up to `num_blocks` over all ranks."""
    problems = []
    for layer in range(num_layers):
        rows = [
            row for rank in ranks for row in (rank.resident_blocks[layer], rank.host_blocks[layer])
        ]
        problems += [
            f"ranks: expert {expert} of layer {layer} has {total} blocks in all, not {num_blocks}"
            for expert, total in enumerate(map(sum, zip(*rows, strict=True)))
            if total != num_blocks
        ]
    return problems


def row_problems(
    name: str, rows: Rows, limits: list[list[int]], of: str = "of an expert"
) -> list[str]:
    """The reasons why `rows` do not hold a number within its limit for each layer and expert."""
    if sorted(rows) != list(range(len(limits))):
        return [f"{name}: needs exactly the layers 0 to {len(limits) - 1}"]
    problems = []
    for layer, row in rows.items():
        if len(row) != len(limits[layer]):
            problems.append(f"{name}[{layer}]: {len(row)} numbers for {len(limits[layer])} experts")
            continue
        problems += [
            f"{name}[{layer}][{expert}]: {count} is more than the {limit} blocks {of}"
            for expert, (count, limit) in enumerate(zip(row, limits[layer], strict=True))
            if count > limit
        ]
    return problems
