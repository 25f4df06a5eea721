"""The plan: the file that the planner writes and the runtime executes. Rule: a plan that loads can be executed.

Every decision is a plain number. An expert's intermediate neurons are cut into blocks of `block_neurons`; for expert e of
layer l the first `resident_blocks[l][e]` lie in GPU memory, the last `disk_blocks[l][e]` on disk, those between (the absent ones)
in host memory, of which each call streams a share over the link and computes the remainder, and those on disk, on the CPU.
On a GPU, balance.py begins with that share and finds each layer's own for few tokens, and one for all with long prompts.
"""

from bisect import bisect_right
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fiddler_run.yaml_file import (
    BytesOrZero,
    Count,
    CountOrZero,
    ExpertCount,
    LayerCount,
    Milliseconds,
    Rate,
    Ratio,
    Seconds,
    SecondsOrZero,
    Section,
    Width,
    YamlFile,
)

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
TOKEN_BLOCKS = 2048  # tokens times blocks that the runtime computes at once on the GPU: bounds the memory for their products
MOST_ROUTED_TOKENS = 256  # of a layer, that the GPU sends to the CPU's threads and computes in place
FEW_TOKENS = 16  # of an expert, as decode meets them: with more it is not memory alone that sets the CPU's pace
Dtype = Literal["bfloat16", "float16", "float32"]


class ModelShape(Section):
    """The part of a model that decides an expert's geometry; names are Hugging Face's."""

    name: str
    num_layers: LayerCount
    num_experts: ExpertCount
    num_experts_per_tok: ExpertCount
    hidden_size: Width
    intermediate_size: Width
    dtype: Dtype

    def problems(self) -> list[str]:
        if self.num_experts_per_tok <= self.num_experts:
            return []
        return [f"model.num_experts_per_tok: {self.num_experts_per_tok} is more than the {self.num_experts} experts"]

    def blocks_per_expert(self, block_neurons: int) -> int:
        return -(-self.intermediate_size // block_neurons)

    def block_bytes(self, block_neurons: int) -> int:
        """Bytes of one block: gate rows, up rows and down columns of `block_neurons` neurons."""
        return 3 * block_neurons * self.hidden_size * DTYPE_BYTES[self.dtype]

    def expert_bytes(self, block_neurons: int) -> int:
        """Bytes of one expert as stored. The last block is padded with zeros where the block does not divide the expert."""
        return self.blocks_per_expert(block_neurons) * self.block_bytes(block_neurons)


class Workload(Section):
    """What the plan was made for: `batch_size` sequences at once, each of `prompt_tokens` then `output_tokens`, searched with
    `num_beams`."""

    prompt_tokens: Count
    output_tokens: Count
    num_beams: Count
    batch_size: Count
    max_seq_len: Count

    @property
    def sequences(self) -> int:
        """That pass the model at once."""
        return self.num_beams * self.batch_size

    def problems(self) -> list[str]:
        if self.prompt_tokens + self.output_tokens <= self.max_seq_len:
            return []
        return [
            f"workload.max_seq_len: {self.max_seq_len} is less than "
            f"{self.prompt_tokens} prompt + {self.output_tokens} output tokens"
        ]


class GpuMemory(Section):
    """Bytes of GPU memory by purpose. `reserve` is what the driver and libraries take outside the runtime's allocator."""

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
    """Bytes of host memory: absent experts, and the embedding table if it lies there."""

    experts: BytesOrZero
    embedding: BytesOrZero


class Rates(Section):
    """Expert bytes per second that the profiled machine handles for one token. `absent`: CPU and link together."""

    resident: Rate
    link: Rate | None
    cpu: Rate
    absent: Rate


class Alternative(Section):
    decode_tokens_per_s: Rate
    ttft_s: Seconds


class Predicted(Section):
    """What the planner expects of this plan on the profiled machine. `gap` is relative: (found - bound) / found, in seconds.

    `decode_ms`, `ttft_ms`: milliseconds of a decode step, and until the first token, by what they are spent on. `binding`: what
    more of would be used; `next_gb_tokens_per_s`: what another GB of GPU memory would add. `regret`: by set of prompts, how
    much longer the workload takes there than with a plan for that set, as a part. `alternatives`: what rules of thumb give.
    """

    decode_tokens_per_s: Rate
    ttft_s: Seconds
    gpu_hit_rate: float = Field(ge=0, le=1)
    bound_tokens_per_s: Rate
    gap: Ratio
    decode_ms: dict[str, Milliseconds]
    ttft_ms: dict[str, Milliseconds]
    binding: Literal["GPU memory", "GPU and host memory", "host memory", "nothing"]
    next_gb_tokens_per_s: Annotated[float, Field(ge=0, le=1e18)]
    regret: dict[str, Ratio]
    alternatives: dict[str, Alternative]


class Provenance(Section):
    """How the file was made. `routing` is a file, or "uniform (assumed)"."""

    command: str
    machine: str
    machine_sha256: str
    machine_source: str
    routing: str
    solver: str
    status: str
    solve_s: SecondsOrZero
    created: str


class Plan(YamlFile):
    kind: ClassVar[str] = "plan"

    version: Literal[2]
    model: ModelShape
    workload: Workload
    gpu_memory_bytes: GpuMemory
    host_memory_bytes: HostMemory
    disk_bytes: BytesOrZero
    device: Literal["cuda", "host"]
    cpu_threads: Count
    cpu_pinned: bool
    prefill_chunk_tokens: Count
    block_neurons: Width
    stream_share: dict[Count, float]
    resident_blocks: dict[CountOrZero, list[CountOrZero]]
    disk_blocks: dict[CountOrZero, list[CountOrZero]]
    predicted: Predicted
    bytes_per_s: Rates
    provenance: Provenance

    header: ClassVar[str] = 'Written by `fiddler-opt plan`; run it with `fiddler-run --plan <this file> "prompt"`.'
    key_comments: ClassVar[dict[str, str]] = {
        "device": "where the GPU part lies: in GPU memory, or, planned for a machine without CUDA, in host memory",
        "cpu_pinned": "whether each of the CPU's threads stays on a core of its own",
        "block_neurons": "an expert is cut into blocks of this many neurons",
        "stream_share": "by tokens of an expert, linear in between: share of its absent blocks sent over the link",
        "bytes_per_s": "expert bytes that the profiled machine handles for one token; absent: by CPU and link together",
        "disk_blocks": "the same for blocks on disk, the last ones of an expert; empty: there are none",
        "resident_blocks": "per layer, for each expert: how many of its blocks are in GPU memory",
    }

    def problems(self) -> list[str]:
        misplaced = self._placement_problems()
        return [*share_problems(self.stream_share), *misplaced, *self._memory_problems(counted=not misplaced)]

    def _placement_problems(self) -> list[str]:
        """Blocks on disk are looked at where those in GPU memory are right, which decide how many are left."""
        model, blocks = self.model, self.blocks_per_expert
        problems = row_problems("resident_blocks", self.resident_blocks, [[blocks] * model.num_experts] * model.num_layers)
        if problems or not self.disk_blocks:
            return problems
        left = [[blocks - count for count in self.resident_blocks[layer]] for layer in range(model.num_layers)]
        return row_problems("disk_blocks", self.disk_blocks, left, "that are not resident")

    def _memory_problems(self, counted: bool) -> list[str]:
        """`counted`: whether the blocks are such that they can be counted."""
        gpu, host = self.gpu_memory_bytes, self.host_memory_bytes
        stated = [
            ("gpu_memory_bytes.experts", gpu.experts, "resident_blocks", self.num_resident_blocks),
            ("host_memory_bytes.experts", host.experts, "the absent blocks", self.num_absent_blocks),
            ("disk_bytes", self.disk_bytes, "disk_blocks", self.num_disk_blocks),
        ]
        problems = [
            f"{key}: {size}, but {what} hold {count * self.block_bytes} bytes"
            for key, size, what, count in stated
            if counted and size != count * self.block_bytes
        ]
        if gpu.used > gpu.total:
            problems.append(f"gpu_memory_bytes.total: {gpu.total} is less than the sum of its parts, {gpu.used}")
        if host.experts and any(self.stream_share.values()) and gpu.staging < self.block_bytes:
            problems.append(f"gpu_memory_bytes.staging: {gpu.staging} cannot hold one block of {self.block_bytes} bytes to stream")
        return problems

    @property
    def blocks_per_expert(self) -> int:
        return self.model.blocks_per_expert(self.block_neurons)

    @property
    def block_bytes(self) -> int:
        return self.model.block_bytes(self.block_neurons)

    @property
    def num_resident_blocks(self) -> int:
        return sum(sum(row) for row in self.resident_blocks.values())

    @property
    def num_disk_blocks(self) -> int:
        return sum(sum(row) for row in self.disk_blocks.values())

    @property
    def streams(self) -> bool:
        """Whether blocks may be copied to the GPU, for which host memory must be page-locked."""
        return self.gpu_memory_bytes.staging > 0

    @property
    def num_absent_blocks(self) -> int:
        """Blocks in host memory."""
        everything = self.model.num_layers * self.model.num_experts * self.blocks_per_expert
        return everything - self.num_resident_blocks - self.num_disk_blocks

    def stream_share_at(self, tokens: int) -> float:
        """Share of an expert's absent blocks that is streamed when `tokens` tokens call it; the CPU computes the others.

        It is linear between the plan's entries, as the measured times are in the planner, and constant outside them.
        """
        return interpolate(self.stream_share, tokens)


def row_problems(name: str, rows: dict[int, list[int]], most: list[list[int]], of: str = "of an expert") -> list[str]:
    """Whether there are rows for all layers, with a number for each expert, of at most so many blocks as `most` says."""
    if sorted(rows) != list(range(len(most))):
        return [f"{name}: needs exactly the layers 0 to {len(most) - 1}"]
    problems = []
    for layer, row in rows.items():
        if len(row) != len(most[layer]):
            problems.append(f"{name}[{layer}]: {len(row)} numbers for {len(most[layer])} experts")
            continue
        problems += [
            f"{name}[{layer}][{expert}]: {count} is more than the {limit} blocks {of}"
            for expert, (count, limit) in enumerate(zip(row, most[layer], strict=True))
            if count > limit
        ]
    return problems


def share_problems(stream_share: dict[int, float]) -> list[str]:
    """Whether there is a share for 1 token, and all are between 0 and 1."""
    problems = [] if 1 in stream_share else ["stream_share: needs an entry for 1 token"]
    return problems + [
        f"stream_share[{tokens}]: {share} is not between 0 and 1" for tokens, share in stream_share.items() if not 0 <= share <= 1
    ]


def interpolate(values: dict[int, float], tokens: float) -> float:
    """The value at `tokens`: linear between the entries of `values`, that of the nearest entry outside them."""
    points = sorted(values)
    if tokens <= points[0]:
        return values[points[0]]
    if tokens >= points[-1]:
        return values[points[-1]]
    right = bisect_right(points, tokens)
    low, high = points[right - 1], points[right]
    part = (tokens - low) / (high - low)
    return values[low] * (1 - part) + values[high] * part
