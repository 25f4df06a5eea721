"""A placement says where the blocks of every expert are kept, within memory limits."""

from dataclasses import dataclass
from typing import NamedTuple

from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan

Rows = list[list[int]]  # number of blocks by layer and expert


@dataclass(frozen=True)
class MemoryLimits:
    """Bytes available for blocks in the first rank, and in `others`.

    `host_bytes` None: unlimited.
    """

    block_bytes: int
    gpu_bytes: int
    host_bytes: int | None = None
    others: tuple["MemoryLimits", ...] = ()

    @property
    def ranks(self) -> tuple["MemoryLimits", ...]:
        """The limits of each rank. In the first, `others` are of no account."""
        return (self, *self.others)

    @property
    def gpu_blocks(self) -> int:
        return self.gpu_bytes // self.block_bytes


class LayerBlocks(NamedTuple):
    """A rank's blocks of each expert of a layer, by place."""

    resident: list[int]
    host: list[int]
    on_disk: list[int]


@dataclass(frozen=True)
class Share:
    """The blocks of each expert that a rank after the first keeps."""

    resident: Rows
    host: Rows


@dataclass(frozen=True)
class Placement:
    """Where the blocks of each expert are kept.

    The first rank has `resident` blocks in GPU memory, `on_disk` on disk, and in host memory all
    that nobody else has. `others`: the shares of the ranks after it.
    """

    resident: Rows
    on_disk: Rows
    others: tuple[Share, ...] = ()

    @classmethod
    def of(cls, resident: Rows, others: tuple[Share, ...] = ()) -> "Placement":
        """A placement with nothing on disk."""
        return cls(resident, [[0] * len(row) for row in resident], others)

    def layer(self, number: int, blocks_per_expert: int) -> list[LayerBlocks]:
        """The blocks of layer `number` in each rank."""
        resident = self.resident[number]
        on_disk = self.on_disk[number]
        others = [
            LayerBlocks(each.resident[number], each.host[number], [0] * len(resident))
            for each in self.others
        ]
        taken = [resident, on_disk, *(row for each in others for row in each[:2])]
        host = [blocks_per_expert - sum(counts) for counts in zip(*taken, strict=True)]
        return [LayerBlocks(resident, host, on_disk), *others]

    def host_rows(self, rank: int, blocks_per_expert: int) -> Rows:
        """The blocks in a rank's host memory."""
        layers = range(len(self.resident))
        return [self.layer(layer, blocks_per_expert)[rank].host for layer in layers]

    @property
    def resident_by_rank(self) -> list[Rows]:
        return [self.resident, *(each.resident for each in self.others)]

    @property
    def num_resident(self) -> int:
        """Blocks in the GPU memory of all ranks."""
        return sum(sum(map(sum, rows)) for rows in self.resident_by_rank)

    @property
    def num_on_disk(self) -> int:
        return sum(map(sum, self.on_disk))


def placement_of(plan: Plan) -> Placement:
    """The placement in a plan.

    Raises:
        FiddlerError: a rank after the first has blocks on disk.
    """
    nothing = [0] * plan.model.num_experts
    layers = range(plan.model.num_layers)
    for number, rank in enumerate(plan.ranks[1:], 1):
        if rank.num_disk_blocks:
            raise FiddlerError(
                f"ranks[{number}].disk_blocks: only the first rank's disk can be planned; give"
                " these blocks to other ranks"
            )
    return Placement(
        resident=[plan.rank.resident_blocks[layer] for layer in layers],
        on_disk=[plan.rank.disk_blocks.get(layer, nothing) for layer in layers],
        others=tuple(
            Share(
                resident=[rank.resident_blocks[layer] for layer in layers],
                host=[rank.host_blocks[layer] for layer in layers],
            )
            for rank in plan.ranks[1:]
        ),
    )
