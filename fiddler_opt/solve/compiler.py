"""The planner as one pipeline: model, machine, routing, workload and budget in, plan out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from pydantic import ValidationError

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.routing import Routing
from fiddler_opt.solve.baselines import BASELINES, place_by_rule
from fiddler_opt.solve.chunk import choose_chunk
from fiddler_opt.solve.ilp import Solution, place, workload_program
from fiddler_opt.solve.lower import lower
from fiddler_opt.solve.predict import predict
from fiddler_opt.solve.problem import Problem
from fiddler_opt.solve.program import Program
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Budget, Plan, Workload

MAX_EXPERTS = 50_000  # in all layers together; twice as many as the largest known models have
NOT_SOLVED = "not solved: "  # starts the status of a baseline's plan, before the baseline's name

# Chooses a placement for a problem under a routing. Given further routings, for the worst of them.
Placer = Callable[[Problem, Routing, Sequence[Routing]], Solution]


def compile_plan(
    model: ModelSpec,
    machine: MachineProfile,
    routing: Routing,
    workload: Workload,
    budget: Budget,
    provenance: dict[str, str],
    worst_of: Sequence[Routing] = (),
    placer: Placer | None = None,
) -> Plan:
    """The best plan for a workload within a budget.

    It has no regret and no alternatives yet; `comparison.compared` adds them.

    Args:
        provenance: all keys but the solver's.
        worst_of: if given, optimise for the worst of these routings.
        placer: chooses the placement; `solve` by default.

    Raises:
        FiddlerError: the budget is too small or exceeds the machine, the machine profile has fewer
            ranks, or profile values are absurd.
    """
    require_plannable(model)
    with naming_absurd_numbers():
        num_ranks = 1 + len(budget.other_gpu_bytes)
        machine = machine.first_ranks(num_ranks).in_encoding(model.encoding)
        problem = choose_chunk(model.for_ranks(num_ranks), machine, routing, workload, budget)
        solution = (placer or solve)(problem, routing, worst_of)
        predicted = predict(problem, routing, solution)
        return lower(problem, solution, predicted, provenance)


def require_plannable(model: ModelSpec) -> None:
    """Checks that the planner can handle the model.

    Raises:
        FiddlerError: the model has too many experts.
    """
    experts = model.shape.num_layers * model.shape.num_experts
    if experts > MAX_EXPERTS:
        raise FiddlerError(
            f"{model.shape.name}: {experts} experts in all layers; the planner handles"
            f" {MAX_EXPERTS} at most"
        )


@contextmanager
def naming_absurd_numbers() -> Iterator[None]:
    """Converts a validation error of computed values into a FiddlerError.

    Values within their bounds can still lead to numbers that no plan can hold.
    """
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the plan"
        raise FiddlerError(
            f"no plan can hold the resulting numbers: {where}: {first['msg']}; look for absurd"
            " values in the machine profile and the workload"
        ) from None


def solve(problem: Problem, routing: Routing, worst_of: Sequence[Routing] = ()) -> Solution:
    """The best placement, by the integer program.

    With `worst_of`, it is judged by the worst of these routings.
    """
    limits = problem.memory_limits()
    best = place([problem.cost(routing)], limits)
    if not worst_of:
        return best
    return place([problem.cost(each) for each in worst_of], limits, known=[best.placement])


def integer_program(
    problem: Problem, routing: Routing, worst_of: Sequence[Routing] = ()
) -> Program:
    """The integer program that `solve` solves."""
    costs = [problem.cost(each) for each in worst_of or (routing,)]
    return workload_program(costs, problem.memory_limits())


def by_rule(name: str) -> Placer:
    """A placer by one of BASELINES, with the bounds of the integer program. For one rank only."""

    def place_it(problem: Problem, routing: Routing, worst_of: Sequence[Routing]) -> Solution:
        if problem.machine.num_ranks > 1:
            raise FiddlerError(
                f"--baseline {name} places the experts of one rank; give --gpu-mem a single size"
            )
        rule = BASELINES[name]
        cost = problem.cost(routing, rule.policy)
        placement = place_by_rule(rule, cost, problem.memory_limits())
        return replace(
            solve(problem, routing, worst_of),
            placement=placement,
            objective_s=max(
                problem.cost(each, rule.policy).total_s(placement) for each in worst_of or [routing]
            ),
            status=NOT_SOLVED + name,
            solve_s=0.0,
            policy=rule.policy,
        )

    return place_it
