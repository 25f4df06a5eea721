"""CostModel: the seconds a workload takes, as a function of the placement. No I/O, no solver.

For one layer and a number of tokens

    time = dense + E[ max( resident, absent + disk, queueing ) ]

    dense      attention, router and dispatch, which experts wait for   resident   the GPU's time for blocks in its memory
    queueing   what Python needs longer than dense for all of a layer   absent     CPU and link together, blocks in host memory
                                                                        disk       reading blocks on disk, for the CPU

All but dense go on at once, and all but queueing are linear in blocks; where the CPU stands in for the GPU nothing overlaps: max
becomes a sum. The expectation runs over which experts the router chooses: exactly, by pairs, when one token chooses two
of not too many experts; otherwise the expected work of each expert stands in for its distribution. A step adds the
head, and the embedding if that is in host memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fiddler_opt.machine import MachineProfile, Times, seconds_at
from fiddler_opt.model import ModelSpec
from fiddler_opt.routing import PhaseRouting, Routing
from fiddler_run.plan import Workload

PARTS = ("head", "embedding", "dense", "resident", "absent", "disk", "queueing")
Rows = list[list[int]]  # blocks by layer and expert
Policy = Literal["together", "cpu", "link", "better"]  # what serves absent blocks; better: for each token count one of cpu and link


@dataclass(frozen=True)
class Placement:
    """Of each expert the first `resident` blocks lie in GPU memory, the last `on_disk` ones on disk, the others in host memory."""

    resident: Rows
    on_disk: Rows
    host_embedding: bool = False

    @classmethod
    def of(cls, resident: Rows) -> "Placement":
        """With nothing on disk and the embedding on the GPU."""
        return cls(resident, [[0] * len(row) for row in resident])


@dataclass(frozen=True)
class Phase:
    """`steps` passes through the model with `tokens` tokens each, of which so many `copies` are the same."""

    name: str
    steps: int
    tokens: int
    copies: int = 1


@dataclass(frozen=True)
class Scenario:
    """A set of experts called in a layer, with its probability.

    `resident_s`, `absent_s`, `disk_s`: seconds of each called expert if all its blocks were there.
    """

    probability: float
    resident_s: dict[int, float]
    absent_s: dict[int, float]
    disk_s: dict[int, float]


@dataclass(frozen=True)
class CostModel:
    """`fixed_s`: by phase, seconds of a step that no placement changes, by part; `queueing_s`: at least so long take a layer's
    experts; `host_embedding_s`: what a step takes longer with the embedding in host memory; `called`: by layer and expert, the
    probability that a decode step calls it."""

    blocks_per_expert: int
    overlap: bool
    batch_size: int
    phases: list[Phase]
    fixed_s: dict[str, dict[str, float]]
    queueing_s: dict[str, float]
    host_embedding_s: dict[str, float]
    scenarios: dict[str, list[list[Scenario]]]  # by phase and layer
    called: list[list[float]]

    @classmethod
    def build(
        cls,
        model: ModelSpec,
        machine: MachineProfile,
        routing: Routing,
        workload: Workload,
        chunk_tokens: int,
        policy: Policy = "together",
        cpu_alone: bool = False,
    ) -> "CostModel":
        """The costs on a machine, or, for `cpu_alone`, on its CPU without its GPU; prompts pass in chunks of `chunk_tokens`."""
        shape, timed = model.shape, machine.shape
        expert_scale = model.expert_bytes / timed.expert_bytes
        dense_scale = model.dense_layer_bytes / timed.dense_layer_bytes
        overlap = machine.device.kind == "cuda" and not cpu_alone
        absent_us = machine.cpu_expert_us if cpu_alone else absent_times(machine, policy)
        disk_s = model.expert_bytes / machine.disk_bytes_per_s if machine.disk_bytes_per_s else float("inf")

        def expert_times(tokens: float) -> tuple[float, float, float]:
            resident, absent = seconds_at(machine.device_expert_us, tokens), seconds_at(absent_us, tokens)
            return resident * expert_scale, absent * expert_scale, disk_s

        def on_the_cpu(size_bytes: int, tokens: float) -> float:
            """What weights add that a GPU was timed with: they take a CPU as long as so many bytes of an expert do."""
            without_gpu = cpu_alone and machine.device.kind == "cuda"
            return seconds_at(machine.cpu_expert_us, tokens) * size_bytes / timed.expert_bytes if without_gpu else 0.0

        phases = workload_phases(workload, chunk_tokens)
        fixed_s, queueing_s, host_embedding_s = {}, {}, {}
        for phase in phases:
            queued = seconds_at(machine.dense_layer_us, phase.tokens) * dense_scale
            queued += on_the_cpu(model.dense_layer_bytes, phase.tokens)
            dense = seconds_at(machine.dense_device_us, phase.tokens) * dense_scale if overlap else queued
            head = seconds_at(machine.head_us, phase.tokens) * model.head_bytes / timed.head_bytes
            fixed_s[phase.name] = {
                "head": head + on_the_cpu(model.head_bytes, workload.sequences),  # of each sequence's last token alone
                "dense": shape.num_layers * dense,
            }
            queueing_s[phase.name] = max(0.0, queued - dense)
            host_embedding_s[phase.name] = seconds_at(machine.host_embedding_us, phase.tokens) if machine.host_embedding_us else 0.0
        return cls(
            blocks_per_expert=shape.blocks_per_expert(model.block_neurons),
            overlap=overlap,
            batch_size=workload.batch_size,
            phases=phases,
            fixed_s=fixed_s,
            queueing_s=queueing_s,
            host_embedding_s=host_embedding_s,
            scenarios={
                phase.name: [
                    layer_scenarios(observed, layer, phase, shape.num_experts_per_tok, expert_times)
                    for layer in range(shape.num_layers)
                ]
                for phase in phases
                for observed in [routing.decode if phase.name == "decode" else routing.prefill]
            },
            called=[[chance_called(p, workload.sequences) for p in row] for row in routing.decode.expert],
        )

    def scenario_parts(self, phase: str, scenario: Scenario, resident: list[int], on_disk: list[int]) -> dict[str, float]:
        """Seconds of one layer's experts in a scenario, for its rows of blocks, by what they are spent on."""
        blocks = self.blocks_per_expert
        device = sum(seconds * resident[e] / blocks for e, seconds in scenario.resident_s.items())
        absent = sum(seconds * (blocks - resident[e] - on_disk[e]) / blocks for e, seconds in scenario.absent_s.items())
        disk = sum(seconds * on_disk[e] / blocks for e, seconds in scenario.disk_s.items() if on_disk[e])
        if not self.overlap:
            return {"resident": device, "absent": absent, "disk": disk}
        if absent + disk >= max(device, self.queueing_s[phase]):
            return {"absent": absent, "disk": disk}
        return {"resident": device} if device >= self.queueing_s[phase] else {"queueing": self.queueing_s[phase]}

    def layer_parts(self, phase: str, layer: int, resident: list[int], on_disk: list[int]) -> dict[str, float]:
        """Expected seconds of one layer's experts, by what they are spent on: where several go on at once, the longest."""
        parts = dict.fromkeys(PARTS, 0.0)
        for scenario in self.scenarios[phase][layer]:
            for name, seconds in self.scenario_parts(phase, scenario, resident, on_disk).items():
                parts[name] += scenario.probability * seconds
        return parts

    def step_parts(self, phase: Phase, placement: Placement) -> dict[str, float]:
        """Expected seconds of one step of a phase by part; their sum is the step's."""
        parts = {**dict.fromkeys(PARTS, 0.0), **self.fixed_s[phase.name]}
        parts["embedding"] = self.host_embedding_s[phase.name] * placement.host_embedding
        for layer, (resident, on_disk) in enumerate(zip(placement.resident, placement.on_disk, strict=True)):
            for name, seconds in self.layer_parts(phase.name, layer, resident, on_disk).items():
                parts[name] += seconds
        return parts

    def step_s(self, phase: Phase, placement: Placement) -> float:
        return sum(self.step_parts(phase, placement).values())

    def layer_s(self, layer: int, resident: list[int], on_disk: list[int]) -> float:
        """Expected seconds that one layer's experts take of the whole workload."""
        return sum(phase.steps * sum(self.layer_parts(phase.name, layer, resident, on_disk).values()) for phase in self.phases)

    def total_s(self, placement: Placement) -> float:
        """Expected seconds of the whole workload."""
        return sum(phase.steps * self.step_s(phase, placement) for phase in self.phases)

    def ttft_parts(self, placement: Placement) -> dict[str, float]:
        """Expected seconds until the first token, by part."""
        steps = [(phase.steps, self.step_parts(phase, placement)) for phase in self.phases if phase is not self.decode]
        return {name: sum(count * parts[name] for count, parts in steps) for name in PARTS}

    def ttft_s(self, placement: Placement) -> float:
        return sum(self.ttft_parts(placement).values())

    def decode_step_s(self, placement: Placement) -> float:
        return self.step_s(self.decode, placement)

    def decode_tokens_per_s(self, step_s: float) -> float:
        """Of all sequences of the batch, when a step takes `step_s`; beams search one sequence together."""
        return self.batch_size / step_s

    @property
    def decode(self) -> Phase:
        return self.phases[-1]

    def hit_rate(self, placement: Placement) -> float:
        """Resident part of the expert blocks that decode needs."""
        needed = self.blocks_per_expert * sum(map(sum, self.called))
        rows = zip(self.called, placement.resident, strict=True)
        return sum(c * r for calls, row in rows for c, r in zip(calls, row, strict=True)) / needed


def absent_times(machine: MachineProfile, policy: Policy) -> Times:
    """Microseconds of one absent expert, by tokens, served by that policy.

    The machine must have timed the link alone for `link`, and a link for `better`.
    """
    if policy == "cpu":
        return machine.cpu_expert_us
    if policy == "together":
        return machine.best_absent_us
    cpu, link = machine.cpu_expert_us, machine.link_expert_us
    if policy == "link":
        return link
    return {tokens: min(times[tokens] for times in (cpu, link) if tokens in times) for tokens in sorted(cpu | link)}


def workload_phases(workload: Workload, chunk_tokens: int) -> list[Phase]:
    """Prefill in chunks, of each prompt once; for beams, its last token by itself, for each of them; then decode, always last."""
    beams = workload.num_beams > 1
    whole, rest = divmod(workload.prompt_tokens - beams, chunk_tokens)
    phases = []
    if whole:
        phases.append(Phase("prefill", whole, chunk_tokens * workload.batch_size))
    if rest:
        phases.append(Phase("prefill of the rest", 1, rest * workload.batch_size))
    if beams:
        phases.append(Phase("prefill of the last token", 1, workload.sequences, copies=workload.num_beams))
    return [*phases, Phase("decode", workload.output_tokens - 1, workload.sequences)]


def chance_called(probability: float, tokens: int) -> float:
    """Probability that at least one of `tokens` independent tokens chooses an expert that each chooses with `probability`."""
    return 1 - (1 - probability) ** tokens or tokens * probability  # that difference is 0 below 1e-16


def layer_scenarios(
    routing: PhaseRouting, layer: int, phase: Phase, top_k: int, expert_times: Callable[[float], tuple[float, float, float]]
) -> list[Scenario]:
    """What can happen in one layer; `expert_times(tokens)`: an expert's seconds when resident, absent, on disk. Copies of a token
    choose the same experts."""
    different = phase.tokens // phase.copies
    if different == 1 and (top_k == 1 or routing.pair[layer]):
        times = expert_times(phase.copies)
        sets = routing.pair[layer].items() if top_k == 2 else (((e,), p) for e, p in enumerate(routing.expert[layer]))
        return [Scenario(p, *(dict.fromkeys(chosen, seconds) for seconds in times)) for chosen, p in sets if p > 0]
    by_place = {}, {}, {}
    for expert, probability in enumerate(routing.expert[layer]):
        if probability > 0:
            called = chance_called(probability, different)
            for place, seconds in zip(by_place, expert_times(phase.tokens * probability / called), strict=True):
                place[expert] = called * seconds
    return [Scenario(1.0, *by_place)]
