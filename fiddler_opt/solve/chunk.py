"""Chooses the prefill chunk: how many tokens of a prompt pass through the layers at once."""

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.routing import Routing
from fiddler_opt.solve.ilp import relaxed_s
from fiddler_opt.solve.memory import chunk_candidates
from fiddler_opt.solve.problem import Problem
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Budget, Workload

# Among chunks whose plans are this close in time, the largest serves longer prompts best.
EQUAL_TIMES = 1.01


def choose_chunk(
    model: ModelSpec, machine: MachineProfile, routing: Routing, workload: Workload, budget: Budget
) -> Problem:
    """The problem with the best chunk, judged by the relaxation of each candidate.

    A larger chunk takes memory from experts. A smaller one streams the experts more often.

    Raises:
        FiddlerError: the budget does not hold even the smallest chunk.
    """
    found = {}
    refusal = None
    for chunk in chunk_candidates(workload):
        problem = Problem(model, machine, workload, budget, chunk)
        try:
            cost = problem.cost(routing)
            steps = {phase: phase.steps for phase in cost.phases}
            found[chunk] = problem, relaxed_s([cost], problem.memory_limits(), steps)
        except FiddlerError as error:
            refusal = refusal or error  # of the smallest chunk, which needs the least memory
    if not found:
        raise refusal
    least_s = min(seconds for _, seconds in found.values())
    chunk = max(chunk for chunk, (_, seconds) in found.items() if seconds <= EQUAL_TIMES * least_s)
    problem, _ = found[chunk]
    return problem
