"""The plan: the file that the planner writes and the runtime executes. Rule: a plan that loads can be executed.

Every decision is a plain number. An expert's intermediate neurons are cut into blocks of `block_neurons`; for expert e of
layer l the first `resident_blocks[l][e]` lie in GPU memory, the rest (the absent ones) in host memory, of which each call
streams a share over the link and computes the remainder on the CPU.
"""

from bisect import bisect_right
from typing import ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from fiddler_run.yaml_file import Section, YamlFile

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
TOKEN_BLOCKS = 1024  # tokens times blocks that the runtime computes at once on the GPU: bounds the memory for their products
Dtype = Literal["bfloat16", "float16", "float32"]


class ModelShape(Section):
    """The part of a model that decides an expert's geometry; names are Hugging Face's."""

    name: str
    num_layers: PositiveInt
    num_experts: PositiveInt
    num_experts_per_tok: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    dtype: Dtype

    def blocks_per_expert(self, block_neurons: int) -> int:
        return -(-self.intermediate_size // block_neurons)

    def block_bytes(self, block_neurons: int) -> int:
        """Bytes of one block: gate rows, up rows and down columns of `block_neurons` neurons."""
        return 3 * block_neurons * self.hidden_size * DTYPE_BYTES[self.dtype]

    def expert_bytes(self, block_neurons: int) -> int:
        """Bytes of one expert as stored. The last block is padded with zeros where the block does not divide the expert."""
        return self.blocks_per_expert(block_neurons) * self.block_bytes(block_neurons)


class Workload(Section):
    """What the plan was made for: one sequence of `prompt_tokens` then `output_tokens`, searched with `num_beams`."""

    prompt_tokens: PositiveInt
    output_tokens: PositiveInt
    num_beams: PositiveInt
    max_seq_len: PositiveInt

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.prompt_tokens + self.output_tokens > self.max_seq_len:
            raise ValueError(
                f"workload.max_seq_len: {self.max_seq_len} is less than "
                f"{self.prompt_tokens} prompt + {self.output_tokens} output tokens"
            )
        return self


class GpuMemory(Section):
    """Bytes of GPU memory by purpose. `reserve` is what the driver and libraries take outside the runtime's allocator."""

    total: NonNegativeInt
    non_expert_weights: NonNegativeInt
    kv_cache: NonNegativeInt
    staging: NonNegativeInt
    activations: NonNegativeInt
    reserve: NonNegativeInt
    experts: NonNegativeInt

    @property
    def used(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        return {purpose: size for purpose, size in self.model_dump().items() if purpose != "total"}


class HostMemory(Section):
    experts: NonNegativeInt


class Rates(Section):
    """Expert bytes per second that the profiled machine handles for one token. `absent`: CPU and link together."""

    resident: PositiveFloat
    link: PositiveFloat | None
    cpu: PositiveFloat
    absent: PositiveFloat


class Predicted(Section):
    """What the planner expects of this plan on the profiled machine. `gap` is relative: (found - bound) / found, in seconds."""

    decode_tokens_per_s: PositiveFloat
    ttft_s: PositiveFloat
    gpu_hit_rate: float = Field(ge=0, le=1)
    bound_tokens_per_s: PositiveFloat
    gap: NonNegativeFloat


class Provenance(Section):
    """How the file was made. `routing` is a file, or "uniform (assumed)"."""

    command: str
    machine: str
    machine_sha256: str
    machine_source: str
    routing: str
    solver: str
    status: str
    solve_s: NonNegativeFloat
    created: str


class Plan(YamlFile):
    version: Literal[2]
    model: ModelShape
    workload: Workload
    gpu_memory_bytes: GpuMemory
    host_memory_bytes: HostMemory
    device: Literal["cuda", "host"]
    cpu_threads: PositiveInt
    cpu_pinned: bool
    prefill_chunk_tokens: PositiveInt
    block_neurons: PositiveInt
    stream_share: dict[PositiveInt, float]
    resident_blocks: dict[NonNegativeInt, list[NonNegativeInt]]
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
        "resident_blocks": "per layer, for each expert: how many of its blocks are in GPU memory",
    }

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_shares(self.stream_share)
        self._check_placement()
        self._check_memory()
        return self

    def _check_placement(self) -> None:
        model, blocks = self.model, self.blocks_per_expert
        if sorted(self.resident_blocks) != list(range(model.num_layers)):
            raise ValueError(f"resident_blocks: needs exactly the layers 0 to {model.num_layers - 1}")
        for layer, row in self.resident_blocks.items():
            if len(row) != model.num_experts:
                raise ValueError(f"resident_blocks[{layer}]: {len(row)} numbers for {model.num_experts} experts")
            for expert, count in enumerate(row):
                if count > blocks:
                    raise ValueError(f"resident_blocks[{layer}][{expert}]: {count} is more than the {blocks} blocks of an expert")

    def _check_memory(self) -> None:
        gpu = self.gpu_memory_bytes
        placed = self.num_resident_blocks * self.block_bytes
        absent = self.num_absent_blocks * self.block_bytes
        if placed != gpu.experts:
            raise ValueError(f"gpu_memory_bytes.experts: {gpu.experts}, but resident_blocks hold {placed} bytes")
        if absent != self.host_memory_bytes.experts:
            raise ValueError(
                f"host_memory_bytes.experts: {self.host_memory_bytes.experts}, but the absent blocks hold {absent} bytes"
            )
        if gpu.used > gpu.total:
            raise ValueError(f"gpu_memory_bytes.total: {gpu.total} is less than the sum of its parts, {gpu.used}")
        if absent and any(self.stream_share.values()) and gpu.staging < self.block_bytes:
            raise ValueError(f"gpu_memory_bytes.staging: {gpu.staging} cannot hold one block of {self.block_bytes} bytes to stream")

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
    def num_absent_blocks(self) -> int:
        return self.model.num_layers * self.model.num_experts * self.blocks_per_expert - self.num_resident_blocks

    def stream_share_at(self, tokens: int) -> float:
        """Share of an expert's absent blocks that is streamed when `tokens` tokens call it; the CPU computes the others.

        It is linear between the plan's entries, as the measured times are in the planner, and constant outside them.
        """
        return interpolate(self.stream_share, tokens)


def check_shares(stream_share: dict[int, float]) -> None:
    """Raises ValueError, naming the entry, unless there is a share for 1 token and all are between 0 and 1."""
    if 1 not in stream_share:
        raise ValueError("stream_share: needs an entry for 1 token")
    for tokens, share in stream_share.items():
        if not 0 <= share <= 1:
            raise ValueError(f"stream_share[{tokens}]: {share} is not between 0 and 1")


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
