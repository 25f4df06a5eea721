"""compile_plan: the whole planner."""

from fiddler_opt.baselines import BASELINES, place_by_rule
from fiddler_opt.cost import Policy
from fiddler_opt.ilp import Solution, place, relaxed_s
from fiddler_opt.lower import lower, predict, to_tenths_of_a_millisecond
from fiddler_opt.machine import MachineProfile
from fiddler_opt.memory import chunk_candidates
from fiddler_opt.model import ModelSpec
from fiddler_opt.problem import Budget, Problem
from fiddler_opt.routing import Routing
from fiddler_run.errors import FiddlerError
from fiddler_run.plan import Alternative, Plan, Provenance, Workload

CLOSE = 1.01  # of chunks whose plans take times as close as this, the largest serves longer prompts best


def compile_plan(
    model: ModelSpec,
    machine: MachineProfile,
    routing: Routing,
    workload: Workload,
    budget: Budget,
    provenance: dict[str, str],
    robust: bool = False,
    baseline: str | None = None,
    emit: str | None = None,
) -> Plan:
    """The best placement for a workload within a budget.

    Args:
        provenance: all of its keys but the solver's.
        robust: best for that of the routing's sets for which it is worst, instead of for all of them together.
        baseline: instead of the best, that of `BASELINES`.
        emit: file for the integer program, in the LP format.

    Raises:
        FiddlerError: the budget is too small, or larger than the machine.
    """
    problem = choose_chunk(model, machine, routing, workload, budget)
    solution, policy = solve(problem, routing, robust, baseline, emit)
    predicted = predict(problem, routing, solution, policy).model_copy(
        update={"regret": regret(problem, routing, solution, policy), "alternatives": alternatives(problem, routing)}
    )
    made = Provenance(**provenance, solver="HiGHS", status=solution.status, solve_s=round(solution.solve_s, 2))
    return lower(problem, solution, policy, predicted, made)


def choose_chunk(model: ModelSpec, machine: MachineProfile, routing: Routing, workload: Workload, budget: Budget) -> Problem:
    """The problem with the best number of a prompt's tokens to pass the layers at once: more take memory from experts, fewer
    take the experts over the link more often. Judged by the relaxation of each."""
    found, refusal = {}, None
    for chunk in chunk_candidates(workload):
        problem = Problem(model, machine, workload, budget, chunk)
        try:
            cost, room = problem.cost(routing), problem.room()
        except FiddlerError as error:
            refusal = refusal or error  # the smallest chunk's: it needs least
            continue
        found[chunk] = problem, relaxed_s([cost], room, {phase: phase.steps for phase in cost.phases})
    if not found:
        raise refusal
    least = min(seconds for _, seconds in found.values())
    return found[max(chunk for chunk, (_, seconds) in found.items() if seconds <= CLOSE * least)][0]


def solve(problem: Problem, routing: Routing, robust: bool, baseline: str | None, emit: str | None) -> tuple[Solution, Policy]:
    """The placement, by the program or by a rule, with what the program knows of it; and how absent blocks are served."""
    observed = list(routing.sets.values()) if robust and routing.sets else [routing]
    costs, room = [problem.cost(each) for each in observed], problem.room()
    best = place(costs, room, emit=emit)
    if baseline is None:
        return best, "together"
    rule = BASELINES[baseline]
    cost = problem.cost(routing, rule.policy)
    placement = place_by_rule(rule, cost, room)
    chosen = Solution(placement, cost.total_s(placement), best.bound_s, best.decode_bound_s, f"not solved: {baseline}", 0.0)
    return chosen, rule.policy


def alternatives(problem: Problem, routing: Routing) -> dict[str, Alternative]:
    """What the rules of thumb would give."""
    found = {}
    for name, rule in BASELINES.items():
        if rule.policy in ("link", "better") and not problem.has_link:
            continue
        cost = problem.cost(routing, rule.policy)
        placement = place_by_rule(rule, cost, problem.room())
        rate = cost.decode_tokens_per_s(cost.decode_step_s(placement))
        found[name] = Alternative(decode_tokens_per_s=round(rate, 3), ttft_s=to_tenths_of_a_millisecond(cost.ttft_s(placement)))
    return found


def regret(problem: Problem, routing: Routing, solution: Solution, policy: Policy) -> dict[str, float]:
    """By set of prompts: how much longer the workload takes there than with a plan made for that set, as a part of it."""
    found = {}
    for name, observed in routing.sets.items():
        own = place([problem.cost(observed)], problem.room())
        found[name] = round(max(0.0, problem.cost(observed, policy).total_s(solution.placement) / own.objective_s - 1), 4)
    return found
