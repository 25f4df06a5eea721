"""Lowers a solution to the plain numbers that the runtime executes."""

from fiddler_opt.inputs.machine import MachineProfile, Times, seconds_at
from fiddler_opt.solve.ilp import Solution
from fiddler_opt.solve.predict import rounded
from fiddler_opt.solve.problem import Problem
from fiddler_opt.solve.times import Policy
from fiddler_run.plan.prediction import Predicted, Provenance, Rates
from fiddler_run.plan.rank import HostMemory, Rank
from fiddler_run.plan.schema import Plan


def lower(
    problem: Problem, solution: Solution, predicted: Predicted, provenance: dict[str, str]
) -> Plan:
    """The plan of a solution.

    Args:
        provenance: all keys but the solver's.
    """
    return Plan(
        version=3,
        model=problem.model.shape,
        encoding=problem.model.encoding,
        workload=problem.workload,
        budget=problem.budget,
        prefill_chunk_tokens=problem.chunk_tokens,
        block_neurons=problem.model.block_neurons,
        ranks=[rank_of(problem, solution, number) for number in range(problem.machine.num_ranks)],
        predicted=predicted,
        bytes_per_s=rates(problem.machine),
        provenance=Provenance(
            **provenance,
            solver="HiGHS",
            status=solution.status,
            solve_s=round(solution.solve_s, 2),
        ),
    )


def rank_of(problem: Problem, solution: Solution, number: int) -> Rank:
    """The part of rank `number`. Only the first has blocks on disk and the embedding table."""
    model = problem.model
    machine = problem.machine.rank_profile(number)
    placement = solution.placement
    memory = problem.memory(number)
    resident = placement.resident_by_rank[number]
    host = placement.host_rows(number, model.blocks_per_expert)
    resident_bytes, host_bytes = (
        sum(map(sum, rows)) * model.block_bytes for rows in (resident, host)
    )
    disk_bytes = 0 if number else placement.num_on_disk * model.block_bytes
    several = problem.machine.num_ranks > 1
    share = {1: 0.0}
    if memory.staging:
        share = without_repetition(stream_share(machine, solution.policy))
    return Rank(
        machine=problem.machine.other_ranks[number - 1].machine if number else 0,
        device=machine.device.kind,
        gpu_memory_bytes=memory.model_copy(update={"experts": resident_bytes}),
        host_memory_bytes=HostMemory(
            experts=host_bytes, embedding=0 if number else problem.host_embedding_bytes
        ),
        disk_bytes=disk_bytes,
        cpu_threads=machine.cpu.threads,
        cpu_pinned=machine.cpu.pinned,
        stream_share=share,
        resident_blocks=dict(enumerate(resident)),
        host_blocks=dict(enumerate(host)) if several else {},
        disk_blocks=dict(enumerate(placement.on_disk)) if disk_bytes else {},
    )


def stream_share(machine: MachineProfile, policy: Policy) -> dict[int, float]:
    """The share of an expert's host blocks that the policy streams, by tokens that chose it."""
    if policy == "together":
        return machine.stream_share
    if policy == "better":
        times = machine.host_expert_us
        return {
            t: float(0.0 not in row or row.get(1.0, float("inf")) < row[0.0])
            for t, row in times.items()
        }
    return {1: float(policy == "link")}


def without_repetition(share: dict[int, float]) -> dict[int, float]:
    """Drops redundant points of a piecewise-linear table, inside its level stretches."""
    points = sorted(share)
    inside = [
        b
        for a, b, c in zip(points, points[1:], points[2:], strict=False)
        if share[a] == share[b] == share[c]
    ]
    return {tokens: share[tokens] for tokens in points if tokens not in inside}


def rates(machine: MachineProfile) -> Rates:
    def rate(times: Times) -> float:
        return float(rounded(machine.shape.expert_bytes / seconds_at(times, 1), 0))

    return Rates(
        resident=rate(machine.resident_expert_us),
        link=machine.h2d_bytes_per_s,
        cpu=rate(machine.cpu_expert_us),
        host=rate(machine.best_host_us),
    )
