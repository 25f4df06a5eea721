"""CostModel: the seconds of a workload as a function of the placement. No I/O, no solver.

For one layer and a number of tokens

    time = dense + E[ max( resident, host + disk, launch_overhead ) ]

    dense            attention, router and dispatch; experts wait for it
    resident         the GPU, for blocks in GPU memory
    host             CPU and link together, for blocks in host memory
    disk             reading blocks from disk, for the CPU
    launch_overhead  how much longer launching a layer takes than `dense`

Inside the max, `resident` and `host + disk` are linear in blocks, and `launch_overhead` is
constant. Without a GPU, the CPU computes both parts, and the max becomes a sum. The expectation is
over the router's choices. It is exact for a single token with top-1 routing, or with top-2 routing
if the frequencies of pairs are known. Otherwise each expert's expected time replaces its
distribution, which is optimistic. A step adds the head.
"""

from dataclasses import dataclass

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.routing import Routing
from fiddler_opt.solve.phases import Phase, workload_phases
from fiddler_opt.solve.placement import Placement
from fiddler_opt.solve.scenarios import Scenario, chance_called, layer_scenarios
from fiddler_opt.solve.times import ModelTimes, Policy
from fiddler_run.plan.parts import PARTS
from fiddler_run.plan.schema import Workload


@dataclass(frozen=True)
class CostModel:
    """Expected seconds of a workload's phases.

    `fixed_s`: by phase and part, seconds of a step that do not depend on the placement.
    `launch_overhead_s`: by phase, a lower bound on a layer's expert time. `scenarios`: by phase and
    layer. `called`: by layer and expert, the probability that a decode step calls the expert.
    """

    blocks_per_expert: int
    overlap: bool
    batch_size: int
    phases: list[Phase]
    fixed_s: dict[str, dict[str, float]]
    launch_overhead_s: dict[str, float]
    scenarios: dict[str, list[list[Scenario]]]
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
        """The costs on a machine or, with `cpu_alone`, on its CPU without its GPU.

        Prompts pass in chunks of `chunk_tokens`.
        """
        shape = model.shape
        times = ModelTimes(model, machine, policy, cpu_alone)
        phases = workload_phases(workload, chunk_tokens)
        fixed_s = {}
        launch_overhead_s = {}
        scenarios = {}
        for phase in phases:
            observed = routing.decode if phase.name == "decode" else routing.prefill
            dense_s, overhead_s = times.dense_s(phase.tokens)
            fixed_s[phase.name] = {
                "head": times.head_s(phase.tokens, workload.sequences),
                "dense": shape.num_layers * dense_s,
            }
            launch_overhead_s[phase.name] = overhead_s
            scenarios[phase.name] = [
                layer_scenarios(observed, layer, phase, shape.num_experts_per_tok, times.expert_s)
                for layer in range(shape.num_layers)
            ]
        return cls(
            blocks_per_expert=model.blocks_per_expert,
            overlap=times.overlap,
            batch_size=workload.batch_size,
            phases=phases,
            fixed_s=fixed_s,
            launch_overhead_s=launch_overhead_s,
            scenarios=scenarios,
            called=[
                [chance_called(p, workload.sequences) for p in row] for row in routing.decode.expert
            ],
        )

    def scenario_parts(
        self, phase: str, scenario: Scenario, resident: list[int], on_disk: list[int]
    ) -> dict[str, float]:
        """Seconds of one layer's experts in a scenario, by part. If parts overlap, only the
        longest.
        """
        blocks = self.blocks_per_expert
        device = sum(seconds * resident[e] / blocks for e, seconds in scenario.resident_s.items())
        host = sum(
            seconds * (blocks - resident[e] - on_disk[e]) / blocks
            for e, seconds in scenario.host_s.items()
        )
        disk = sum(
            seconds * on_disk[e] / blocks for e, seconds in scenario.disk_s.items() if on_disk[e]
        )
        if not self.overlap:
            return {"resident": device, "host": host, "disk": disk}
        overhead = self.launch_overhead_s[phase]
        if host + disk >= max(device, overhead):
            return {"host": host, "disk": disk}
        return {"resident": device} if device >= overhead else {"launch_overhead": overhead}

    def layer_parts(
        self, phase: str, layer: int, resident: list[int], on_disk: list[int]
    ) -> dict[str, float]:
        """Expected seconds of one layer's experts by part."""
        parts = dict.fromkeys(PARTS, 0.0)
        for scenario in self.scenarios[phase][layer]:
            for name, seconds in self.scenario_parts(phase, scenario, resident, on_disk).items():
                parts[name] += scenario.probability * seconds
        return parts

    def step_parts(self, phase: Phase, placement: Placement) -> dict[str, float]:
        """Expected seconds of one step of a phase by part. They add up to the step."""
        parts = {**dict.fromkeys(PARTS, 0.0), **self.fixed_s[phase.name]}
        rows = zip(placement.resident, placement.on_disk, strict=True)
        for layer, (resident, on_disk) in enumerate(rows):
            for name, seconds in self.layer_parts(phase.name, layer, resident, on_disk).items():
                parts[name] += seconds
        return parts

    def step_s(self, phase: Phase, placement: Placement) -> float:
        return sum(self.step_parts(phase, placement).values())

    def layer_s(self, layer: int, resident: list[int], on_disk: list[int]) -> float:
        """Expected seconds of one layer's experts over the whole workload."""
        return sum(
            phase.steps * sum(self.layer_parts(phase.name, layer, resident, on_disk).values())
            for phase in self.phases
        )

    def total_s(self, placement: Placement) -> float:
        """Expected seconds of the whole workload."""
        return sum(phase.steps * self.step_s(phase, placement) for phase in self.phases)

    def ttft_parts(self, placement: Placement) -> dict[str, float]:
        """Expected seconds until the first token, by part."""
        steps = [
            (phase.steps, self.step_parts(phase, placement))
            for phase in self.phases
            if phase is not self.decode
        ]
        return {name: sum(count * parts[name] for count, parts in steps) for name in PARTS}

    def ttft_s(self, placement: Placement) -> float:
        return sum(self.ttft_parts(placement).values())

    def decode_step_s(self, placement: Placement) -> float:
        return self.step_s(self.decode, placement)

    def decode_tokens_per_s(self, step_s: float) -> float:
        """Tokens/s of all sequences of the batch if a step takes `step_s`. Beams share one
        sequence.
        """
        return self.batch_size / step_s

    @property
    def decode(self) -> Phase:
        return self.phases[-1]

    def hit_rate(self, placement: Placement) -> float:
        """The resident fraction of the expert blocks that decode needs."""
        needed = self.blocks_per_expert * sum(map(sum, self.called))
        rows = zip(self.called, placement.resident, strict=True)
        return sum(c * r for calls, row in rows for c, r in zip(calls, row, strict=True)) / needed

    def by_popularity(self) -> list[tuple[int, int]]:
        """(layer, expert) pairs, the ones that decode calls most first."""
        order = sorted(
            (-chance, layer, expert)
            for layer, row in enumerate(self.called)
            for expert, chance in enumerate(row)
        )
        return [(layer, expert) for _, layer, expert in order]
