"""Chooses the prefill chunk: how many tokens of a prompt pass through the layers at once."""

from dataclasses import replace

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.routing import Routing
from fiddler_opt.solve.ilp import relaxed_s
from fiddler_opt.solve.memory import chunk_candidates
from fiddler_opt.solve.phases import workload_phases
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
    alike = {}  # by phases: the problems, which differ in memory, and that memory
    refusal = None
    for chunk in chunk_candidates(workload):
        problem = Problem(model, machine, workload, budget, chunk)
        try:
            limits = problem.memory_limits()
        except FiddlerError as error:
            refusal = refusal or error  # of the smallest chunk, which needs the least memory
            continue
        phases = [replace(phase, name="") for phase in workload_phases(workload, chunk)]
        alike.setdefault(tuple(phases), []).append((problem, limits))
    timed = []
    for members in alike.values():
        problems, memories = zip(*members, strict=True)
        try:
            cost = problems[0].cost(routing)
            seconds = relaxed_s([cost], memories, {phase: phase.steps for phase in cost.phases})
            timed += zip(seconds, problems, strict=True)
        except FiddlerError as error:
            refusal = refusal or error
    if not timed:
        raise refusal
    least_s = min(seconds for seconds, _ in timed)
    close = [problem for seconds, problem in timed if seconds <= EQUAL_TIMES * least_s]
    return max(close, key=lambda problem: problem.chunk_tokens)
