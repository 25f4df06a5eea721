"""The integer program: the placement within the memory limits that takes the least time.

Variables
    r[k,l,e]  integer, 0 .. blocks: resident blocks of expert e in layer l, in rank k
    h[k,l,e]  integer, 0 .. blocks: its blocks in the host memory of rank k, for k >= 1
    d[l,e]    integer, 0 .. blocks: its blocks on the disk of rank 0
    t[p,l,s]  seconds of layer l's experts in scenario s of phase p

The other blocks are in the host memory of rank 0:
    h[0,l,e] = blocks - d[l,e] - sum over k of r[k,l,e] - sum over k >= 1 of h[k,l,e]

Minimise    sum over p, l, s of  steps(p) * probability(s) * t[p,l,s]                    (objective)
subject to  t[p,l,s] >= sum over e called in s of  resident_s(k,e) * r[k,l,e] / blocks           (A)
            t[p,l,s] >= sum over e called in s of
                        host_s(k,e) * h[k,l,e] / blocks + disk_s(e) * d[l,e] / blocks            (B)
            t[p,l,s] >= launch_overhead(p)                                                       (C)
            sum over l, e of r[k,l,e] * block_bytes <= gpu_bytes(k)                              (D)
            sum over l, e of h[k,l,e] * block_bytes <= host_bytes(k)                             (E)
            h[0,l,e] >= 0                                                                        (F)

(A), (B), (D) and (E) hold for each rank k; d is part of (B) for rank 0. Experts of a layer that are
equal in every scenario share their variables, which are named after the first of them and bounded
by the blocks of all. In a rank where nothing overlaps, t is at least the sum of the right sides of
(A) and (B); with one rank, it is the sum itself. Without a limit on host memory, (E) is left out,
and so is d for rank 0. With one rank and no d, (F) is left out. For several routings, the longest
of their objectives is minimised. A small reward for resident blocks of popular experts,
POPULARITY_WEIGHT, fills memory where the objective is flat; the relaxation omits it.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import highspy
import pulp

from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.equal import equal_experts
from fiddler_opt.solve.phases import Phase
from fiddler_opt.solve.placement import MemoryLimits, Placement, Share
from fiddler_opt.solve.solver import MAX_GAP, MAX_GAP_OF_RANKS, Solver
from fiddler_opt.solve.time_unit import time_unit
from fiddler_opt.solve.variables import BlockVariables, total

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
        groups = [equal_experts(costs, list(steps), layer) for layer in layers]
        category = pulp.LpContinuous if relaxed else pulp.LpInteger
        self.blocks = BlockVariables(self._cost, groups, limits, category)
        self._set_objective(costs, limits, steps)
        self._gpu_limits = [
            total(r) <= self._blocks(each.gpu_bytes, limits)
            for r, each in zip(self.blocks.resident, limits.ranks, strict=True)
        ]
        for constraint in self._gpu_limits:
            self.lp += constraint  # (D)
        self._limit_host_memory(limits)

    def _blocks(self, num_bytes: int, limits: MemoryLimits) -> float:
        """The blocks that fit. Whole ones, because the solver tolerates a part of one too many."""
        blocks = num_bytes / limits.block_bytes
        return blocks if self._relaxed else num_bytes // limits.block_bytes

    def _limit_host_memory(self, limits: MemoryLimits) -> None:
        """Adds (E) and (F)."""
        elsewhere = self.blocks.elsewhere()
        limited = limits.host_bytes is not None
        if limited:
            all_blocks = self._cost.blocks_per_expert * sum(map(len, self._cost.called))
            host = all_blocks - pulp.lpSum(each for _, each in elsewhere)
            self.lp += host <= self._blocks(limits.host_bytes, limits)  # (E)
        for (_, h), other in zip(self.blocks.others, limits.others, strict=True):
            if other.host_bytes is not None:
                self.lp += total(h) <= self._blocks(other.host_bytes, limits)  # (E)
        if limited or self.blocks.others:
            for r, blocks in elsewhere:
                self.lp += blocks <= r.upBound  # (F)

    def solve(self, time_limit_s: float | None = None, start: Placement | None = None) -> str:
        """Solves the program, from a placement within the limits if given. Returns the status in
        words.

        Raises:
            FiddlerError: the solver failed.
        """
        presolve = not any(self.blocks.d)  # with (F), it may take ten times as long as the rest
        several = bool(self.blocks.others)
        max_gap = MAX_GAP_OF_RANKS if several else MAX_GAP
        values = {} if start is None else self.blocks.values(start)
        if several and self._relaxed:
            # For 4 ranks of 6144 experts, the simplex method takes 80 s, interior points 13 s. They
            # fail on a few absurd profiles.
            solver = Solver(self._constant, presolve, time_limit_s, max_gap, "ipm")
            if solver.run(self.lp, values) == "optimal":
                return "optimal"
        return Solver(self._constant, presolve, time_limit_s, max_gap).run(self.lp, values)

    def solve_again(self, limits: MemoryLimits) -> str:
        """Solves the solved relaxation for other GPU memory, from its present solution."""
        solver = self.lp.solverModel
        for constraint, each in zip(self._gpu_limits, limits.ranks, strict=True):
            gpu_blocks = each.gpu_bytes / limits.block_bytes
            solver.changeRowBounds(constraint.index, -highspy.kHighsInf, gpu_blocks)
        solver.run()
        return solver.modelStatusToString(solver.getModelStatus()).lower()

    @property
    def is_solved(self) -> bool:
        return self.blocks.are_solved

    @property
    def objective_s(self) -> float:
        return (self.lp.solverModel.getObjectiveValue() + self._constant) / self._unit

    @property
    def bound_s(self) -> float:
        """A lower bound on the seconds of `steps` for any placement."""
        return (self.lp.solverModel.getInfo().mip_dual_bound + self._constant) / self._unit

    def placement(self) -> Placement:
        """The placement in the solution."""
        return self.blocks.placement()

    def text(self) -> str:
        """The program in LP format."""
        with tempfile.TemporaryDirectory() as folder:  # PuLP only writes to files
            path = Path(folder) / "program.lp"
            self.lp.writeLP(str(path))
            return path.read_text()

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
        simple_s = min(
            cost.total_s(self._alone(number, count))
            for number, each in enumerate(limits.ranks)
            for count in (
                0,
                min(blocks, max(0.0, each.gpu_bytes / limits.block_bytes / len(chances))),
            )
        )
        weight = POPULARITY_WEIGHT * self._unit * simple_s / (2 * mean * len(chances) * blocks)
        return pulp.LpAffineExpression(
            [
                (r, weight * (called[expert] + mean))
                for rows in self.blocks.resident
                for row, called in zip(rows, cost.called, strict=True)
                for expert, r in row.items()
            ]
        )

    def _alone(self, number: int, resident: float) -> Placement:
        """The placement of all blocks in rank `number`, `resident` of each expert on its GPU."""

        def rows(count: float) -> list[list[float]]:
            return [[count] * len(row) for row in self._cost.called]

        in_host = self._cost.blocks_per_expert - resident
        shares = [
            Share(rows(resident), rows(in_host)) if other == number else Share(rows(0), rows(0))
            for other in range(1, len(self.blocks.others) + 1)
        ]
        return Placement.of(rows(0 if number else resident), tuple(shares))

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
                    sides = self.blocks.right_sides(scenario, layer, self._unit)
                    if not any(cost.overlap) and len(sides) == 1:
                        objective.addInPlace(weight * sum(sides[0]))
                        continue
                    t = pulp.LpVariable(f"t_{number}_{p}_{layer}_{s}", overhead)  # (C)
                    objective.addterm(t, weight)
                    for overlap, parts in zip(cost.overlap, sides, strict=True):
                        for side in parts if overlap else [sum(parts)]:
                            side.addterm(t, -1)
                            self.lp += side <= 0  # (A), (B)
        return objective
