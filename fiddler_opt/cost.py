"""CostModel: the seconds a workload takes, as a function of the placement. No I/O, no solver.

For one layer and a number of tokens

    time = dense + dispatch + E[ max( device(resident blocks), absent(absent blocks), queueing ) ]

where device() is the GPU's time for blocks in its memory and absent() is the measured time of CPU and link together for
blocks that are not, both linear in blocks; dense is the GPU's time for the rest of the layer, and queueing what Python needs
more than that to queue it, which goes on while experts are at work. Where the CPU stands in for the GPU nothing overlaps: max
becomes a sum.
The expectation runs over which experts the router chooses: exactly, by pairs, when one token chooses two experts; for more
tokens the expected work of each expert stands in for its distribution.
"""

from dataclasses import dataclass

from fiddler_opt.machine import MachineProfile, seconds_at
from fiddler_opt.memory import prefill_chunk_tokens
from fiddler_opt.model import ModelSpec
from fiddler_opt.routing import PhaseRouting, Routing
from fiddler_run.plan import Workload

Placement = list[list[int]]  # resident blocks by layer and expert


@dataclass(frozen=True)
class Phase:
    """`steps` passes through the model with `tokens` tokens each."""

    name: str
    steps: int
    tokens: int


@dataclass(frozen=True)
class Scenario:
    """A set of experts called in a layer, with its probability.

    `device_s` and `absent_s`: seconds of each called expert if all its blocks were resident, or all absent.
    """

    probability: float
    device_s: dict[int, float]
    absent_s: dict[int, float]


@dataclass(frozen=True)
class CostModel:
    blocks_per_expert: int
    overlap: bool
    phases: list[Phase]
    fixed_s: dict[str, float]  # by phase: seconds of a step that no placement changes
    queueing_s: dict[str, float]  # by phase: the least seconds of a layer's experts
    scenarios: dict[str, list[list[Scenario]]]  # by phase and layer
    called: list[list[float]]  # by layer and expert: probability that a decode step calls it

    @classmethod
    def build(
        cls,
        model: ModelSpec,
        machine: MachineProfile,
        routing: Routing,
        workload: Workload,
        cpu_alone: bool = False,
    ) -> "CostModel":
        """The costs on a machine, or, for `cpu_alone`, on its CPU without its GPU."""
        shape, timed = model.shape, machine.shape
        expert_scale = model.expert_bytes / timed.expert_bytes
        dense_scale = model.dense_layer_bytes / timed.dense_layer_bytes
        head_scale = model.head_bytes / timed.head_bytes

        def fixed(tokens: int) -> float:
            layer = (dense(tokens) if overlap else queued(tokens)) + seconds_at(machine.dispatch_us, tokens)
            return shape.num_layers * layer + seconds_at(machine.head_us, tokens) * head_scale

        def dense(tokens: int) -> float:
            return seconds_at(machine.dense_device_us, tokens) * dense_scale

        def queued(tokens: int) -> float:
            return seconds_at(machine.dense_layer_us, tokens) * dense_scale

        def expert_times(tokens: float) -> tuple[float, float]:
            return (
                seconds_at(machine.device_expert_us, tokens) * expert_scale,
                seconds_at(machine.cpu_expert_us if cpu_alone else machine.best_absent_us, tokens) * expert_scale,
            )

        overlap = machine.device.kind == "cuda" and not cpu_alone
        phases = workload_phases(workload)
        return cls(
            blocks_per_expert=shape.blocks_per_expert(model.block_neurons),
            overlap=overlap,
            phases=phases,
            fixed_s={phase.name: fixed(phase.tokens) for phase in phases},
            queueing_s={phase.name: max(0.0, queued(phase.tokens) - dense(phase.tokens)) if overlap else 0.0 for phase in phases},
            scenarios={
                phase.name: [
                    layer_scenarios(observed, layer, phase.tokens, shape.num_experts_per_tok, expert_times)
                    for layer in range(shape.num_layers)
                ]
                for phase in phases
                for observed in [routing.decode if phase.name == "decode" else routing.prefill]
            },
            called=[[chance_called(p, workload.num_beams) for p in row] for row in routing.decode.expert],
        )

    def scenario_s(self, scenario: Scenario, resident: list[int], queueing_s: float) -> float:
        """Seconds of one layer's experts in a scenario, for its row of resident blocks."""
        blocks = self.blocks_per_expert
        device = sum(seconds * resident[expert] / blocks for expert, seconds in scenario.device_s.items())
        absent = sum(seconds * (blocks - resident[expert]) / blocks for expert, seconds in scenario.absent_s.items())
        return max(device, absent, queueing_s) if self.overlap else device + absent

    def step_s(self, phase: Phase, placement: Placement) -> float:
        """Expected seconds of one step of a phase."""
        experts = sum(
            scenario.probability * self.scenario_s(scenario, row, self.queueing_s[phase.name])
            for scenarios, row in zip(self.scenarios[phase.name], placement, strict=True)
            for scenario in scenarios
        )
        return self.fixed_s[phase.name] + experts

    def total_s(self, placement: Placement) -> float:
        """Expected seconds of the whole workload."""
        return sum(phase.steps * self.step_s(phase, placement) for phase in self.phases)

    def ttft_s(self, placement: Placement) -> float:
        return sum(phase.steps * self.step_s(phase, placement) for phase in self.phases if phase is not self.decode)

    def decode_step_s(self, placement: Placement) -> float:
        return self.step_s(self.decode, placement)

    @property
    def decode(self) -> Phase:
        return self.phases[-1]

    def hit_rate(self, placement: Placement) -> float:
        """Resident part of the expert blocks that decode needs."""
        needed = self.blocks_per_expert * sum(map(sum, self.called))
        found = sum(c * r for calls, row in zip(self.called, placement, strict=True) for c, r in zip(calls, row, strict=True))
        return found / needed


def workload_phases(workload: Workload) -> list[Phase]:
    """Prefill in chunks (beam search runs the prompt once for every beam), then decode, always last."""
    chunk = prefill_chunk_tokens(workload)
    whole, rest = divmod(workload.prompt_tokens, chunk)
    phases = []
    if whole:
        phases.append(Phase("prefill", whole, chunk * workload.num_beams))
    if rest:
        phases.append(Phase("prefill of the rest", 1, rest * workload.num_beams))
    return [*phases, Phase("decode", workload.output_tokens - 1, workload.num_beams)]


def chance_called(probability: float, tokens: int) -> float:
    """Probability that at least one of `tokens` independent tokens chooses an expert that each chooses with `probability`."""
    return 1 - (1 - probability) ** tokens


def layer_scenarios(routing: PhaseRouting, layer: int, tokens: int, top_k: int, expert_times) -> list[Scenario]:
    """What can happen in one layer; `expert_times(tokens)` gives an expert's seconds when resident and when absent."""
    if tokens == 1 and top_k <= 2:
        device, absent = expert_times(1)
        sets = routing.pair[layer].items() if top_k == 2 else (((e,), p) for e, p in enumerate(routing.expert[layer]))
        return [Scenario(p, dict.fromkeys(chosen, device), dict.fromkeys(chosen, absent)) for chosen, p in sets if p > 0]
    device_s, absent_s = {}, {}
    for expert, probability in enumerate(routing.expert[layer]):
        if probability > 0:
            called = chance_called(probability, tokens)
            device, absent = expert_times(tokens * probability / called)
            device_s[expert], absent_s[expert] = called * device, called * absent
    return [Scenario(1.0, device_s, absent_s)]
