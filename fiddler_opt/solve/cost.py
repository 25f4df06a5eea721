"""CostModel: the seconds of a workload as a function of the placement. No I/O, no solver.

For one layer and a number of tokens

    time = dense + exchange + E[ max over ranks of ( resident, host + disk ), launch_overhead ]

    dense            attention, router and dispatch; experts wait for it
    exchange         hidden states to the other ranks and sums back; none with one rank
    resident         a rank's GPU, for blocks in its GPU memory
    host             its CPU and link together, for blocks in its host memory
    disk             reading blocks from disk, for the CPU; only the first rank's
    launch_overhead  how much longer launching a layer takes than `dense`

Inside the max, `resident` and `host + disk` are linear in blocks, and `launch_overhead` is
constant. In a rank without a GPU, the CPU computes both parts, and their sum counts. All ranks have
a part of every expert and work at the same time. `dense`, `launch_overhead` and the head are the
first rank's. The expectation is over the router's choices. It is exact for a single token with
top-1 routing, or with top-2 routing if the frequencies of pairs are known. Otherwise each expert's
expected time replaces its distribution, which is optimistic. A step adds the head.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.routing import Routing
from fiddler_opt.solve.phases import Phase, workload_phases
from fiddler_opt.solve.placement import LayerBlocks, Placement
from fiddler_opt.solve.scenarios import Scenario, chance_called, layer_scenarios
from fiddler_opt.solve.times import ModelTimes, Policy
from fiddler_run.plan.parts import PARTS
from fiddler_run.plan.schema import Workload
from fiddler_run.plan.shape import DTYPE_BYTES


@dataclass(frozen=True)
class CostModel:
    """Expected seconds of a workload's phases.

    `overlap`: by rank, True if its GPU, link and CPU work at the same time. `fixed_s`: by phase and
    part, seconds of a step that do not depend on the placement. `launch_overhead_s`: by phase, a
    lower bound on a layer's expert time. `scenarios`: by phase and layer. `called`: by layer and
    expert, the probability that a decode step calls the expert.
    """

    blocks_per_expert: int
    overlap: tuple[bool, ...]
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
        cpu_alone: Collection[int] = (),
    ) -> "CostModel":
        """The costs on all ranks of a machine profile.

        Args:
            chunk_tokens: prompts pass in chunks of this size.
            cpu_alone: the ranks that use their CPU without their GPU.
        """
        shape = model.shape
        ranks = [
            ModelTimes(model, machine.rank_profile(number), policy, number in cpu_alone)
            for number in range(machine.num_ranks)
        ]
        times = ranks[0]
        expert_times = [each.expert_s for each in ranks]
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
            if machine.network is not None:
                exchange_s = layer_exchange_s(model, machine, phase.tokens)
                fixed_s[phase.name]["exchange"] = shape.num_layers * exchange_s
            launch_overhead_s[phase.name] = overhead_s
            scenarios[phase.name] = [
                layer_scenarios(observed, layer, phase, shape.num_experts_per_tok, expert_times)
                for layer in range(shape.num_layers)
            ]
        return cls(
            blocks_per_expert=model.blocks_per_expert,
            overlap=tuple(each.overlap for each in ranks),
            batch_size=workload.batch_size,
            phases=phases,
            fixed_s=fixed_s,
            launch_overhead_s=launch_overhead_s,
            scenarios=scenarios,
            called=[
                [chance_called(p, workload.sequences) for p in row] for row in routing.decode.expert
            ],
        )

    def rank_parts(self, number: int, scenario: Scenario, placed: LayerBlocks) -> dict[str, float]:
        """Seconds of one layer's experts in rank `number`, by part.

        If parts overlap, only the longest.
        """
        blocks = self.blocks_per_expert
        whole = scenario.ranks[number]
        device = sum(s * placed.resident[e] / blocks for e, s in whole.resident_s.items())
        host = sum(s * placed.host[e] / blocks for e, s in whole.host_s.items())
        disk = sum(
            s * placed.on_disk[e] / blocks for e, s in whole.disk_s.items() if placed.on_disk[e]
        )
        if not self.overlap[number]:
            return {"resident": device, "host": host, "disk": disk}
        return {"host": host, "disk": disk} if host + disk >= device else {"resident": device}

    def scenario_parts(
        self, phase: str, scenario: Scenario, placed: Sequence[LayerBlocks]
    ) -> dict[str, float]:
        """Seconds of one layer's experts in a scenario, by part of the slowest rank.

        Args:
            placed: the layer's blocks in each rank.
        """
        ranks = [self.rank_parts(number, scenario, each) for number, each in enumerate(placed)]
        slowest = max(ranks, key=lambda parts: sum(parts.values()))
        overhead = self.launch_overhead_s[phase]
        return slowest if sum(slowest.values()) >= overhead else {"launch_overhead": overhead}

    def layer_parts(
        self, phase: str, layer: int, placed: Sequence[LayerBlocks]
    ) -> dict[str, float]:
        """Expected seconds of one layer's experts by part."""
        parts = dict.fromkeys(PARTS, 0.0)
        for scenario in self.scenarios[phase][layer]:
            for name, seconds in self.scenario_parts(phase, scenario, placed).items():
                parts[name] += scenario.probability * seconds
        return parts

    def step_parts(self, phase: Phase, placement: Placement) -> dict[str, float]:
        """Expected seconds of one step of a phase by part. They add up to the step."""
        parts = {**dict.fromkeys(PARTS, 0.0), **self.fixed_s[phase.name]}
        for layer in range(len(self.called)):
            placed = placement.layer(layer, self.blocks_per_expert)
            for name, seconds in self.layer_parts(phase.name, layer, placed).items():
                parts[name] += seconds
        return parts

    def step_s(self, phase: Phase, placement: Placement) -> float:
        return sum(self.step_parts(phase, placement).values())

    def layer_s(self, layer: int, placement: Placement) -> float:
        """Expected seconds of one layer's experts over the whole workload."""
        placed = placement.layer(layer, self.blocks_per_expert)
        return sum(
            phase.steps * sum(self.layer_parts(phase.name, layer, placed).values())
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
        """The fraction of the expert blocks that decode needs in the GPU memory of any rank."""
        needed = self.blocks_per_expert * sum(map(sum, self.called))
        return (
            sum(
                chance * count
                for rows in placement.resident_by_rank
                for calls, row in zip(self.called, rows, strict=True)
                for chance, count in zip(calls, row, strict=True)
            )
            / needed
        )

    def by_popularity(self) -> list[tuple[int, int]]:
        """(layer, expert) pairs, the ones that decode calls most first."""
        order = sorted(
            (-chance, layer, expert)
            for layer, row in enumerate(self.called)
            for expert, chance in enumerate(row)
        )
        return [(layer, expert) for _, layer, expert in order]


def layer_exchange_s(model: ModelSpec, machine: MachineProfile, tokens: int) -> float:
    """Seconds in which ranks exchange the states and sums of one layer.

    The first rank sends and receives all of it.
    """
    carried = (machine.num_ranks - 1) * tokens * exchanged_bytes(model)
    return machine.network.round_trip_us * 1e-6 + carried / machine.network.bytes_per_s


def exchanged_bytes(model: ModelSpec) -> int:
    """Bytes of a token's hidden state, choices and float32 sums, to and from another rank.

    A choice is an index of 8 bytes and a weight of 4.
    """
    shape = model.shape
    of_states = shape.hidden_size * (DTYPE_BYTES[shape.dtype] + 4)
    return of_states + shape.num_experts_per_tok * 12
