"""The integer program: where weights lie, so that the workload takes the least time within the budgets of GPU and host memory.

Variables
    r[l,e]    integer, 0 .. blocks: blocks of expert e in layer l that are resident, in GPU memory
    d[l,e]    integer, 0 .. blocks: its blocks on disk; the others are in host memory
    x         0 or 1: whether the embedding table is in GPU memory
    t[p,l,s]  seconds of layer l's experts in scenario s of phase p

Minimise    sum over p of  steps(p) * [ (1 - x) * embedding(p) + sum over l, s of probability(s) * t[p,l,s] ]         (objective)
subject to  t[p,l,s] >= sum over e called in s of  resident_s(e) * r / blocks                                                 (A)
            t[p,l,s] >= sum over e called in s of  absent_s(e) * (blocks - r - d) / blocks + disk_s(e) * d / blocks           (B)
            t[p,l,s] >= queueing(p)                                                                                           (C)
            sum over l, e of r[l,e] * block_bytes + x * embedding_bytes <= gpu_bytes                                          (D)
            sum over l, e of (blocks - r - d) * block_bytes + (1 - x) * embedding_bytes <= host_bytes                         (E)
            r[l,e] + d[l,e] <= blocks                                                                                         (F)

Where nothing overlaps, t is the sum of the right sides of (A) and (B). Without a limit on host memory d = 0, and (E), (F) fall
away. For several routings at once (`robust`) the longest of their objectives is minimised.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, isfinite, log10
from pathlib import Path

import highspy
import pulp

from fiddler_opt.cost import CostModel, Phase, Placement, Scenario
from fiddler_run.errors import FiddlerError
from fiddler_run.files import reason, write_whole

RELATIVE_GAP = 1e-4
# Where experts are alike, exchanging them gives as many solutions that are equally good, and the bound's last steps take
# minutes. So the gap that will do grows with the square of the seconds spent: 0.01 % after one, 0.25 % after five.
MAX_GAP = 0.004
TIE = 1e-9  # times that differ by less are equal
MS = 1e3
FEASIBILITY_TOLERANCE = 1e-6  # HiGHS's, absolute


@dataclass(frozen=True)
class Room:
    """Bytes for what the program places. `host_bytes` None: no limit; `embedding_bytes` 0: the embedding is not to be moved."""

    block_bytes: int
    gpu_bytes: int
    host_bytes: int | None = None
    embedding_bytes: int = 0


@dataclass(frozen=True)
class Solution:
    """`objective_s` and `bound_s`: seconds of the whole workload, for this placement and at best for any within the budgets.

    `decode_bound_s`: seconds of one decode step at best, for a placement within the budgets made for decode alone.
    """

    placement: Placement
    objective_s: float
    bound_s: float
    decode_bound_s: float
    status: str
    solve_s: float

    @property
    def gap(self) -> float:
        return max(0.0, (self.objective_s - self.bound_s) / self.objective_s)


def place(
    costs: Sequence[CostModel],
    room: Room,
    time_limit_s: float = 60.0,
    emit: str | None = None,
    known: Sequence[Placement] = (),
) -> Solution:
    """Solves the program above.

    Args:
        emit: also writes it there, in the LP format.
        known: placements within the budgets, than which the solution is not worse.

    Raises:
        FiddlerError: the solver ended without a placement.
    """
    started = time.perf_counter()
    steps = {phase: phase.steps for phase in costs[0].phases}
    program = Program(costs, room, steps, pulp.LpInteger)
    if emit is not None:
        write_whole(emit, lp_text(program.lp))
    status = program.solve(time_limit_s)
    if status not in ("optimal", "stopped early", "time limit") or not program.is_solved:
        raise FiddlerError(f"the solver found no placement in {time_limit_s:.0f} s (status: {status}); give it more room or time")

    def longest_s(placement: Placement) -> float:
        return max(cost.total_s(placement) for cost in costs)

    solved = program.placement()
    starts = (*simple_starts(costs[0], room, solved), *known, solved)
    found = [fill_leftover(costs, room, start) for start in starts]
    least_s = min(map(longest_s, found))
    placement = next(each for each in found if longest_s(each) <= least_s * (1 + TIE))
    objective_s = longest_s(placement)
    return Solution(
        placement=placement,
        objective_s=objective_s,
        bound_s=min(objective_s, program.bound_s),
        decode_bound_s=max(decode_bound_s(cost, room) for cost in costs),
        status=status,
        solve_s=time.perf_counter() - started,
    )


def lp_text(program: pulp.LpProblem) -> str:
    """The program in the LP format."""
    with tempfile.TemporaryDirectory() as folder:  # PuLP writes to files only
        path = Path(folder) / "program.lp"
        program.writeLP(str(path))
        return path.read_text()


def simple_starts(cost: CostModel, room: Room, solved: Placement) -> list[Placement]:
    """What is preferred where it is as good as the solution, which may be any of many: all experts alike, which routing that
    turns out otherwise hurts least, and nothing, to be filled by popularity."""
    if room.host_bytes is not None:
        return []
    nothing = [[0] * len(row) for row in cost.called]
    each, more = divmod(sum(map(sum, solved.resident)), sum(map(len, nothing)))
    alike = [[each] * len(row) for row in nothing]
    for layer, expert in by_popularity(cost)[:more]:
        alike[layer][expert] += 1
    return [Placement(resident, nothing, solved.host_embedding) for resident in (alike, nothing)]


def by_popularity(cost: CostModel) -> list[tuple[int, int]]:
    """(layer, expert), those that decode calls most first."""
    order = sorted((-chance, layer, expert) for layer, row in enumerate(cost.called) for expert, chance in enumerate(row))
    return [(layer, expert) for _, layer, expert in order]


def decode_bound_s(cost: CostModel, room: Room) -> float:
    """Seconds below which no placement within the budgets brings a decode step."""
    return relaxed_s([cost], room, {cost.decode: 1})


def relaxed_s(costs: Sequence[CostModel], room: Room, steps: dict[Phase, int]) -> float:
    """Seconds of those steps at best if blocks could be divided: the program's relaxation.

    Raises:
        FiddlerError: there is no placement within the budgets, or the solver fails.
    """
    program = Program(costs, room, steps, pulp.LpContinuous)
    status = program.solve()
    if status != "optimal":
        raise FiddlerError(
            f"the solver found no placement in this memory (status: {status}); give more with --gpu-mem or --host-mem"
        )
    return program.objective_s


def time_unit(costs: Sequence[CostModel], steps: dict[Phase, int]) -> float:
    """What the program's times are multiplied by, from seconds.

    Milliseconds, unless the solver's absolute tolerance would then be too coarse for a layer's
    time, or the numbers too large for it: then a power of ten that makes that time 1 to 10.
    """

    def layer_s(cost: CostModel, phase: Phase) -> float:
        scenarios = (each for layer in cost.scenarios[phase.name] for each in layer)
        return max((sum(each.absent_s.values()) for each in scenarios), default=0.0)

    times = [(count * layer_s(cost, phase), layer_s(cost, phase)) for cost in costs for phase, count in steps.items()]
    _, longest_s = max(times, default=(0.0, 0.0))
    if longest_s <= 0 or FEASIBILITY_TOLERANCE / RELATIVE_GAP <= MS * longest_s <= 1e5:
        return MS
    return 10.0 ** -floor(log10(longest_s))


class _Solver(pulp.HiGHS):
    """HiGHS with the objective's constant, which PuLP keeps to itself: gaps are relative to the whole."""

    def callSolver(self, lp: pulp.LpProblem) -> None:
        lp.solverModel.changeObjectiveOffset(lp.objective.constant)
        super().callSolver(lp)


class Program:
    """The program for the given steps of each phase; `unit`: what its times are multiples of, per second."""

    def __init__(self, costs: Sequence[CostModel], room: Room, steps: dict[Phase, int], category: str):
        self.lp, self._cost = pulp.LpProblem("placement", pulp.LpMinimize), costs[0]
        self._unit = time_unit(costs, steps)
        blocks, sizes = self._cost.blocks_per_expert, [len(row) for row in self._cost.called]

        def rows(name: str, most: int) -> list[list[pulp.LpVariable]]:
            return [
                [pulp.LpVariable(f"{name}_{layer}_{expert}", 0, most, category) for expert in range(size)]
                for layer, size in enumerate(sizes)
            ]

        limited = room.host_bytes is not None
        self.r = rows("r", blocks)
        self.d = rows("d", blocks) if limited else [[0] * size for size in sizes]
        self.x = pulp.LpVariable("x", 0, 1, category) if room.embedding_bytes else 1
        objectives = [pulp.lpSum(self._objective(number, cost, steps)) for number, cost in enumerate(costs)]
        # What no placement changes would only blunt the solver's relative gap, unless several routings differ in it.
        fixed = [
            self._unit * sum(count * sum(cost.fixed_s[phase.name].values()) for phase, count in steps.items()) for cost in costs
        ]
        if len(costs) == 1:
            self.lp += objectives[0]
            self._missing = fixed[0]
        else:
            longest = pulp.LpVariable("longest", 0)
            self.lp += longest
            for objective, constant in zip(objectives, fixed, strict=True):
                self.lp += longest >= objective + constant
            self._missing = 0.0
        embedding = room.embedding_bytes / room.block_bytes  # (D) and (E) count in blocks
        resident = pulp.lpSum(variable for row in self.r for variable in row)
        self.lp += resident + self.x * embedding <= room.gpu_bytes / room.block_bytes  # (D)
        if limited:
            on_disk = pulp.lpSum(variable for row in self.d for variable in row)
            absent = blocks * sum(sizes) - resident - on_disk
            self.lp += absent + (1 - self.x) * embedding <= room.host_bytes / room.block_bytes  # (E)
            for of_resident, of_disk in zip(self.r, self.d, strict=True):
                for r, d in zip(of_resident, of_disk, strict=True):
                    self.lp += r + d <= blocks  # (F)

    def solve(self, time_limit_s: float | None = None) -> str:
        """Solves the program; how that ended, in words.

        Raises:
            FiddlerError: the solver broke down.
        """
        interrupt = highspy.cb.HighsCallbackType.kCallbackMipInterrupt
        solver = _Solver(
            msg=False,
            gapRel=RELATIVE_GAP,
            timeLimit=time_limit_s,
            callbackTuple=(self._stop_when_close, None),
            callbacksToActivate=[interrupt],
        )
        try:
            self.lp.solve(solver)
        except Exception as error:  # whatever HiGHS and PuLP raise on numbers that they cannot handle
            raise FiddlerError(f"the solver failed ({reason(error)}); look for absurd times in the machine profile") from None
        if self.lp.sol_status == pulp.LpSolutionIntegerFeasible:
            ended = self.lp.solverModel.getModelStatus()
            return "stopped early" if ended == highspy.HighsModelStatus.kInterrupt else "time limit"
        return "optimal" if self.lp.sol_status == pulp.LpSolutionOptimal else pulp.LpSolution[self.lp.sol_status]

    def _stop_when_close(self, kind, message, found, answer, _) -> None:
        """HiGHS's callback: ends the search early where it takes long and is good enough."""
        if isfinite(found.mip_primal_bound):
            enough = min(RELATIVE_GAP * found.running_time**2, MAX_GAP)
            whole = found.mip_primal_bound + self._missing
            if found.running_time > 1 and found.mip_primal_bound - found.mip_dual_bound <= enough * whole:
                answer.user_interrupt = True

    @property
    def is_solved(self) -> bool:
        return all(variable.varValue is not None for row in self.r for variable in row)

    @property
    def objective_s(self) -> float:
        return (self.lp.objective.value() + self._missing) / self._unit

    @property
    def bound_s(self) -> float:
        """Seconds below which no placement brings the steps."""
        return (self.lp.solverModel.getInfo().mip_dual_bound + self._missing) / self._unit

    def placement(self) -> Placement:
        """The solution's."""
        resident = [[round(variable.varValue) for variable in row] for row in self.r]
        on_disk = [[round(pulp.value(variable)) for variable in row] for row in self.d]
        return Placement(resident, on_disk, host_embedding=round(pulp.value(self.x)) == 0)

    def _objective(self, number: int, cost: CostModel, steps: dict[Phase, int]):
        for p, (phase, count) in enumerate(steps.items()):
            yield count * self._unit * cost.host_embedding_s[phase.name] * (1 - self.x)
            for layer, scenarios in enumerate(cost.scenarios[phase.name]):
                for s, scenario in enumerate(scenarios):
                    resident, absent = self._both_sides(cost, scenario, layer)
                    if cost.overlap:
                        t = pulp.LpVariable(f"t_{number}_{p}_{layer}_{s}", self._unit * cost.queueing_s[phase.name])  # (C)
                        self.lp += t >= resident  # (A)
                        self.lp += t >= absent  # (B)
                        yield count * scenario.probability * t
                    else:
                        yield count * scenario.probability * (resident + absent)

    def _both_sides(self, cost: CostModel, scenario: Scenario, layer: int):
        """The right sides of (A) and (B) in the program's unit."""
        blocks, r, d = cost.blocks_per_expert, self.r[layer], self.d[layer]
        resident = pulp.lpSum(self._unit * seconds / blocks * r[e] for e, seconds in scenario.resident_s.items())
        absent = pulp.lpSum(self._unit * seconds / blocks * (blocks - r[e] - d[e]) for e, seconds in scenario.absent_s.items())
        if any(isinstance(variable, pulp.LpVariable) for variable in d):
            absent += pulp.lpSum(self._unit * seconds / blocks * d[e] for e, seconds in scenario.disk_s.items())
        return resident, absent


def fill_leftover(costs: Sequence[CostModel], room: Room, placement: Placement) -> Placement:
    """Gives GPU memory that the solver left free to the most used experts where that costs nothing.

    The solver stops at its gap, and does not care where the objective is flat; memory left empty serves nobody.
    """
    blocks = costs[0].blocks_per_expert
    resident = [list(row) for row in placement.resident]
    embedding_bytes = 0 if placement.host_embedding else room.embedding_bytes
    left = (room.gpu_bytes - embedding_bytes) // room.block_bytes - sum(map(sum, resident))
    for layer, expert in by_popularity(costs[0]):
        row, on_disk = resident[layer], placement.on_disk[layer]
        added = min(left, blocks - row[expert] - on_disk[expert])
        if added <= 0:
            continue
        fuller = [*row[:expert], row[expert] + added, *row[expert + 1 :]]
        if all(cost.layer_s(layer, fuller, on_disk) <= cost.layer_s(layer, row, on_disk) * (1 + 1e-12) for cost in costs):
            resident[layer], left = fuller, left - added
    return Placement(resident, placement.on_disk, placement.host_embedding)
