"""MachineProfile: the measured speed of each part of the runtime's work on one machine.

A machine profile does not depend on prompts or on a placement. With several ranks, its own tables
are those of the first.
"""

from statistics import median
from typing import ClassVar, Literal, Self

import numpy as np

from fiddler_opt.inputs.machine_parts import (
    Cpu,
    Device,
    EncodedExperts,
    HostTimes,
    KernelLimits,
    Link,
    MeasuredShape,
    Memory,
    Network,
    ProfileProvenance,
    RankProfile,
    Share,
    Times,
)
from fiddler_opt.inputs.machine_rules import ranks_problems, table_problems
from fiddler_opt.inputs.model import ModelSpec
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.yaml_file import Count, Rate, Ratio, YamlFile

MIN_US = 0.1  # resolution of the times in a file; nothing takes zero time
MAX_US = 1e15  # largest value of `Microseconds`


RANK_TABLES = [key for key in RankProfile.model_fields if key != "machine"]


class MachineProfile(YamlFile):
    optional: ClassVar[tuple[str, ...]] = ("other_ranks", "network")
    kind: ClassVar[str] = "machine profile"
    made_by: ClassVar[str] = "fiddler-opt profile --only machine"

    version: Literal[5]
    source: Literal["measured", "data sheet"]
    cpu: Cpu
    memory: Memory
    device: Device
    link: Link | None
    disk_bytes_per_s: Rate | None
    shape: MeasuredShape
    kernels: KernelLimits
    host_expert_us: HostTimes
    resident_expert_us: Times
    dense_layer_us: Times
    dense_device_us: Times
    head_us: Times
    drift: dict[Count, Ratio] = {}
    encodings: dict[str, EncodedExperts] = {}
    other_ranks: list[RankProfile] = []
    network: Network | None = None
    provenance: ProfileProvenance

    header: ClassVar[str] = (
        "The speed of a machine. Times are medians in microseconds, by number of tokens."
    )
    key_comments: ClassVar[dict[str, str]] = {
        "link": "null: there is no GPU",
        "disk_bytes_per_s": "rate of reading the checkpoint; null: not measured",
        "host_expert_us": (
            "one expert in host memory, by the share streamed over the link; the CPU computes"
            " the rest"
        ),
        "resident_expert_us": "one expert in GPU memory",
        "dense_layer_us": "one layer without expert weights, from launch to launch",
        "dense_device_us": (
            "the part of it that the device takes; the rest is launch overhead, hidden while"
            " experts run"
        ),
        "head_us": "once a step: embedding, output head, sampling",
        "encodings": "experts in other encodings",
        "drift": ("an expert in host memory: time of the slowest round over the fastest, minus 1"),
        "other_ranks": "the ranks after the first, timed while all ranks work",
        "network": "exchange of hidden states and sums between ranks",
    }

    def problems(self) -> list[str]:
        problems = table_problems("", self.as_rank(0, machine=0), self.shape)
        for number, rank in enumerate(self.other_ranks):
            problems += table_problems(f"other_ranks[{number}].", rank, self.shape)
        problems += [
            f"{key}: needs an entry for 1 token"
            for key in ("dense_layer_us", "dense_device_us", "head_us")
            if 1 not in getattr(self, key)
        ]
        return problems + ranks_problems(self.other_ranks, self.network, self.encodings)

    @property
    def num_ranks(self) -> int:
        return 1 + len(self.other_ranks)

    def rank_profile(self, number: int) -> Self:
        """The profile of rank `number` alone. For the work of rank 0, it has rank 0's tables."""
        alone = {"other_ranks": [], "network": None}
        if number:
            rank = self.other_ranks[number - 1]
            alone |= {"disk_bytes_per_s": None, **{key: getattr(rank, key) for key in RANK_TABLES}}
        return self.model_copy(update=alone)

    def as_rank(self, number: int, machine: int) -> RankProfile:
        """The tables of rank `number` as those of a rank of machine number `machine`."""
        alone = self.rank_profile(number)
        return RankProfile(machine=machine, **{key: getattr(alone, key) for key in RANK_TABLES})

    def first_ranks(self, count: int) -> Self:
        """The profile of the first `count` ranks.

        Raises:
            FiddlerError: it has fewer.
        """
        if count > self.num_ranks:
            raise FiddlerError(
                f"--gpu-mem has {count} sizes, a rank each, but the machine profile has"
                f" {self.num_ranks}; profile with `fiddler-opt profile --ranks {count}`, or name a"
                " profile of each machine with --machine a.yaml b.yaml"
            )
        if count == 1:
            return self.rank_profile(0)
        return self.model_copy(update={"other_ranks": self.other_ranks[: count - 1]})

    def in_encoding(self, name: str) -> Self:
        """The profile whose own tables are those of experts in the encoding `name`.

        The present ones become an entry of `encodings`. If a rank has not timed the encoding, it is
        the profile itself, whose times scale by bytes.
        """
        if name not in self.timed_encodings:
            return self
        ranks = [self.rank_profile(number)._encoded(name) for number in range(self.num_ranks)]
        others = [
            each.as_rank(0, machine=rank.machine)
            for each, rank in zip(ranks[1:], self.other_ranks, strict=True)
        ]
        return ranks[0].model_copy(update={"other_ranks": others, "network": self.network})

    def _encoded(self, name: str) -> Self:
        """`in_encoding` for a profile of one rank that has timed the encoding."""
        experts = self.encodings[name]
        others = {key: each for key, each in self.encodings.items() if key != name}
        sizes = {"block_neurons": experts.block_neurons, "expert_bytes": experts.expert_bytes}
        return self.model_copy(
            update={
                "shape": self.shape.model_copy(update={"encoding": name, **sizes}),
                "host_expert_us": experts.host_expert_us,
                "resident_expert_us": experts.resident_expert_us,
                "drift": experts.drift,
                "encodings": {self.shape.encoding: self.encoded_experts, **others},
            }
        )

    @property
    def timed_encodings(self) -> list[str]:
        """The other encodings that every rank has timed."""
        return [
            name
            for name in self.encodings
            if all(name in rank.encodings for rank in self.other_ranks)
        ]

    def stored(self, model: ModelSpec) -> list[ModelSpec]:
        """`model` as it is, and in every other encoding that was timed."""
        others = (name for name in model.encodings if name in self.timed_encodings)
        return [model, *map(model.in_encoding, others)]

    @property
    def encoded_experts(self) -> EncodedExperts:
        """The profile's own tables of experts, as an entry of `encodings`."""
        return EncodedExperts(
            block_neurons=self.shape.block_neurons,
            expert_bytes=self.shape.expert_bytes,
            host_expert_us=self.host_expert_us,
            resident_expert_us=self.resident_expert_us,
            drift=self.drift,
        )

    @property
    def cpu_expert_us(self) -> Times:
        """Time of one expert in host memory, computed by the CPU alone."""
        return {tokens: times[0.0] for tokens, times in self.host_expert_us.items() if 0.0 in times}

    @property
    def link_expert_us(self) -> Times:
        """Time of one expert in host memory, copied whole to the GPU. Empty if not timed."""
        return {tokens: times[1.0] for tokens, times in self.host_expert_us.items() if 1.0 in times}

    @property
    def best_host_us(self) -> Times:
        """Time of one expert in host memory, served by CPU and link at the best share."""
        return {tokens: min(times.values()) for tokens, times in self.host_expert_us.items()}

    @property
    def stream_share(self) -> dict[int, Share]:
        """The best stream share, by number of tokens."""
        return {tokens: min(times, key=times.get) for tokens, times in self.host_expert_us.items()}

    @property
    def streams(self) -> bool:
        """True if streaming experts from host memory was timed.

        Streaming needs a GPU and page-locked host memory.
        """
        return self.link is not None and any(
            share > 0 for times in self.host_expert_us.values() for share in times
        )

    @property
    def typical_drift(self) -> float:
        """The median drift where memory limits the CPU. 0 after a single round."""
        found = [
            part
            for tokens, part in self.drift.items()
            if tokens <= self.kernels.memory_bound_tokens
        ]
        return median(found) if found else 0.0

    @property
    def h2d_bytes_per_s(self) -> float | None:
        return self.link and self.link.h2d_bytes_per_s


def seconds_at(times: Times, tokens: float) -> float:
    """Seconds for `tokens` tokens, by linear interpolation.

    Beyond the last measured point, time grows in proportion to tokens.
    """
    return float(seconds_at_each(times, np.array(tokens)))


def seconds_at_each(times: Times, tokens: np.ndarray) -> np.ndarray:
    """As `seconds_at`, for many numbers of tokens."""
    points = sorted(times)
    beyond = np.maximum(1.0, tokens / points[-1])
    return np.interp(tokens, points, [times[point] for point in points]) * beyond * 1e-6
