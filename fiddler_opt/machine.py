"""MachineProfile: how fast a machine does each thing that the runtime does. It knows no prompts and no placement."""

from typing import ClassVar, Literal, Self

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from fiddler_opt.model import ModelSpec
from fiddler_run.plan import Dtype, check_shares, interpolate
from fiddler_run.yaml_file import Section, YamlFile

Times = dict[PositiveInt, PositiveFloat]  # microseconds by number of tokens


class Cpu(Section):
    name: str
    cores: PositiveInt
    threads: PositiveInt


class Device(Section):
    """`cuda` is a GPU; `host` is the CPU standing in for one, where there is none: the same memory and the same cores.

    `context_bytes` is what driver and libraries take of `memory_bytes` for one process that uses the GPU.
    """

    kind: Literal["cuda", "host"]
    name: str
    memory_bytes: NonNegativeInt
    context_bytes: NonNegativeInt


class MeasuredShape(Section):
    """The weights whose handling was timed. For other sizes, times are taken to grow with bytes."""

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    dtype: Dtype
    block_neurons: PositiveInt
    expert_bytes: PositiveInt
    dense_layer_bytes: PositiveInt
    head_bytes: PositiveInt

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
    version: Literal[1]
    source: Literal["measured", "data sheet"]
    cpu: Cpu
    device: Device
    shape: MeasuredShape
    h2d_bytes_per_s: PositiveFloat | None
    cpu_expert_us: Times
    device_expert_us: Times
    absent_expert_us: Times
    stream_share: dict[PositiveInt, float]
    dispatch_us: Times
    dense_layer_us: Times
    head_us: Times
    provenance: Made

    header: ClassVar[str] = "A machine's speed, as `fiddler-opt profile` writes it. Times are microseconds by number of tokens."
    key_comments: ClassVar[dict[str, str]] = {
        "h2d_bytes_per_s": "copies from page-locked host memory to the GPU",
        "cpu_expert_us": "one expert in host memory, computed by the CPU alone",
        "device_expert_us": "one expert in GPU memory",
        "absent_expert_us": "one expert in host memory, by CPU and link together at the best share",
        "stream_share": "that share: the part of the expert sent over the link",
        "dispatch_us": "one layer's dispatch besides its experts",
        "dense_layer_us": "one layer without its experts",
        "head_us": "once a step: embedding, output head, choice of the token",
    }

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for name in (
            "cpu_expert_us",
            "device_expert_us",
            "absent_expert_us",
            "dispatch_us",
            "dense_layer_us",
            "head_us",
        ):
            if 1 not in getattr(self, name):
                raise ValueError(f"{name}: needs an entry for 1 token")
        check_shares(self.stream_share)
        return self


def seconds_at(times: Times, tokens: float) -> float:
    """Seconds for `tokens` tokens: linear between measured points, and past the last one in proportion to tokens."""
    beyond = max(1.0, tokens / max(times))
    return interpolate(times, tokens) * beyond * 1e-6
