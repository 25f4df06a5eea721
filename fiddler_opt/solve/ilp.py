"""Solves the integer program: the best placement, and bounds for any placement."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.equal import spread_places
from fiddler_opt.solve.phases import Phase
from fiddler_opt.solve.placement import MemoryLimits, Placement, Rows, Share
from fiddler_opt.solve.program import Program
from fiddler_opt.solve.times import Policy
from fiddler_run.errors import FiddlerError

SOLVED = ("optimal", "stopped early", "time limit")
EQUAL = 1 + 1e-9  # times within this ratio are equal
RANKS_TIME_LIMIT_S = 30.0  # for several ranks, whose rounded relaxation is good already


@dataclass(frozen=True)
class Solution:
    """A placement and its quality.

    `objective_s` is the workload's time in seconds for this placement, `bound_s` a lower bound for
    any placement within the limits.
    """

    placement: Placement
    objective_s: float
    bound_s: float
    status: str
    solve_s: float
    policy: Policy = "together"

    @property
    def gap(self) -> float:
        return max(0.0, (self.objective_s - self.bound_s) / self.objective_s)


def place(
    costs: Sequence[CostModel],
    limits: MemoryLimits,
    time_limit_s: float = 60.0,
    known: Sequence[Placement] = (),
) -> Solution:
    """The placement that minimises the longest workload time over `costs`.

    Args:
        known: placements within the limits. The solution is at least as good as each of them.

    Raises:
        FiddlerError: the solver ended without a placement.
    """
    started = time.perf_counter()
    program = workload_program(costs, limits)
    start, relaxed_bound_s = rounded_relaxation(costs, limits) if limits.others else (None, 0.0)
    if start is not None:
        known = [*known, start]
        time_limit_s = min(time_limit_s, RANKS_TIME_LIMIT_S)
    status = program.solve(time_limit_s, start)
    found = list(known)
    if status in SOLVED and program.is_solved:
        solved = program.placement()
        found.append(solved)
        if limits.host_bytes is None:
            found.insert(0, uniform(costs[0], solved))
    elif start is None:
        raise FiddlerError(
            f"the solver found no placement in {time_limit_s:.0f} s (status: {status}); give it"
            " more memory or time"
        )

    def longest_s(placement: Placement) -> float:
        return max(cost.total_s(placement) for cost in costs)

    timed = [(each, longest_s(each)) for each in found]
    least_s = min(seconds for _, seconds in timed)
    equal = [each for each in timed if each[1] <= least_s * EQUAL]
    placement, objective_s = max(equal, key=lambda each: round(costs[0].hit_rate(each[0]), 9))
    return Solution(
        placement=placement,
        objective_s=objective_s,
        bound_s=min(objective_s, max(relaxed_bound_s, program.bound_s)),
        status=status,
        solve_s=time.perf_counter() - started,
    )


def workload_program(costs: Sequence[CostModel], limits: MemoryLimits) -> Program:
    """The program over all phases of a workload."""
    return Program(costs, limits, {phase: phase.steps for phase in costs[0].phases})


def rounded_relaxation(
    costs: Sequence[CostModel], limits: MemoryLimits
) -> tuple[Placement | None, float]:
    """The rounded solution of the relaxation, and the relaxation's seconds, a lower bound.

    The solution is None if host memory is limited. It spares the solver the search for a first one,
    which may take a minute for several ranks.
    """
    program = Program(costs, limits, {phase: phase.steps for phase in costs[0].phases}, True)
    if program.solve() != "optimal":
        return None, 0.0
    limited = any(each.host_bytes is not None for each in limits.ranks)
    return None if limited else program.blocks.rounded(limits), program.objective_s


def uniform(cost: CostModel, solved: Placement) -> Placement:
    """The placement with as many blocks in each place, but equally many of every expert, to within
    one.

    Among equally good placements, it is the most robust to other routing. Nothing is on disk.
    """
    order = cost.by_popularity()
    shares = [rows for share in solved.others for rows in (share.resident, share.host)]
    counts = [sum(map(sum, rows)) for rows in (solved.resident, *shares)]

    def rows_of(blocks: list[int]) -> Rows:
        rows = [[0] * len(row) for row in cost.called]
        for (layer, expert), count in zip(order, blocks, strict=True):
            rows[layer][expert] = count
        return rows

    resident, *shares = map(rows_of, spread_places(counts, len(order)))
    return Placement.of(resident, tuple(map(Share, shares[::2], shares[1::2])))


def relaxed_s(
    costs: Sequence[CostModel], memories: Sequence[MemoryLimits], steps: dict[Phase, int]
) -> list[float]:
    """Lower bounds on the seconds of `steps`, from the program's linear relaxation.

    Args:
        memories: limits that differ in GPU memory alone. There is a bound for each.

    Raises:
        FiddlerError: no placement is within the limits, or the solver fails.
    """
    program = Program(costs, memories[0], steps, relaxed=True)
    found = []
    for number, limits in enumerate(memories):
        status = program.solve_again(limits) if number else program.solve()
        if status != "optimal":
            raise FiddlerError(
                f"the solver found no placement in this memory (status: {status}); give more with"
                " --gpu-mem or --host-mem"
            )
        found.append(program.objective_s)
    return found
