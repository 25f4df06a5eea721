"""Solution -> Plan: turns what the solver chose into the plain numbers that the runtime executes."""

from dataclasses import replace
from typing import Literal

from fiddler_opt.cost import Policy
from fiddler_opt.ilp import Solution, decode_bound_s
from fiddler_opt.machine import MachineProfile, Times, seconds_at
from fiddler_opt.problem import Problem
from fiddler_opt.routing import Routing
from fiddler_run.plan import HostMemory, Plan, Predicted, Provenance, Rates

GB = 10**9


def lower(problem: Problem, solution: Solution, policy: Policy, predicted: Predicted, provenance: Provenance) -> Plan:
    model, machine, placement, memory = problem.model, problem.machine, solution.placement, problem.memory()
    resident, on_disk = (sum(map(sum, rows)) * model.block_bytes for rows in (placement.resident, placement.on_disk))
    embedding = model.embedding_bytes * placement.host_embedding
    gpu = {"experts": resident, "non_expert_weights": memory.non_expert_weights - embedding}
    return Plan(
        version=2,
        model=model.shape,
        workload=problem.workload,
        gpu_memory_bytes=memory.model_copy(update=gpu),
        host_memory_bytes=HostMemory(experts=model.all_expert_bytes - resident - on_disk, embedding=embedding),
        disk_bytes=on_disk,
        device=machine.device.kind,
        cpu_threads=machine.cpu.threads,
        cpu_pinned=machine.cpu.pinned,
        prefill_chunk_tokens=problem.chunk_tokens,
        block_neurons=model.block_neurons,
        stream_share=without_repetition(stream_share(machine, policy)) if memory.staging else {1: 0.0},
        resident_blocks=dict(enumerate(placement.resident)),
        disk_blocks=dict(enumerate(placement.on_disk)) if on_disk else {},
        predicted=predicted,
        bytes_per_s=rates(machine),
        provenance=provenance,
    )


def stream_share(machine: MachineProfile, policy: Policy) -> dict[int, float]:
    """By tokens of an expert: the share of its absent blocks that the policy sends over the link."""
    if policy == "together":
        return machine.stream_share
    if policy == "better":
        times = machine.absent_expert_us
        return {t: float(0.0 not in row or row.get(1.0, float("inf")) < row[0.0]) for t, row in times.items()}
    return {1: float(policy == "link")}


def without_repetition(share: dict[int, float]) -> dict[int, float]:
    """The same piecewise linear function without the entries inside its level stretches."""
    points = sorted(share)
    inside = [b for a, b, c in zip(points, points[1:], points[2:], strict=False) if share[a] == share[b] == share[c]]
    return {tokens: share[tokens] for tokens in points if tokens not in inside}


def predict(problem: Problem, routing: Routing, solution: Solution, policy: Policy) -> Predicted:
    """What to expect of a solution under `routing`. Regret and alternatives are left empty."""
    cost, placement, room = problem.cost(routing, policy), solution.placement, problem.room()
    best, more = problem.cost(routing), replace(room, gpu_bytes=room.gpu_bytes + GB)
    with_more = best.decode_tokens_per_s(decode_bound_s(best, more)) - best.decode_tokens_per_s(solution.decode_bound_s)
    rate = rounded(cost.decode_tokens_per_s(cost.decode_step_s(placement)), 3)
    bound = rounded(best.decode_tokens_per_s(solution.decode_bound_s), 3)
    return Predicted(
        decode_tokens_per_s=rate,
        ttft_s=to_tenths_of_a_millisecond(cost.ttft_s(placement)),
        gpu_hit_rate=round(cost.hit_rate(placement), 4),
        bound_tokens_per_s=max(bound, rate),  # equal up to the solver's tolerance
        gap=round(solution.gap, 6),
        decode_ms=milliseconds(cost.step_parts(cost.decode, placement)),
        ttft_ms=milliseconds(cost.ttft_parts(placement)),
        binding=binding(problem, solution),
        next_gb_tokens_per_s=round(max(0.0, with_more), 3),
        regret={},
        alternatives={},
    )


def rounded(value: float, digits: int) -> float:
    """Rounded, unless that would leave nothing of it."""
    return round(value, digits) or value


def to_tenths_of_a_millisecond(seconds: float) -> float:
    """At least one: nothing takes no time."""
    return max(round(seconds, 4), 1e-4)


def milliseconds(parts: dict[str, float]) -> dict[str, float]:
    return {name: round(seconds * 1e3, 3) for name, seconds in parts.items() if seconds}


def binding(problem: Problem, solution: Solution) -> Literal["GPU memory", "GPU and host memory", "host memory", "nothing"]:
    """Of which budgets more would be used: nothing if all blocks are resident, or the solver left room."""
    placement, room = solution.placement, problem.room()
    everything = problem.model.all_expert_bytes // problem.model.block_bytes
    resident = sum(map(sum, placement.resident))
    embedding_bytes = 0 if placement.host_embedding else room.embedding_bytes
    full = room.gpu_bytes - embedding_bytes - resident * room.block_bytes < room.block_bytes and resident < everything
    spilt = any(map(any, placement.on_disk))
    names = {(True, True): "GPU and host memory", (True, False): "GPU memory", (False, True): "host memory"}
    return names.get((full and problem.budget.gpu_bytes > 0, spilt), "nothing")


def rates(machine: MachineProfile) -> Rates:
    def rate(times: Times) -> float:
        return float(rounded(machine.shape.expert_bytes / seconds_at(times, 1), 0))

    return Rates(
        resident=rate(machine.device_expert_us),
        link=machine.h2d_bytes_per_s,
        cpu=rate(machine.cpu_expert_us),
        absent=rate(machine.best_absent_us),
    )
