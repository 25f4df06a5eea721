"""compile_plan: the whole planner."""

from dataclasses import replace

from pydantic import ValidationError

from fiddler_opt.baselines import BASELINES, place_by_rule
from fiddler_opt.cost import Policy
from fiddler_opt.ilp import Solution, decode_bound_s, place, relaxed_s
from fiddler_opt.lower import lower, predict, rounded, to_tenths_of_a_millisecond
from fiddler_opt.machine import MachineProfile
from fiddler_opt.memory import chunk_candidates
from fiddler_opt.model import ModelSpec
from fiddler_opt.problem import Budget, Problem
from fiddler_opt.routing import Routing
from fiddler_run.errors import FiddlerError
from fiddler_run.plan import Alternative, Plan, Provenance, Workload

MAX_EXPERTS = 50_000  # of all layers together; the largest models known have half of it
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
        FiddlerError: the budget is too small, or larger than the machine; or its profile is absurd.
    """
    require_plannable(model)
    try:
        problem = choose_chunk(model, machine, routing, workload, budget)
        solution, policy = solve(problem, routing, robust, baseline, emit)
        made = Provenance(
            **provenance,
            solver="HiGHS",
            status=solution.status,
            solve_s=round(solution.solve_s, 2),
        )
        predicted = predict(problem, routing, solution, policy).model_copy(
            update={
                "regret": regret(problem, routing, solution, policy),
                "alternatives": alternatives(problem, routing),
            }
        )
        return lower(problem, solution, policy, predicted, made)
    except ValidationError as error:  # the numbers given are in bounds, what follows from them is not
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the plan"
        raise FiddlerError(
            f"no plan can hold what follows from these numbers: {where}: {first['msg']}; "
            "look for absurd ones in the machine profile and the workload"
        ) from None


def require_plannable(model: ModelSpec) -> None:
    """
    Raises:
        FiddlerError: the solver could not hold so many experts.
    """
    experts = model.shape.num_layers * model.shape.num_experts
    if experts > MAX_EXPERTS:
        raise FiddlerError(f"{model.shape.name}: {experts} experts in all layers; the planner handles {MAX_EXPERTS} at most")


def choose_chunk(model: ModelSpec, machine: MachineProfile, routing: Routing, workload: Workload, budget: Budget) -> Problem:
    """The problem with the best number of a prompt's tokens to pass the layers at once: more take memory from experts, fewer
    take the experts over the link more often. Judged by the relaxation of each."""
    found, refusal = {}, None
    for chunk in chunk_candidates(workload):
        problem = Problem(model, machine, workload, budget, chunk)
        try:
            cost, room = problem.cost(routing), problem.room()
            seconds = relaxed_s([cost], room, {phase: phase.steps for phase in cost.phases})
        except FiddlerError as error:
            refusal = refusal or error  # the smallest chunk's: it needs least
            continue
        found[chunk] = problem, seconds
    if not found:
        raise refusal
    least = min(seconds for _, seconds in found.values())
    return found[max(chunk for chunk, (_, seconds) in found.items() if seconds <= CLOSE * least)][0]


def solve(problem: Problem, routing: Routing, robust: bool, baseline: str | None, emit: str | None) -> tuple[Solution, Policy]:
    """The placement, by the program or by a rule, with what the program knows of it; and how absent blocks are served."""
    observed = list(routing.sets.values()) if robust and routing.sets else [routing]
    costs, room = [problem.cost(each) for each in observed], problem.room()
    known = [] if len(costs) == 1 else [place([problem.cost(routing)], room).placement]
    best = place(costs, room, emit=emit, known=known)
    if known:  # what is predicted is decode under the whole routing, so its bound is needed, not the worst set's
        best = replace(best, decode_bound_s=decode_bound_s(problem.cost(routing), room))
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
        found[name] = Alternative(decode_tokens_per_s=rounded(rate, 3), ttft_s=to_tenths_of_a_millisecond(cost.ttft_s(placement)))
    return found


def regret(problem: Problem, routing: Routing, solution: Solution, policy: Policy) -> dict[str, float]:
    """By set of prompts: how much longer the workload takes there than with a plan made for that set, as a part of it."""
    found = {}
    for name, observed in routing.sets.items():
        own = place([problem.cost(observed)], problem.room())
        found[name] = round(max(0.0, problem.cost(observed, policy).total_s(solution.placement) / own.objective_s - 1), 4)
    return found
