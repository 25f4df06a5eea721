"""The times of a machine profile for one model, scaled by bytes."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fiddler_opt.inputs.machine import MachineProfile, Times, seconds_at, seconds_at_each
from fiddler_opt.inputs.model import ModelSpec

# What serves host blocks. `better`: the faster of `cpu` and `link` for each number of tokens.
Policy = Literal["together", "cpu", "link", "better"]


@dataclass(frozen=True)
class ModelTimes:
    """Seconds on a machine or, with `cpu_alone`, on its CPU without its GPU."""

    model: ModelSpec
    machine: MachineProfile
    policy: Policy
    cpu_alone: bool

    @property
    def overlap(self) -> bool:
        """True if GPU, link and CPU work at the same time."""
        return self.machine.device.kind == "cuda" and not self.cpu_alone

    def expert_s(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Seconds of an expert that is resident, in host memory, and on disk, by tokens."""
        machine = self.machine
        expert_bytes = self.model.expert_bytes
        scale = expert_bytes / machine.shape.expert_bytes
        host_us = machine.cpu_expert_us if self.cpu_alone else host_times(machine, self.policy)
        disk_rate = machine.disk_bytes_per_s
        return (
            seconds_at_each(machine.resident_expert_us, tokens) * scale,
            seconds_at_each(host_us, tokens) * scale,
            np.full(tokens.shape, expert_bytes / disk_rate if disk_rate else np.inf),
        )

    def dense_s(self, tokens: int) -> tuple[float, float]:
        """Seconds of one layer without its experts, and its launch overhead.

        The launch overhead is a lower bound on the time of the experts.
        """
        scale = self.model.dense_layer_bytes / self.machine.shape.dense_layer_bytes
        launched = seconds_at(self.machine.dense_layer_us, tokens) * scale
        launched += self._without_gpu_s(self.model.dense_layer_bytes, tokens)
        if not self.overlap:
            return launched, 0.0
        dense = seconds_at(self.machine.dense_device_us, tokens) * scale
        return dense, max(0.0, launched - dense)

    def head_s(self, tokens: int, sequences: int) -> float:
        """Seconds of a step besides its layers. The output head sees one token of each sequence."""
        model = self.model
        seconds = seconds_at(self.machine.head_us, tokens)
        scaled = seconds * model.head_bytes / self.machine.shape.head_bytes
        return scaled + self._without_gpu_s(model.head_bytes, sequences)

    def _without_gpu_s(self, size_bytes: int, tokens: float) -> float:
        """Extra seconds of dense weights on the CPU, if they were timed on a GPU.

        Assumes the same time per byte as for experts.
        """
        if not self.cpu_alone or self.machine.device.kind != "cuda":
            return 0.0
        expert_s = seconds_at(self.machine.cpu_expert_us, tokens)
        return expert_s * size_bytes / self.machine.shape.expert_bytes


def host_times(machine: MachineProfile, policy: Policy) -> Times:
    """Microseconds of one host expert under the policy, by number of tokens.

    `link` and `better` need a profile that timed the link alone.
    """
    if policy == "cpu":
        return machine.cpu_expert_us
    if policy == "together":
        return machine.best_host_us
    cpu = machine.cpu_expert_us
    link = machine.link_expert_us
    if policy == "link":
        return link
    return {
        tokens: min(times[tokens] for times in (cpu, link) if tokens in times)
        for tokens in sorted(cpu | link)
    }
