"""The sections of a machine profile."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from fiddler_opt.inputs.model import ModelSpec
from fiddler_run.encodings.table import ENCODINGS, encodings_of
from fiddler_run.kernels.limits import (
    MAX_DECODE_TOKENS,
    MAX_DECODED_BLOCKS,
    MAX_TOKEN_BLOCKS,
    MEMORY_BOUND_TOKENS,
)
from fiddler_run.plan.shape import Dtype
from fiddler_run.plan.yaml_file import (
    Bytes,
    BytesOrZero,
    Count,
    CountOrZero,
    Microseconds,
    Rate,
    Ratio,
    Section,
    Width,
)

Times = dict[Count, Microseconds]  # by number of tokens
# share of an expert's host blocks that is streamed over the link
Share = Annotated[float, Field(ge=0, le=1)]
HostTimes = dict[Count, dict[Share, Microseconds]]


class Cpu(Section):
    """The CPU and its fastest settings.

    `threads_us` and `pinned_threads_us` hold the time of one expert and one token, by number of
    threads. `cores` counts the CPUs that a process may use, including SMT siblings;
    `physical_cores` excludes the siblings.
    """

    name: str
    cores: Count
    physical_cores: Count
    kernel: str
    threads: Count
    pinned: bool
    threads_us: Times
    pinned_threads_us: Times


class Memory(Section):
    """Host memory. Experts were timed in `timed_bytes`. `memlock_bytes` null: unlimited."""

    available_bytes: Bytes
    timed_bytes: BytesOrZero
    memlock_bytes: BytesOrZero | None


class Device(Section):
    """The device. `cuda` is a GPU; `cpu` means that the CPU takes the GPU's part.

    `context_bytes` is the part of `memory_bytes` that the driver and libraries take in a process
    that uses the GPU. `free_bytes` was free when the profile was made.
    """

    kind: Literal["cuda", "cpu"]
    name: str
    memory_bytes: BytesOrZero
    free_bytes: BytesOrZero
    context_bytes: BytesOrZero


class Link(Section):
    """Rates of copies to (h2d) and from (d2h) the GPU. null: unknown.

    `pageable` rates are for memory that is not page-locked. `round_trip_us` is the time to send one
    token's activations to the host and back.
    """

    generation: Count | None
    width: Count | None
    h2d_bytes_per_s: Rate
    h2d_pageable_bytes_per_s: Rate | None
    d2h_bytes_per_s: Rate | None
    round_trip_us: Microseconds | None


class MeasuredShape(Section):
    """The sizes of the experts that were timed. For other sizes, times scale with bytes.

    `gated`: they have a gate.
    """

    optional: ClassVar[tuple[str, ...]] = ("gated",)

    hidden_size: Width
    intermediate_size: Width
    dtype: Dtype
    encoding: str
    block_neurons: Width
    expert_bytes: Bytes
    dense_layer_bytes: Bytes
    head_bytes: Bytes
    gated: bool = True

    def problems(self) -> list[str]:
        return self._size_problems("shape", self.encoding, self)

    def encoding_problems(self, key: str, name: str, experts: "EncodedExperts") -> list[str]:
        """What is wrong with the sizes of the same experts in another encoding."""
        if name == self.encoding:
            return [f"{key}: the profile's own tables are in {name}"]
        return self._size_problems(key, name, experts)

    def _size_problems(
        self, key: str, name: str, sizes: "MeasuredShape | EncodedExperts"
    ) -> list[str]:
        known = encodings_of(self.dtype, self.hidden_size)
        if name not in known:
            return [f"{key}: {name} is not one of {', '.join(known)}"]
        problem = ENCODINGS[name].size_problem(sizes.block_neurons)
        if problem is not None:
            return [f"{key}.block_neurons: {problem}"]
        encoding = ENCODINGS[name](self.hidden_size, sizes.block_neurons, self.gated)
        needed = encoding.expert_bytes(self.intermediate_size)
        if sizes.expert_bytes == needed:
            return []
        return [f"{key}.expert_bytes: {sizes.expert_bytes}, by the other sizes {needed}"]

    @classmethod
    def of(cls, model: ModelSpec) -> Self:
        return cls(
            hidden_size=model.shape.hidden_size,
            intermediate_size=model.shape.intermediate_size,
            dtype=model.shape.dtype,
            encoding=model.encoding,
            block_neurons=model.block_neurons,
            expert_bytes=model.expert_bytes,
            dense_layer_bytes=model.dense_layer_bytes,
            head_bytes=model.head_bytes,
            gated=model.shape.activation.gated,
        )


class EncodedExperts(Section):
    """The times of experts in another encoding, as in the machine profile's own keys."""

    block_neurons: Width
    expert_bytes: Bytes
    host_expert_us: HostTimes
    resident_expert_us: Times
    drift: dict[Count, Ratio] = {}


class RankProfile(Section):
    """The tables of a further rank, as in the machine profile's own keys.

    `machine`: the number of its machine. 0 is that of the first rank.
    """

    machine: CountOrZero
    cpu: Cpu
    memory: Memory
    device: Device
    link: Link | None
    host_expert_us: HostTimes
    resident_expert_us: Times
    drift: dict[Count, Ratio] = {}
    encodings: dict[str, EncodedExperts] = {}


class Network(Section):
    """How fast ranks exchange hidden states and sums.

    `round_trip_us`: from the first rank to all others and back, for one token in one layer: hidden
    state and choices there, float32 sums back. `bytes_per_s`: rate of large batches.
    """

    round_trip_us: Microseconds
    bytes_per_s: Rate


class KernelLimits(Section):
    """The limits of the timed kernels.

    `decode_tokens`: the most tokens of a layer that take the decode path. `token_blocks`: the most
    tokens times blocks in one product on the GPU. `decoded_blocks`: the most blocks decoded for one
    product. `memory_bound_tokens`: the most tokens of an expert for which memory bandwidth limits
    the CPU kernel.
    """

    decode_tokens: Count
    token_blocks: Count
    decoded_blocks: Count
    memory_bound_tokens: Count

    @classmethod
    def of_runtime(cls) -> Self:
        """The limits of the runtime's kernels."""
        return cls(
            decode_tokens=MAX_DECODE_TOKENS,
            token_blocks=MAX_TOKEN_BLOCKS,
            decoded_blocks=MAX_DECODED_BLOCKS,
            memory_bound_tokens=MEMORY_BOUND_TOKENS,
        )


class ProfileProvenance(Section):
    """How the profile was made."""

    command: str
    created: str
    software: str
