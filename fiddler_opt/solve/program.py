"""The integer program: the placement within the memory limits that takes the least time.

Variables
    r[l,e]    integer, 0 .. blocks: resident blocks of expert e in layer l
    d[l,e]    integer, 0 .. blocks: its blocks on disk; the others are in host memory
    t[p,l,s]  seconds of layer l's experts in scenario s of phase p

Minimise    sum over p, l, s of  steps(p) * probability(s) * t[p,l,s]                    (objective)
subject to  t[p,l,s] >= sum over e called in s of  resident_s(e) * r / blocks                    (A)
            t[p,l,s] >= sum over e called in s of
                        host_s(e) * (blocks - r - d) / blocks + disk_s(e) * d / blocks           (B)
            t[p,l,s] >= launch_overhead(p)                                                       (C)
            sum over l, e of r[l,e] * block_bytes <= gpu_bytes                                   (D)
            sum over l, e of (blocks - r - d) * block_bytes <= host_bytes                        (E)
            r[l,e] + d[l,e] <= blocks                                                            (F)

Where nothing overlaps, t is the sum of the right sides of (A) and (B). Without a limit on host
memory, d = 0 and (E), (F) are left out. For several routings, the longest of their objectives is
minimised. A small reward for resident blocks of popular experts, POPULARITY_WEIGHT, fills memory
where the objective is flat; the relaxation omits it.
"""

import tempfile
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

import highspy
import pulp

from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.phases import Phase
from fiddler_opt.solve.placement import MemoryLimits, Placement
from fiddler_opt.solve.scenarios import Scenario
from fiddler_opt.solve.time_unit import RELATIVE_GAP, time_unit
from fiddler_run.errors import FiddlerError
from fiddler_run.system.files import reason

# Equal experts can be exchanged, which gives many equally good solutions, and the last steps of the
# bound take minutes. So the accepted gap grows with the cube of the elapsed seconds: 0.01% after
# one second, 0.27% after three.
MAX_GAP = 0.004
# Relative to the workload's time. A smaller reward falls below the solver's tolerance of 1e-7 for
# reduced costs; a larger one loosens the bound.
POPULARITY_WEIGHT = 1e-6


class Program:
    """The program for the given steps of each phase, with integer or continuous variables."""

    def __init__(
        self,
        costs: Sequence[CostModel],
        limits: MemoryLimits,
        steps: dict[Phase, int],
        relaxed: bool = False,
    ):
        self.lp = pulp.LpProblem("placement", pulp.LpMinimize)
        self._cost = costs[0]
        self._unit = time_unit(costs, steps)  # the program's units of time per second
        self._relaxed = relaxed
        blocks = self._cost.blocks_per_expert
        sizes = [len(row) for row in self._cost.called]
        self.r = self._rows("r", sizes)
        limited = limits.host_bytes is not None
        self.d = self._rows("d", sizes) if limited else [[0] * size for size in sizes]
        self._set_objective(costs, limits, steps)
        resident = pulp.lpSum(variable for row in self.r for variable in row)
        self.lp += resident <= limits.gpu_bytes / limits.block_bytes  # (D)
        if limited:
            on_disk = pulp.lpSum(variable for row in self.d for variable in row)
            host = blocks * sum(sizes) - resident - on_disk
            self.lp += host <= limits.host_bytes / limits.block_bytes  # (E)
            for resident_row, disk_row in zip(self.r, self.d, strict=True):
                for r, d in zip(resident_row, disk_row, strict=True):
                    self.lp += r + d <= blocks  # (F)

    def solve(self, time_limit_s: float | None = None) -> str:
        """Solves the program. Returns the status in words.

        Raises:
            FiddlerError: the solver failed.
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
        except Exception as error:  # HiGHS and PuLP raise many types for numbers out of range
            raise FiddlerError(
                f"the solver failed ({reason(error)}); look for absurd times in the machine profile"
            ) from None
        if self.lp.sol_status == pulp.LpSolutionIntegerFeasible:
            ended = self.lp.solverModel.getModelStatus()
            return "stopped early" if ended == highspy.HighsModelStatus.kInterrupt else "time limit"
        if self.lp.sol_status == pulp.LpSolutionOptimal:
            return "optimal"
        return pulp.LpSolution[self.lp.sol_status]

    @property
    def is_solved(self) -> bool:
        return all(variable.varValue is not None for row in self.r for variable in row)

    @property
    def objective_s(self) -> float:
        return (self.lp.objective.value() + self._constant) / self._unit

    @property
    def bound_s(self) -> float:
        """A lower bound on the seconds of `steps` for any placement."""
        return (self.lp.solverModel.getInfo().mip_dual_bound + self._constant) / self._unit

    def placement(self) -> Placement:
        """The placement in the solution."""
        resident = [[round(variable.varValue) for variable in row] for row in self.r]
        on_disk = [[round(pulp.value(variable)) for variable in row] for row in self.d]
        return Placement(resident, on_disk)

    def text(self) -> str:
        """The program in LP format."""
        with tempfile.TemporaryDirectory() as folder:  # PuLP only writes to files
            path = Path(folder) / "program.lp"
            self.lp.writeLP(str(path))
            return path.read_text()

    def _rows(self, name: str, sizes: list[int]) -> list[list[pulp.LpVariable]]:
        most = self._cost.blocks_per_expert
        category = pulp.LpContinuous if self._relaxed else pulp.LpInteger
        return [
            [
                pulp.LpVariable(f"{name}_{layer}_{expert}", 0, most, category)
                for expert in range(size)
            ]
            for layer, size in enumerate(sizes)
        ]

    def _set_objective(
        self, costs: Sequence[CostModel], limits: MemoryLimits, steps: dict[Phase, int]
    ) -> None:
        """Sets the objective.

        For one routing, constants are left out, because they would loosen the solver's relative
        gap. For several, the objective is the longest, including the constants in which they
        differ.
        """
        objectives = [self._objective(number, cost, steps) for number, cost in enumerate(costs)]
        constants = [
            self._unit
            * sum(count * sum(cost.fixed_s[phase.name].values()) for phase, count in steps.items())
            for cost in costs
        ]
        reward = 0.0 if self._relaxed else self._popularity_reward(limits)
        if len(costs) == 1:
            self.lp += objectives[0] - reward
            self._constant = constants[0]
            return
        longest = pulp.LpVariable("longest", 0)
        self.lp += longest - reward
        for objective, constant in zip(objectives, constants, strict=True):
            self.lp += longest >= objective + constant
        self._constant = 0.0

    def _popularity_reward(self, limits: MemoryLimits) -> pulp.LpAffineExpression:
        """A reward for each resident block that grows with its expert's probability to be called.

        The mean probability is added, so that experts that are never called get a reward too. The
        rewards add up to POPULARITY_WEIGHT of the time of simple placements.
        """
        cost = self._cost
        chances = [chance for row in cost.called for chance in row]
        mean = sum(chances) / len(chances)
        blocks = cost.blocks_per_expert
        alike = min(blocks, max(0.0, limits.gpu_bytes / limits.block_bytes / len(chances)))
        simple_s = min(
            cost.total_s(Placement.of([[count] * len(row) for row in cost.called]))
            for count in (0, alike)
        )
        weight = POPULARITY_WEIGHT * self._unit * simple_s / (2 * mean * len(chances) * blocks)
        variables = [r for row in self.r for r in row]
        return pulp.LpAffineExpression(
            [(r, weight * (chance + mean)) for r, chance in zip(variables, chances, strict=True)]
        )

    def _objective(
        self, number: int, cost: CostModel, steps: dict[Phase, int]
    ) -> pulp.LpAffineExpression:
        """The objective for one routing. Adds its constraints (A), (B) and (C)."""
        objective = pulp.LpAffineExpression()
        for p, (phase, count) in enumerate(steps.items()):
            overhead = self._unit * cost.launch_overhead_s[phase.name]
            for layer, scenarios in enumerate(cost.scenarios[phase.name]):
                for s, scenario in enumerate(scenarios):
                    weight = count * scenario.probability
                    resident, host = self._right_sides(cost, scenario, layer)
                    if cost.overlap:
                        t = pulp.LpVariable(f"t_{number}_{p}_{layer}_{s}", overhead)  # (C)
                        objective.addterm(t, weight)
                        for side in (resident, host):
                            side.addterm(t, -1)
                            self.lp += side <= 0  # (A), (B)
                    else:
                        objective.addInPlace(weight * (resident + host))
        return objective

    def _right_sides(
        self, cost: CostModel, scenario: Scenario, layer: int
    ) -> tuple[pulp.LpAffineExpression, pulp.LpAffineExpression]:
        """The right sides of (A) and (B), in the program's unit."""
        per_block = self._unit / cost.blocks_per_expert
        r = self.r[layer]
        d = self.d[layer]
        resident = [(r[e], per_block * s) for e, s in scenario.resident_s.items()]
        host = [(r[e], -per_block * s) for e, s in scenario.host_s.items()]
        if any(isinstance(variable, pulp.LpVariable) for variable in d):
            host += [
                (d[e], per_block * (scenario.disk_s[e] - s)) for e, s in scenario.host_s.items()
            ]
        all_in_host = self._unit * sum(scenario.host_s.values())
        return pulp.LpAffineExpression(resident), pulp.LpAffineExpression(host, all_in_host)

    def _stop_when_close(self, kind, message, found, answer, _) -> None:
        """A HiGHS callback that ends a long search once the solution is good enough."""
        if not isfinite(found.mip_primal_bound) or found.running_time <= 1:
            return
        accepted = min(RELATIVE_GAP * found.running_time**3, MAX_GAP)
        whole = found.mip_primal_bound + self._constant
        if found.mip_primal_bound - found.mip_dual_bound <= accepted * whole:
            answer.user_interrupt = True


class _Solver(pulp.HiGHS):
    """HiGHS with the objective's constant, which PuLP drops, so that gaps refer to the whole."""

    def callSolver(self, lp: pulp.LpProblem) -> None:
        lp.solverModel.changeObjectiveOffset(lp.objective.constant)
        super().callSolver(lp)
