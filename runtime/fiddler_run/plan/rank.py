"""The part of a plan for one rank: a process and its device. Today there is exactly one."""

from typing import Literal

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
    """One process with one GPU, or none.

    For expert e of layer l, the first `resident_blocks[l][e]` blocks are in GPU memory, the last
    `disk_blocks[l][e]` on disk, and those between in host memory. `disk_blocks` may be empty.
    `stream_share` is the share of an expert's host blocks that is streamed, by the number of tokens
    that chose it.
    """

    device: Literal["cuda", "cpu"]
    gpu_memory_bytes: GpuMemory
    host_memory_bytes: HostMemory
    disk_bytes: BytesOrZero
    cpu_threads: Count
    cpu_pinned: bool
    stream_share: dict[Count, float]
    resident_blocks: Rows
    disk_blocks: Rows

    @property
    def num_resident_blocks(self) -> int:
        return sum(map(sum, self.resident_blocks.values()))

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

    def placement_problems(self, num_layers: int, num_experts: int, num_blocks: int) -> list[str]:
        """The problems of the rows of blocks, for experts of `num_blocks` blocks each.

        Blocks on disk are only compared if the rows of resident blocks are right.
        """
        whole = [[num_blocks] * num_experts] * num_layers
        problems = row_problems("resident_blocks", self.resident_blocks, whole)
        if problems or not self.disk_blocks:
            return problems
        left = [
            [num_blocks - count for count in self.resident_blocks[layer]]
            for layer in range(num_layers)
        ]
        return row_problems("disk_blocks", self.disk_blocks, left, "that are not resident")

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
