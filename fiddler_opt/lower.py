"""Solution -> Plan: turns what the solver chose into the plain numbers that the runtime executes."""

from fiddler_opt.cost import CostModel
from fiddler_opt.ilp import Solution
from fiddler_opt.machine import MachineProfile, Times, seconds_at
from fiddler_opt.memory import prefill_chunk_tokens
from fiddler_opt.model import ModelSpec
from fiddler_run.plan import GpuMemory, HostMemory, Plan, Predicted, Provenance, Rates, Workload


def lower(
    model: ModelSpec,
    machine: MachineProfile,
    cost: CostModel,
    solution: Solution,
    memory: GpuMemory,
    workload: Workload,
    provenance: Provenance,
) -> Plan:
    resident = sum(map(sum, solution.placement)) * model.block_bytes
    return Plan(
        version=2,
        model=model.shape,
        workload=workload,
        gpu_memory_bytes=memory.model_copy(update={"experts": resident}),
        host_memory_bytes=HostMemory(experts=model.all_expert_bytes - resident),
        device=machine.device.kind,
        cpu_threads=machine.cpu.threads,
        cpu_pinned=machine.cpu.pinned,
        prefill_chunk_tokens=prefill_chunk_tokens(workload),
        block_neurons=model.block_neurons,
        stream_share=without_repetition(machine.stream_share) if memory.staging else {1: 0.0},
        resident_blocks=dict(enumerate(solution.placement)),
        predicted=predict(cost, solution),
        bytes_per_s=rates(machine),
        provenance=provenance,
    )


def without_repetition(share: dict[int, float]) -> dict[int, float]:
    """The same piecewise linear function without the entries inside its level stretches."""
    points = sorted(share)
    inside = [b for a, b, c in zip(points, points[1:], points[2:], strict=False) if share[a] == share[b] == share[c]]
    return {tokens: share[tokens] for tokens in points if tokens not in inside}


def predict(cost: CostModel, solution: Solution) -> Predicted:
    return Predicted(
        decode_tokens_per_s=round(1 / cost.decode_step_s(solution.placement), 3),
        ttft_s=round(cost.ttft_s(solution.placement), 4),
        gpu_hit_rate=round(cost.hit_rate(solution.placement), 4),
        bound_tokens_per_s=round(1 / solution.decode_bound_s, 3),
        gap=round(solution.gap, 6),
    )


def rates(machine: MachineProfile) -> Rates:
    def rate(times: Times) -> float:
        return float(round(machine.shape.expert_bytes / seconds_at(times, 1)))

    return Rates(
        resident=rate(machine.device_expert_us),
        link=machine.h2d_bytes_per_s,
        cpu=rate(machine.cpu_expert_us),
        absent=rate(machine.best_absent_us),
    )
