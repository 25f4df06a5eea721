"""The sections of a machine profile."""

from typing import Literal, Self

from fiddler_opt.inputs.model import ModelSpec
from fiddler_run.encodings.table import ENCODINGS
from fiddler_run.plan.shape import Dtype
from fiddler_run.plan.yaml_file import Bytes, BytesOrZero, Count, Microseconds, Rate, Section, Width

Times = dict[Count, Microseconds]  # by number of tokens


class Cpu(Section):
    """The CPU, and the setting that was the fastest.

    `threads_us` and `pinned_threads_us`: one expert, one token, by threads.

    `cores` counts the CPUs that a process may use, SMT siblings included; `physical_cores` leaves
    the siblings out.
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
    """`timed_bytes`: the memory in which experts were timed. `memlock_bytes`: null if unlimited."""

    available_bytes: Bytes
    timed_bytes: BytesOrZero
    memlock_bytes: BytesOrZero | None


class Device(Section):
    """`cuda` is a GPU; `cpu` is the CPU in place of one: the same memory and the same cores.

    `context_bytes`: the part of `memory_bytes` that driver and libraries take for a process that
    uses the GPU. `free_bytes` was free when the profile was made.
    """

    kind: Literal["cuda", "cpu"]
    name: str
    memory_bytes: BytesOrZero
    free_bytes: BytesOrZero
    context_bytes: BytesOrZero


class Link(Section):
    """Copies to (h2d) and from (d2h) the GPU; `pageable`: from memory that is not page-locked.

    null: unknown. `round_trip_us`: one token's activations to the host and back.
    """

    generation: Count | None
    width: Count | None
    h2d_bytes_per_s: Rate
    h2d_pageable_bytes_per_s: Rate | None
    d2h_bytes_per_s: Rate | None
    round_trip_us: Microseconds | None


class MeasuredShape(Section):
    """The weights whose handling was timed. For other sizes, times are taken to grow with bytes."""

    hidden_size: Width
    intermediate_size: Width
    dtype: Dtype
    encoding: str
    block_neurons: Width
    expert_bytes: Bytes
    dense_layer_bytes: Bytes
    head_bytes: Bytes

    def problems(self) -> list[str]:
        encoding = ENCODINGS.get(self.encoding)
        if encoding is None:
            return [f"shape.encoding: {self.encoding} is not one of {', '.join(ENCODINGS)}"]
        blocks = encoding(self.hidden_size, self.block_neurons)
        needed = blocks.expert_bytes(self.intermediate_size)
        if self.expert_bytes == needed:
            return []
        return [f"shape.expert_bytes: {self.expert_bytes}, by the other sizes {needed}"]

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
        )


class KernelLimits(Section):
    """Limits of the kernels that were timed.

    `decode_tokens`: most tokens of a layer that take the decode path. `token_blocks`: most tokens
    times blocks of one product on the GPU. `memory_bound_tokens`: of an expert, up to which the
    CPU's speed is the memory's.
    """

    decode_tokens: Count
    token_blocks: Count
    memory_bound_tokens: Count


class ProfileProvenance(Section):
    """How the profile was made."""

    command: str
    created: str
    software: str
