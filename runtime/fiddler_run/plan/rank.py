"""The part of a plan for one rank: a process, its device, and its share of every expert."""

from typing import ClassVar, Literal

from fiddler_run.plan.split import interpolate
from fiddler_run.plan.yaml_file import BytesOrZero, Count, CountOrZero, Section

Rows = dict[CountOrZero, list[CountOrZero]]  # by layer, a number for each expert


class GpuMemory(Section):
    """Bytes of GPU memory by purpose.

    `reserve` is what the driver and libraries take outside the runtime's allocator.
    """

    total: BytesOrZero
    non_expert_weights: BytesOrZero
    kv_cache: BytesOrZero
    staging: BytesOrZero
    activations: BytesOrZero
    reserve: BytesOrZero
    experts: BytesOrZero

    @property
    def used(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        return {purpose: size for purpose, size in self.model_dump().items() if purpose != "total"}


class HostMemory(Section):
    """Bytes of host memory: experts, and the embedding table if it is kept there."""

    experts: BytesOrZero
    embedding: BytesOrZero


class Rank(Section):
    """One process with one GPU, or none, on one of the machines that run a plan.

    The ranks share every expert: the first has its first blocks, the next one those that follow. Of
    a rank's blocks of expert e in layer l, the first `resident_blocks[l][e]` are in GPU memory, the
    next `host_blocks[l][e]` in host memory, the last `disk_blocks[l][e]` on disk. `disk_blocks` may
    be empty. If there is one rank, `host_blocks` is empty: it holds all others. `stream_share` is
    the share of an expert's host blocks that is streamed, by the number of tokens that chose it.
    """

    optional: ClassVar[tuple[str, ...]] = ("machine", "host_blocks")

    machine: CountOrZero = 0
    device: Literal["cuda", "cpu"]
    gpu_memory_bytes: GpuMemory
    host_memory_bytes: HostMemory
    disk_bytes: BytesOrZero
    cpu_threads: Count
    cpu_pinned: bool
    stream_share: dict[Count, float]
    resident_blocks: Rows
    host_blocks: Rows = {}
    disk_blocks: Rows

    @property
    def num_resident_blocks(self) -> int:
        return sum(map(sum, self.resident_blocks.values()))

    @property
    def num_listed_host_blocks(self) -> int:
        return sum(map(sum, self.host_blocks.values()))

    @property
    def num_disk_blocks(self) -> int:
        return sum(map(sum, self.disk_blocks.values()))

    @property
    def expert_bytes(self) -> int:
        """Bytes of the experts in all three places."""
        experts = self.gpu_memory_bytes.experts + self.host_memory_bytes.experts
        return experts + self.disk_bytes

    @property
    def streams(self) -> bool:
        """True if the GPU may read host blocks over the link. Their memory is then page-locked."""
        return self.gpu_memory_bytes.staging > 0

    def stream_share_at(self, tokens: int) -> float:
        """The share of an expert's host blocks that is streamed when `tokens` tokens call it.

        Linear between entries, like the measured times in the planner.
        """
        return interpolate(self.stream_share, tokens)

    def share_problems(self) -> list[str]:
        """The problems of `stream_share`."""
        problems = [] if 1 in self.stream_share else ["stream_share: needs an entry for 1 token"]
        return problems + [
            f"stream_share[{tokens}]: {share} is not between 0 and 1"
            for tokens, share in self.stream_share.items()
            if not 0 <= share <= 1
        ]

    def memory_problems(self, block_bytes: int, num_host_blocks: int | None) -> list[str]:
        """The sums of bytes that do not match.

        Args:
            num_host_blocks: the blocks in host memory. None: the rows of blocks are wrong, and host
                blocks are not checked.
        """
        gpu = self.gpu_memory_bytes
        host = self.host_memory_bytes
        problems = []
        if num_host_blocks is not None:
            stated = [
                (
                    "gpu_memory_bytes.experts",
                    gpu.experts,
                    "resident_blocks",
                    self.num_resident_blocks,
                ),
                ("host_memory_bytes.experts", host.experts, "the host blocks", num_host_blocks),
                ("disk_bytes", self.disk_bytes, "disk_blocks", self.num_disk_blocks),
            ]
            problems = [
                f"{key}: {size}, but {what} hold {count * block_bytes} bytes"
                for key, size, what, count in stated
                if size != count * block_bytes
            ]
        if gpu.used > gpu.total:
            problems.append(
                f"gpu_memory_bytes.total: {gpu.total} is less than the sum of its parts, {gpu.used}"
            )
        if host.experts and any(self.stream_share.values()) and gpu.staging < block_bytes:
            problems.append(
                f"gpu_memory_bytes.staging: {gpu.staging} cannot hold one block of {block_bytes}"
                " bytes to stream"
            )
        return problems
