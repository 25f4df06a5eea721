"""Predicts what prompt lookup (`fiddler-run --lookup`) needs to pay."""

from dataclasses import dataclass, replace

from fiddler_opt.inputs.routing import Routing
from fiddler_opt.solve.placement import Placement
from fiddler_opt.solve.problem import Problem
from fiddler_opt.solve.times import Policy
from fiddler_run.generation.lookup_gate import DRAFT_TOKENS


@dataclass(frozen=True)
class BreakEven:
    """A pass of `tokens` takes as long as `steps` decode steps, so it must yield more of them."""

    tokens: int
    steps: float

    @property
    def words(self) -> str:
        takes = f"prompt lookup: a pass of {self.tokens} tokens takes {self.steps:.1f} decode steps"
        if self.steps >= self.tokens:
            return f"{takes}; --lookup cannot pay"
        return f"{takes}; --lookup pays if it yields more than {self.steps:.1f} tokens"


def break_even(
    problem: Problem, routing: Routing, placement: Placement, policy: Policy = "together"
) -> BreakEven:
    """The length of a pass that needs the smallest part of its tokens to be right.

    Assumes that tokens of one sequence choose their experts like those of different ones. In fact,
    neighbours share more of them, which makes a pass faster.
    """

    def step_s(tokens: int) -> float:
        workload = problem.workload.model_copy(
            update={"prompt_tokens": 1, "num_beams": 1, "batch_size": tokens}
        )
        cost = replace(problem, workload=workload).cost(routing, policy)
        return cost.decode_step_s(placement)

    plain_s = step_s(1)
    passes = [BreakEven(drafted + 1, step_s(drafted + 1) / plain_s) for drafted in DRAFT_TOKENS]
    return min(passes, key=lambda each: each.steps / each.tokens)
