"""Compares a plan with simple rules and with plans made for a single set of prompts."""

from fiddler_opt.inputs.routing import Routing
from fiddler_opt.solve.baselines import BASELINES, place_by_rule
from fiddler_opt.solve.compiler import NOT_SOLVED, naming_absurd_numbers
from fiddler_opt.solve.ilp import place
from fiddler_opt.solve.placement import placement_of
from fiddler_opt.solve.predict import rounded, to_tenths_of_a_millisecond
from fiddler_opt.solve.problem import Problem
from fiddler_opt.solve.times import Policy
from fiddler_run.plan.prediction import Alternative
from fiddler_run.plan.schema import Plan


def compared(plan: Plan, problem: Problem, routing: Routing) -> Plan:
    """The plan with `predicted.regret` and `predicted.alternatives`.

    Regret takes a solution per set of prompts, so it is computed only for a plan that is written.
    """
    with naming_absurd_numbers():
        predicted = plan.predicted.model_copy(
            update={
                "regret": regret(plan, problem, routing),
                "alternatives": alternatives(problem, routing),
            }
        )
        return plan.model_copy(update={"predicted": predicted})


def alternatives(problem: Problem, routing: Routing) -> dict[str, Alternative]:
    """The predictions of the simple rules, for the first rank alone."""
    found = {}
    problem = problem.of_first_rank()
    for name, rule in BASELINES.items():
        if rule.policy in ("link", "better") and not problem.has_link:
            continue
        cost = problem.cost(routing, rule.policy)
        placement = place_by_rule(rule, cost, problem.memory_limits())
        rate = cost.decode_tokens_per_s(cost.decode_step_s(placement))
        found[name] = Alternative(
            decode_tokens_per_s=rounded(rate, 3),
            ttft_s=to_tenths_of_a_millisecond(cost.ttft_s(placement)),
        )
    return found


def regret(plan: Plan, problem: Problem, routing: Routing) -> dict[str, float]:
    """By set of prompts, the relative extra time compared with a plan made for that set alone."""
    found = {}
    for name, observed in routing.sets.items():
        own_s = place([problem.cost(observed)], problem.memory_limits()).objective_s
        plan_s = problem.cost(observed, policy_of(plan)).total_s(placement_of(plan))
        found[name] = round(max(0.0, plan_s / own_s - 1), 4)
    return found


def policy_of(plan: Plan) -> Policy:
    """How the plan's host blocks are served."""
    name = plan.provenance.status.removeprefix(NOT_SOLVED)
    return BASELINES[name].policy if name in BASELINES else "together"
