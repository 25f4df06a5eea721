"""MachineProfile: how fast a machine does each thing that the runtime does. It knows no prompts and no placement."""

from statistics import median
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from fiddler_opt.model import ModelSpec
from fiddler_run.plan import DTYPE_BYTES, FEW_TOKENS, Dtype, interpolate
from fiddler_run.yaml_file import (
    Bytes,
    BytesOrZero,
    Count,
    Microseconds,
    Rate,
    Ratio,
    Section,
    Width,
    YamlFile,
)

Times = dict[Count, Microseconds]  # by number of tokens
LEAST_US = 0.1  # what a file holds of a time; nothing takes none
MOST_US = 1e15  # what `Microseconds` can hold
Share = Annotated[float, Field(ge=0, le=1)]  # of an absent expert's blocks, sent over the link


class Cpu(Section):
    """`threads` and `pinned` are what served best; `threads_us` and `pinned_threads_us`: one expert, one token, by threads.

    `cores` counts what the system lets a process use, SMT siblings included; `physical_cores` does not.
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
    """`timed_bytes`: experts lay in that much of the host's memory when they were timed. `memlock_bytes` is null if unlimited."""

    available_bytes: Bytes
    timed_bytes: BytesOrZero
    memlock_bytes: BytesOrZero | None


class Device(Section):
    """`cuda` is a GPU; `host` is the CPU standing in for one, where there is none: the same memory and the same cores.

    `context_bytes` is what driver and libraries take of `memory_bytes` for one process that uses the GPU; `free_bytes` was
    free when the profile was made.
    """

    kind: Literal["cuda", "host"]
    name: str
    memory_bytes: BytesOrZero
    free_bytes: BytesOrZero
    context_bytes: BytesOrZero


class Link(Section):
    """Copies to (h2d) and from (d2h) the GPU; `pageable` memory is what nobody page-locked. null: the system does not tell.

    `round_trip_us`: one token's activations to the host and back.
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
    block_neurons: Width
    expert_bytes: Bytes
    dense_layer_bytes: Bytes
    head_bytes: Bytes

    def problems(self) -> list[str]:
        blocks = -(-self.intermediate_size // self.block_neurons)
        needed = 3 * blocks * self.block_neurons * self.hidden_size * DTYPE_BYTES[self.dtype]
        if self.expert_bytes == needed:
            return []
        return [f"shape.expert_bytes: {self.expert_bytes}, by the other sizes {needed}"]

    @classmethod
    def of(cls, model: ModelSpec) -> Self:
        return cls(
            hidden_size=model.shape.hidden_size,
            intermediate_size=model.shape.intermediate_size,
            dtype=model.shape.dtype,
            block_neurons=model.block_neurons,
            expert_bytes=model.expert_bytes,
            dense_layer_bytes=model.dense_layer_bytes,
            head_bytes=model.head_bytes,
        )


class Made(Section):
    command: str
    created: str
    software: str


class MachineProfile(YamlFile):
    kind: ClassVar[str] = "machine profile"

    version: Literal[2]
    source: Literal["measured", "data sheet"]
    cpu: Cpu
    memory: Memory
    device: Device
    link: Link | None
    disk_bytes_per_s: Rate | None
    shape: MeasuredShape
    absent_expert_us: dict[Count, dict[Share, Microseconds]]
    device_expert_us: Times
    dense_layer_us: Times
    dense_device_us: Times
    head_us: Times
    host_embedding_us: Times | None
    spread: dict[str, dict[Count, Ratio]]
    drift: dict[Count, Ratio] = {}
    provenance: Made

    header: ClassVar[str] = (
        "A machine's speed, as `fiddler-opt profile` writes it. Times are medians in microseconds, by number of tokens."
    )
    key_comments: ClassVar[dict[str, str]] = {
        "link": "null: there is no GPU",
        "disk_bytes_per_s": "reading the checkpoint; null: there was none to read",
        "absent_expert_us": "one expert in host memory, by the share sent over the link: the CPU computes the rest meanwhile",
        "device_expert_us": "one expert in GPU memory",
        "dense_layer_us": "one layer whose experts have no blocks, dispatch included, until the next one may begin",
        "dense_device_us": "what it adds to experts that keep the device busy: the rest is Python's, hidden behind them",
        "head_us": "once a step: embedding, output head, choice of the token",
        "host_embedding_us": "what a step takes longer with the embedding table in host memory; null: there is no GPU",
        "spread": "how far the middle half of the samples lies from each median, as a part of it",
        "drift": "of an expert in host memory, timed in several rounds: by how much the slowest round was slower than the fastest",
    }

    def problems(self) -> list[str]:
        timed = ["absent_expert_us", "device_expert_us", "dense_layer_us", "dense_device_us", "head_us"]
        if self.host_embedding_us is not None:
            timed.append("host_embedding_us")
        problems = [f"{key}: needs an entry for 1 token" for key in timed if 1 not in getattr(self, key)]
        problems += [
            f"absent_expert_us[{tokens}]: needs at least one share" for tokens, times in self.absent_expert_us.items() if not times
        ]
        if 0.0 not in self.absent_expert_us.get(1, {0.0: 1.0}):
            problems.append("absent_expert_us[1]: needs an entry for the share 0.0, the CPU alone")
        if (self.device.kind == "cuda") != (self.link is not None):
            needed = "be given" if self.link is None else "be null"
            problems.append(f"link: must {needed} for a device of kind {self.device.kind}")
        return problems

    @property
    def cpu_expert_us(self) -> Times:
        """One expert in host memory, by the CPU alone."""
        return {tokens: times[0.0] for tokens, times in self.absent_expert_us.items() if 0.0 in times}

    @property
    def link_expert_us(self) -> Times:
        """One expert in host memory, copied whole to the GPU; empty if that was not timed."""
        return {tokens: times[1.0] for tokens, times in self.absent_expert_us.items() if 1.0 in times}

    @property
    def best_absent_us(self) -> Times:
        """One expert in host memory, by CPU and link together at the best share."""
        return {tokens: min(times.values()) for tokens, times in self.absent_expert_us.items()}

    @property
    def stream_share(self) -> dict[int, Share]:
        """That share."""
        return {tokens: min(times, key=times.get) for tokens, times in self.absent_expert_us.items()}

    @property
    def streams(self) -> bool:
        """Whether experts in host memory were timed over the link: there is a GPU, and they could be page-locked."""
        return self.link is not None and any(share > 0 for times in self.absent_expert_us.values() for share in times)

    @property
    def typical_drift(self) -> float:
        """By how much the machine was slower in one minute than in another, with a few tokens; 0 if there was one round."""
        found = [part for tokens, part in self.drift.items() if tokens <= FEW_TOKENS]
        return median(found) if found else 0.0

    @property
    def h2d_bytes_per_s(self) -> float | None:
        return self.link and self.link.h2d_bytes_per_s


def seconds_at(times: Times, tokens: float) -> float:
    """Seconds for `tokens` tokens: linear between measured points, and past the last one in proportion to tokens."""
    beyond = max(1.0, tokens / max(times))
    return interpolate(times, tokens) * beyond * 1e-6
