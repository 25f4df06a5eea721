"""A placement says where the blocks of every expert are kept, within memory limits."""

from dataclasses import dataclass

from fiddler_run.plan.schema import Plan

Rows = list[list[int]]  # number of blocks by layer and expert


@dataclass(frozen=True)
class MemoryLimits:
    """Bytes available for blocks. `host_bytes` None: unlimited."""

    block_bytes: int
    gpu_bytes: int
    host_bytes: int | None = None

    @property
    def gpu_blocks(self) -> int:
        return self.gpu_bytes // self.block_bytes


@dataclass(frozen=True)
class Placement:
    """Where the blocks of each expert are kept.

    The first `resident` blocks are in GPU memory, the last `on_disk` on disk, the others in host
    memory.
    """

    resident: Rows
    on_disk: Rows

    @classmethod
    def of(cls, resident: Rows) -> "Placement":
        """A placement with nothing on disk."""
        return cls(resident, [[0] * len(row) for row in resident])

    @property
    def num_resident(self) -> int:
        return sum(map(sum, self.resident))

    @property
    def num_on_disk(self) -> int:
        return sum(map(sum, self.on_disk))


def placement_of(plan: Plan) -> Placement:
    """The placement in a plan."""
    rank = plan.rank
    nothing = [0] * plan.model.num_experts
    layers = range(plan.model.num_layers)
    return Placement(
        resident=[rank.resident_blocks[layer] for layer in layers],
        on_disk=[rank.disk_blocks.get(layer, nothing) for layer in layers],
    )
