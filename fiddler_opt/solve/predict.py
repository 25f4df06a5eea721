"""Predicts the speed of a solution and what limits it."""

from dataclasses import replace
from typing import Literal

from fiddler_opt.inputs.routing import Routing
from fiddler_opt.solve.ilp import Solution, relaxed_s
from fiddler_opt.solve.problem import Problem
from fiddler_run.plan.prediction import Predicted
from fiddler_run.plan.schema import Plan

GB = 10**9


def predict(problem: Problem, routing: Routing, solution: Solution) -> Predicted:
    """Predicts a solution's speed under `routing`. Leaves regret and alternatives empty.

    The next GB is one of the first rank.
    """
    cost = problem.cost(routing, solution.policy)
    placement = solution.placement
    limits = problem.memory_limits()
    best = problem.cost(routing)
    more = replace(limits, gpu_bytes=limits.gpu_bytes + GB)
    bound_rate, more_rate = map(
        best.decode_tokens_per_s, relaxed_s([best], [limits, more], {best.decode: 1})
    )
    rate = rounded(cost.decode_tokens_per_s(cost.decode_step_s(placement)), 3)
    bound = rounded(bound_rate, 3)
    return Predicted(
        decode_tokens_per_s=rate,
        ttft_s=to_tenths_of_a_millisecond(cost.ttft_s(placement)),
        gpu_hit_rate=round(cost.hit_rate(placement), 4),
        bound_tokens_per_s=max(bound, rate),  # equal within the solver's tolerance
        gap=round(solution.gap, 6),
        decode_ms=milliseconds(cost.step_parts(cost.decode, placement)),
        ttft_ms=milliseconds(cost.ttft_parts(placement)),
        binding=binding(problem, solution),
        # without GPU memory, the next GB would not even hold the weights outside the experts
        next_gb_tokens_per_s=(
            round(max(0.0, more_rate - bound_rate), 3) if problem.budget.gpu_bytes else 0.0
        ),
        regret={},
        alternatives={},
    )


def rounded(value: float, digits: int) -> float:
    """The rounded value, or the value itself if it would round to 0."""
    return round(value, digits) or value


def workload_s(plan: Plan) -> float:
    """The predicted seconds of prompt and output. The first token appears with the prompt."""
    workload = plan.workload
    later_tokens = (workload.output_tokens - 1) * workload.batch_size
    return plan.predicted.ttft_s + later_tokens / plan.predicted.decode_tokens_per_s


def to_tenths_of_a_millisecond(seconds: float) -> float:
    """Seconds rounded to 0.1 ms, but at least 0.1 ms."""
    return max(round(seconds, 4), 1e-4)


def milliseconds(parts: dict[str, float]) -> dict[str, float]:
    return {name: round(seconds * 1e3, 3) for name, seconds in parts.items() if seconds}


def binding(
    problem: Problem, solution: Solution
) -> Literal["GPU memory", "GPU and host memory", "host memory", "nothing"]:
    """The budgets that limit the speed.

    "nothing" if memory is not the limit: all blocks are resident, or memory is left over.
    """
    placement = solution.placement
    limits = problem.memory_limits()
    all_blocks = problem.model.all_expert_bytes // problem.model.block_bytes
    resident = placement.num_resident
    capacity = sum(each.gpu_blocks for each in limits.ranks)
    full = capacity == resident < all_blocks and any(problem.gpu_bytes)
    spilt = placement.num_on_disk > 0
    names = {
        (True, True): "GPU and host memory",
        (True, False): "GPU memory",
        (False, True): "host memory",
    }
    return names.get((full, spilt), "nothing")
