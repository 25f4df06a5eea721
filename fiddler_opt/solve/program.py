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

Experts of a layer that are equal in every scenario share an r and a d, which are named after the
first of them and bounded by the blocks of all. Where nothing overlaps, t is the sum of the right
sides of (A) and (B). Without a limit on host memory, d = 0 and (E), (F) are left out. For several
routings, the longest of their objectives is minimised. A small reward for resident blocks of
popular experts, POPULARITY_WEIGHT, fills memory where the objective is flat; the relaxation omits
it.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import highspy
import pulp

from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.equal import equal_experts, spread
from fiddler_opt.solve.phases import Phase
from fiddler_opt.solve.placement import MemoryLimits, Placement
from fiddler_opt.solve.scenarios import Scenario
from fiddler_opt.solve.solver import Solver
from fiddler_opt.solve.time_unit import time_unit

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
        layers = range(len(self._cost.called))
        self._groups = [equal_experts(costs, list(steps), layer) for layer in layers]
        self.r = self._variables("r")
        limited = limits.host_bytes is not None
        self.d = self._variables("d") if limited else [{} for _ in layers]
        self._set_objective(costs, limits, steps)
        resident = pulp.lpSum(r for row in self.r for r in row.values())
        self._gpu_limit = resident <= limits.gpu_bytes / limits.block_bytes
        self.lp += self._gpu_limit  # (D)
        if limited:
            on_disk = pulp.lpSum(d for row in self.d for d in row.values())
            all_blocks = self._cost.blocks_per_expert * sum(map(len, self._cost.called))
            host = all_blocks - resident - on_disk
            self.lp += host <= limits.host_bytes / limits.block_bytes  # (E)
            for resident_row, disk_row in zip(self.r, self.d, strict=True):
                for expert, r in resident_row.items():
                    self.lp += r + disk_row[expert] <= r.upBound  # (F)

    def solve(self, time_limit_s: float | None = None) -> str:
        """Solves the program. Returns the status in words.

        Raises:
            FiddlerError: the solver failed.
        """
        presolve = not any(self.d)  # with (F), it may take ten times as long as the rest
        return Solver(self._constant, presolve, time_limit_s).run(self.lp)

    def solve_again(self, limits: MemoryLimits) -> str:
        """Solves the solved relaxation for other GPU memory, from its present solution."""
        solver = self.lp.solverModel
        gpu_blocks = limits.gpu_bytes / limits.block_bytes
        solver.changeRowBounds(self._gpu_limit.index, -highspy.kHighsInf, gpu_blocks)
        solver.run()
        return solver.modelStatusToString(solver.getModelStatus()).lower()

    @property
    def is_solved(self) -> bool:
        return all(r.varValue is not None for row in self.r for r in row.values())

    @property
    def objective_s(self) -> float:
        return (self.lp.solverModel.getObjectiveValue() + self._constant) / self._unit

    @property
    def bound_s(self) -> float:
        """A lower bound on the seconds of `steps` for any placement."""
        return (self.lp.solverModel.getInfo().mip_dual_bound + self._constant) / self._unit

    def placement(self) -> Placement:
        """The placement in the solution."""
        resident = [[0] * len(row) for row in self._cost.called]
        on_disk = [[0] * len(row) for row in self._cost.called]
        for layer, groups in enumerate(self._groups):
            for experts in groups:
                first = experts[0]
                in_gpu = round(self.r[layer][first].varValue)
                not_in_host = in_gpu
                if self.d[layer]:
                    not_in_host += round(self.d[layer][first].varValue)
                counts = (spread(blocks, len(experts)) for blocks in (in_gpu, not_in_host))
                for expert, gpu, both in zip(experts, *counts, strict=True):
                    resident[layer][expert] = gpu
                    on_disk[layer][expert] = both - gpu
        return Placement(resident, on_disk)

    def text(self) -> str:
        """The program in LP format."""
        with tempfile.TemporaryDirectory() as folder:  # PuLP only writes to files
            path = Path(folder) / "program.lp"
            self.lp.writeLP(str(path))
            return path.read_text()

    def _variables(self, name: str) -> list[dict[int, pulp.LpVariable]]:
        """A variable for each group of equal experts, by layer and the group's first expert."""
        blocks = self._cost.blocks_per_expert
        category = pulp.LpContinuous if self._relaxed else pulp.LpInteger
        return [
            {
                experts[0]: pulp.LpVariable(
                    f"{name}_{layer}_{experts[0]}", 0, blocks * len(experts), category
                )
                for experts in groups
            }
            for layer, groups in enumerate(self._groups)
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
        return pulp.LpAffineExpression(
            [
                (r, weight * (called[expert] + mean))
                for row, called in zip(self.r, cost.called, strict=True)
                for expert, r in row.items()
            ]
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
        resident = [(r[e], per_block * s) for e, s in scenario.resident_s.items() if e in r]
        host = [(r[e], -per_block * s) for e, s in scenario.host_s.items() if e in r]
        host += [
            (d[e], per_block * (scenario.disk_s[e] - s))
            for e, s in scenario.host_s.items()
            if e in d
        ]
        all_in_host = self._unit * sum(scenario.host_s.values())
        return pulp.LpAffineExpression(resident), pulp.LpAffineExpression(host, all_in_host)
