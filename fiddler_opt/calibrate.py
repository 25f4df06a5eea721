"""Calibration: what a run measured, against the profile that its plan was made from; and whether another plan would now win.

Rates of blocks are compared, not times: a run need not choose experts as the plan's routing expects.
"""

from dataclasses import dataclass, replace
from datetime import date
from math import log
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console

from fiddler_opt.compiler import choose_chunk, solve
from fiddler_opt.cost import CostModel, Placement
from fiddler_opt.explain import placement_of
from fiddler_opt.machine import LEAST_US, MOST_US, MachineProfile, Made, Times, seconds_at
from fiddler_opt.problem import Problem
from fiddler_opt.report import table
from fiddler_opt.routing import Routing
from fiddler_run.errors import FiddlerError
from fiddler_run.files import read_text
from fiddler_run.plan import Plan, Provenance, interpolate
from fiddler_run.yaml_file import Count, Milliseconds, Rate, Seconds

WORTH_IT = 0.02  # of the workload's time: plans closer than this are alike
MAX_FACTOR = 1e6  # between what a run took and what the profile says; beyond it one of them is no measurement
Average = Annotated[float, Field(ge=1e-6, le=2**31)]
Part = Literal["absent", "resident", "dense", "head"]
WORDS = {
    "absent": "an expert in host memory",
    "resident": "an expert in GPU memory",
    "dense": "a layer without experts",
    "head": "the rest of a step",
}


class _Lenient(BaseModel):
    """Some keys of many."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Phase(_Lenient):
    ms: dict[str, Milliseconds]
    bytes_per_s: dict[str, Rate]
    passes: Average
    tokens_per_pass: Average
    tokens_per_expert: Average


class Speeds(_Lenient):
    prompt_tokens: Count
    output_tokens: Count
    ttft_s: Seconds
    decode_tokens_per_s: Rate


class Result(_Lenient):
    """What `fiddler-run --bench --json` writes, as far as it is needed here."""

    plan: Provenance
    num_beams: Count
    batch_size: Count
    measured: Speeds
    prefill: Phase
    decode: Phase

    @classmethod
    def load(cls, path: str | Path, plan: Plan) -> "Result":
        """
        Raises:
            FiddlerError: the file cannot be read, is no such result, or another plan's.
        """
        try:
            result = cls.model_validate_json(read_text(path))
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            told = f"{where}: {error.errors()[0]['msg']}" if where else "no JSON object"
            raise FiddlerError(f"{path}: not a result of `fiddler-run --bench --json` ({told})") from None
        if result.plan != plan.provenance:
            raise FiddlerError(f"{path}: the result of another plan; measure this one with `fiddler-run --plan ... --bench --json`")
        return result


@dataclass(frozen=True)
class Term:
    """A time of the profile at so many tokens, and what the run took for the same; microseconds."""

    part: Part
    tokens: float
    profile_us: float
    measured_us: float

    @property
    def factor(self) -> float:
        return self.measured_us / self.profile_us


@dataclass(frozen=True)
class Calibration:
    """`machine`: the profile with its times as `terms` found them; `now`: what the plan's placement takes by it, and `best` the
    best one, seconds of the whole workload."""

    terms: list[Term]
    machine: MachineProfile
    cost: CostModel
    placement: Placement
    best_s: float

    @property
    def now_s(self) -> float:
        return self.cost.total_s(self.placement)

    @property
    def another_wins(self) -> bool:
        return self.best_s < (1 - WORTH_IT) * self.now_s


def calibrate(plan: Plan, problem: Problem, routing: Routing, result: Result, command: str) -> Calibration:
    """`problem`, `routing`: what the plan was made from.

    Raises:
        FiddlerError: the plan does not use what the profile timed, or the result is no measurement of it.
    """
    if plan.provenance.status.startswith("not solved"):
        raise FiddlerError("the plan of a rule of thumb is not run as the profile's best; calibrate with one that was solved")
    if plan.gpu_memory_bytes.total == 0 and problem.machine.device.kind == "cuda":
        raise FiddlerError("the plan makes no use of the GPU that its profile timed; calibrate with one that does")
    terms = [term for term in compared(plan, problem, result) if term.measured_us > 0]
    for term in terms:
        if not 1 / MAX_FACTOR <= term.factor <= MAX_FACTOR:
            raise FiddlerError(
                f"the result says that {WORDS[term.part]} takes {term.measured_us:.3g} us, the profile "
                f"{term.profile_us:.3g} us: one of them is no measurement; run `fiddler-run --bench` again"
            )
    machine = refitted(problem.machine, terms, command)
    cost = replace(problem, machine=machine).cost(routing)
    best = choose_chunk(problem.model, machine, routing, problem.workload, problem.budget)
    solution, _ = solve(best, routing, robust=False, baseline=None, emit=None)
    return Calibration(terms, machine, cost, placement_of(plan), solution.objective_s)


def compared(plan: Plan, problem: Problem, result: Result) -> list[Term]:
    """Each time that the run shows beside the profile's, for the profile's own shape; decode's first."""
    model, machine, terms = problem.model, problem.machine, []
    timed = machine.shape
    for phase in (result.decode, result.prefill):
        tokens = phase.tokens_per_pass
        for part, times in (("absent", machine.best_absent_us), ("resident", machine.device_expert_us)):
            # What lies on disk is part of that rate, but no part of that time.
            if part in phase.bytes_per_s and not (part == "absent" and plan.disk_bytes):
                measured_us = timed.expert_bytes / phase.bytes_per_s[part] * 1e6
                terms.append(Term(part, phase.tokens_per_expert, seconds_at(times, phase.tokens_per_expert) * 1e6, measured_us))
        if "dense" in phase.ms:
            of_a_layer = phase.ms["dense"] * 1e3 / (phase.passes * model.shape.num_layers)
            measured_us = of_a_layer * timed.dense_layer_bytes / model.dense_layer_bytes
            terms.append(Term("dense", tokens, seconds_at(machine.dense_device_us, tokens) * 1e6, measured_us))
        if "head" in phase.ms:
            with_embedding = plan.host_memory_bytes.embedding and machine.host_embedding_us
            embedding_us = seconds_at(machine.host_embedding_us, tokens) * 1e6 if with_embedding else 0.0
            measured_us = (phase.ms["head"] * 1e3 / phase.passes - embedding_us) * timed.head_bytes / model.head_bytes
            terms.append(Term("head", tokens, seconds_at(machine.head_us, tokens) * 1e6, measured_us))
    return terms


def refitted(machine: MachineProfile, terms: list[Term], command: str) -> MachineProfile:
    """The profile with each table multiplied by its terms' factors: between their tokens in proportion to the logarithm of those,
    outside by the nearest."""

    def factors(part: Part) -> dict[float, float]:
        return {log(term.tokens): term.factor for term in reversed(terms) if term.part == part} or {0.0: 1.0}

    def corrected(us: float, tokens: int, factors: dict[float, float]) -> float:
        return min(max(LEAST_US, round(us * interpolate(factors, log(tokens)), 1)), MOST_US)

    def fit(times: Times, factors: dict[float, float]) -> Times:
        return {tokens: corrected(us, tokens, factors) for tokens, us in times.items()}

    absent, dense = factors("absent"), factors("dense")
    # Decode need not show a rate of resident blocks by themselves: then it is left alone. Without a GPU there is but one rate.
    resident = {0.0: 1.0} | factors("resident") if machine.device.kind == "cuda" else absent
    by_share = {
        tokens: {share: corrected(us, tokens, absent) for share, us in row.items()}
        for tokens, row in machine.absent_expert_us.items()
    }
    return machine.model_copy(
        update={
            "source": "measured",
            "absent_expert_us": by_share,
            "device_expert_us": fit(machine.device_expert_us, resident),
            "dense_layer_us": fit(machine.dense_layer_us, dense),
            "dense_device_us": fit(machine.dense_device_us, dense),
            "head_us": fit(machine.head_us, factors("head")),
            "provenance": Made(command=command, created=date.today().isoformat(), software=machine.provenance.software),
        }
    )


def print_calibration(console: Console, plan: Plan, result: Result, found: Calibration, output: Path) -> None:
    terms = table("microseconds", "tokens", "profile", "measured", "factor")
    for term in found.terms:
        cells = f"{term.tokens:.4g}", f"{term.profile_us:.1f}", f"{term.measured_us:.1f}", f"{term.factor:.2f}"
        terms.add_row(WORDS[term.part], *cells)
    console.print(terms)
    cost, measured = found.cost, result.measured
    rate = cost.decode_tokens_per_s(cost.decode_step_s(found.placement))
    speeds = table("", "the plan predicted", "measured", "by the new profile")
    of_plan = plan.predicted
    speeds.add_row(
        "decode", *(f"{each:.2f} tokens/s" for each in (of_plan.decode_tokens_per_s, measured.decode_tokens_per_s, rate))
    )
    speeds.add_row("first token", *(f"{each:.3f} s" for each in (of_plan.ttft_s, measured.ttft_s, cost.ttft_s(found.placement))))
    console.print(speeds)
    workload = plan.workload
    if (measured.prompt_tokens, result.num_beams, result.batch_size) != (
        workload.prompt_tokens,
        workload.num_beams,
        workload.batch_size,
    ):
        console.print("note: another workload than the plan's was measured", style="yellow")
    if found.another_wins:
        console.print(f"another plan would take {1 - found.best_s / found.now_s:.1%} less time: plan again with --machine {output}")
    else:
        console.print(f"no other plan would be faster by {WORTH_IT:.0%}: keep this one")
