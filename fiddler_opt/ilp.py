"""The integer program: which blocks are resident, so that the workload takes the least time within the GPU budget.

Variables
    r[l,e]    integer, 0 .. blocks_per_expert: resident blocks of expert e in layer l
    t[p,l,s]  seconds of layer l's experts in scenario s of phase p

Minimise    sum over p, l, s of  steps(p) * probability(s) * t[p,l,s]                                        (objective)
subject to  t[p,l,s] >= sum over e called in s of device_s(e) * r[l,e] / blocks                                       (A)
            t[p,l,s] >= sum over e called in s of absent_s(e) * (blocks - r[l,e]) / blocks                            (B)
            t[p,l,s] >= queueing(p)                                                                                       (C)
            sum over l, e of r[l,e] * block_bytes <= budget                                                           (D)

Where device and absent blocks cannot run at once, t is the sum of the two right sides and (A), (B) fall away.
"""

import time
from dataclasses import dataclass

import pulp

from fiddler_opt.cost import CostModel, Phase, Placement, Scenario
from fiddler_run.errors import FiddlerError

RELATIVE_GAP = 1e-4
MS = 1e3  # the solver's tolerances suit numbers around 1: seconds become milliseconds


@dataclass(frozen=True)
class Solution:
    """`objective_s` and `bound_s`: seconds of the whole workload, for this placement and at best for any within the budget.

    `decode_bound_s`: seconds of one decode step at best, for a placement within the budget made for decode alone.
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


def place(cost: CostModel, block_bytes: int, budget_bytes: int, time_limit_s: float = 60.0) -> Solution:
    """Solves the program above.

    Raises:
        FiddlerError: the solver ended without a placement.
    """
    started = time.perf_counter()
    num_layers, num_experts, blocks = len(cost.called), len(cost.called[0]), cost.blocks_per_expert
    budget_blocks = min(budget_bytes // block_bytes, num_layers * num_experts * blocks)

    program, r = _program(cost, {phase: phase.steps for phase in cost.phases}, budget_blocks, pulp.LpInteger)
    program.solve(pulp.HiGHS(msg=False, gapRel=RELATIVE_GAP, timeLimit=time_limit_s))
    status = {pulp.LpSolutionOptimal: "optimal", pulp.LpSolutionIntegerFeasible: "time limit"}.get(program.sol_status)
    if status is None or any(variable.varValue is None for row in r for variable in row):
        raise FiddlerError(f"the solver found no placement in {time_limit_s:.0f} s (status: {pulp.LpSolution[program.sol_status]})")
    solved = [[round(variable.varValue) for variable in row] for row in r]
    popular = [[0] * num_experts for _ in range(num_layers)]  # filled, the most used experts: simplest where it is as good
    placement = min((fill_leftover(cost, start, budget_blocks) for start in (popular, solved)), key=cost.total_s)
    fixed_s = sum(phase.steps * cost.fixed_s[phase.name] for phase in cost.phases)
    bound_ms = program.solverModel.getInfo().mip_dual_bound + program.objective.constant  # PuLP keeps the constant to itself
    objective_s = cost.total_s(placement)
    return Solution(
        placement=placement,
        objective_s=objective_s,
        bound_s=min(objective_s, bound_ms / MS + fixed_s),
        decode_bound_s=decode_bound_s(cost, budget_blocks),
        status=status,
        solve_s=time.perf_counter() - started,
    )


def decode_bound_s(cost: CostModel, budget_blocks: int) -> float:
    """Seconds below which no placement within the budget brings a decode step: the program's relaxation for that step alone."""
    program, _ = _program(cost, {cost.decode: 1}, budget_blocks, pulp.LpContinuous)
    program.solve(pulp.HiGHS(msg=False))
    assert program.sol_status == pulp.LpSolutionOptimal, pulp.LpSolution[program.sol_status]  # all resident or none is feasible
    return program.objective.value() / MS + cost.fixed_s[cost.decode.name]


def _program(cost: CostModel, steps: dict[Phase, int], budget_blocks: int, category: str):
    """The program over the given phases, and its variables r; in milliseconds, without the seconds that no placement changes."""
    program = pulp.LpProblem("placement", pulp.LpMinimize)
    r = [
        [pulp.LpVariable(f"r_{layer}_{expert}", 0, cost.blocks_per_expert, category) for expert in range(len(row))]
        for layer, row in enumerate(cost.called)
    ]
    objective = []
    for p, phase in enumerate(steps):
        for layer, scenarios in enumerate(cost.scenarios[phase.name]):
            for s, scenario in enumerate(scenarios):
                weight = steps[phase] * scenario.probability
                device, absent = _both_sides(scenario, r[layer], cost.blocks_per_expert)
                if cost.overlap:
                    t = pulp.LpVariable(f"t_{p}_{layer}_{s}", MS * cost.queueing_s[phase.name])  # (C)
                    program += t >= device  # (A)
                    program += t >= absent  # (B)
                    objective.append(weight * t)
                else:
                    objective.append(weight * (device + absent))
    program += pulp.lpSum(objective)
    program += pulp.lpSum(variable for row in r for variable in row) <= budget_blocks  # (D), in blocks
    return program, r


def _both_sides(scenario: Scenario, r: list, blocks: int):
    """The right sides of (A) and (B) in milliseconds."""
    device = pulp.lpSum(MS * seconds / blocks * r[expert] for expert, seconds in scenario.device_s.items())
    absent = pulp.lpSum(MS * seconds / blocks * (blocks - r[expert]) for expert, seconds in scenario.absent_s.items())
    return device, absent


def fill_leftover(cost: CostModel, placement: Placement, budget_blocks: int) -> Placement:
    """Gives blocks that the solver left free to the most used experts where that costs nothing.

    The solver stops at its gap, and does not care where the objective is flat; memory left empty serves nobody.
    """
    placement = [list(row) for row in placement]
    left = budget_blocks - sum(map(sum, placement))
    total_s = cost.total_s(placement)
    order = sorted(((-called, layer, expert) for layer, row in enumerate(cost.called) for expert, called in enumerate(row)))
    for _, layer, expert in order:
        added = min(left, cost.blocks_per_expert - placement[layer][expert])
        if added == 0:
            continue
        placement[layer][expert] += added
        filled_s = cost.total_s(placement)
        if filled_s > total_s * (1 + 1e-12):
            placement[layer][expert] -= added
        else:
            left, total_s = left - added, filled_s
    return placement
