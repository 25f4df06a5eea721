"""Calibration: corrects a machine profile from the measurements of a run.

The run's plan must have been made from that profile. Calibration also finds out whether another
plan is now better. It compares rates of blocks, not times, because a run need not choose the
experts that the plan's routing expects.
"""

from dataclasses import dataclass, replace
from datetime import date
from math import log
from typing import Literal

from fiddler_opt.inputs.machine import (
    MAX_US,
    MIN_US,
    MachineProfile,
    ProfileProvenance,
    Times,
    seconds_at,
)
from fiddler_opt.inputs.machine_parts import EncodedExperts
from fiddler_opt.inputs.routing import Routing
from fiddler_opt.insight.bench_result import MeasuredPhase, Result
from fiddler_opt.solve.chunk import choose_chunk
from fiddler_opt.solve.compiler import NOT_SOLVED, solve
from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.placement import Placement, placement_of
from fiddler_opt.solve.problem import Problem
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.parts import PARTS
from fiddler_run.plan.schema import Plan
from fiddler_run.plan.split import interpolate

MIN_GAIN = 0.02  # relative to the workload's time; a smaller difference counts as equal
MAX_FACTOR = 1e6  # largest plausible ratio of measured and profiled time, either way
Part = Literal["host", "resident", "dense", "head"]  # keys of PARTS


@dataclass(frozen=True)
class Correction:
    """A profiled time at a number of tokens, and the measured time for the same work."""

    part: Part
    tokens: float
    profile_us: float
    measured_us: float

    @property
    def factor(self) -> float:
        return self.measured_us / self.profile_us


@dataclass(frozen=True)
class Calibration:
    """The result of a calibration.

    `machine` is the corrected profile and `cost` its cost model. `placement` is the plan's. `now_s`
    and `best_s` are the predicted seconds of the workload for that placement and for the best one.
    """

    corrections: list[Correction]
    machine: MachineProfile
    cost: CostModel
    placement: Placement
    best_s: float

    @property
    def now_s(self) -> float:
        return self.cost.total_s(self.placement)

    @property
    def another_wins(self) -> bool:
        return self.best_s < (1 - MIN_GAIN) * self.now_s


def calibrate(
    plan: Plan, problem: Problem, routing: Routing, result: Result, command: str
) -> Calibration:
    """Corrects the profile from a run's measurements and solves with it again.

    Args:
        problem, routing: what the plan was made from.
        result: the run's measurements.
        command: recorded in the new profile.

    Raises:
        FiddlerError: a simple rule made the plan, the plan or the run does not use the profiled
            GPU, or a measured time is implausible.
    """
    if plan.provenance.status.startswith(NOT_SOLVED):
        raise FiddlerError(
            "a plan made with --baseline cannot calibrate a profile; use one made without it"
        )
    if plan.rank.gpu_memory_bytes.total == 0 and problem.machine.device.kind == "cuda":
        raise FiddlerError(
            "the plan does not use the GPU that its profile timed; calibrate with one that does"
        )
    if result.machine.gpu is None and problem.machine.device.kind == "cuda":
        raise FiddlerError(
            "the result was measured without a GPU, but the profile timed one; run the plan where"
            " the GPU is"
        )
    corrections = [each for each in compared(plan, problem, result) if each.measured_us > 0]
    for each in corrections:
        if not 1 / MAX_FACTOR <= each.factor <= MAX_FACTOR:
            raise FiddlerError(
                f"{PARTS[each.part]} took {each.measured_us:.3g} us in the result and"
                f" {each.profile_us:.3g} us in the profile: one of them cannot be right; run"
                " `fiddler-run --bench` again"
            )
    machine = refitted(problem.machine, corrections, command)
    cost = replace(problem, machine=machine).cost(routing)
    best = choose_chunk(problem.model, machine, routing, problem.workload, problem.budget)
    best_s = solve(best, routing).objective_s
    return Calibration(corrections, machine, cost, placement_of(plan), best_s)


def compared(plan: Plan, problem: Problem, result: Result) -> list[Correction]:
    """Measured and profiled times, for the profile's shape. Decode comes first."""
    machine = problem.machine
    corrections = []
    for phase in (result.decode, result.prefill):
        times = {
            "host": machine.best_host_us,
            "resident": machine.resident_expert_us,
            "dense": machine.dense_device_us,
            "head": machine.head_us,
        }
        for part, measured_us in _measured_us(plan, problem, phase).items():
            of_expert = part in ("host", "resident")
            tokens = phase.tokens_per_expert if of_expert else phase.tokens_per_pass
            profile_us = seconds_at(times[part], tokens) * 1e6
            corrections.append(Correction(part, tokens, profile_us, measured_us))
    return corrections


def _measured_us(plan: Plan, problem: Problem, phase: MeasuredPhase) -> dict[Part, float]:
    """Microseconds of the parts that a phase reports, scaled by bytes to the profile's shape."""
    model = problem.model
    timed = problem.machine.shape
    found = {}
    for part in ("host", "resident"):
        # The host rate includes blocks on disk, but the host time does not.
        if part in phase.bytes_per_s and not (part == "host" and plan.rank.disk_bytes):
            found[part] = timed.expert_bytes / phase.bytes_per_s[part] * 1e6
    if "dense" in phase.ms:
        layer_us = phase.ms["dense"] * 1e3 / (phase.passes * model.shape.num_layers)
        found["dense"] = layer_us * timed.dense_layer_bytes / model.dense_layer_bytes
    if "head" in phase.ms:
        head_us = phase.ms["head"] * 1e3 / phase.passes
        found["head"] = head_us * timed.head_bytes / model.head_bytes
    return found


def refitted(
    machine: MachineProfile, corrections: list[Correction], command: str
) -> MachineProfile:
    """The profile with each table multiplied by its correction factors.

    Factors are interpolated log-linearly between token counts, and constant beyond the first and
    last.
    """

    def factors(part: Part) -> dict[float, float]:
        own = (each for each in reversed(corrections) if each.part == part)
        return {log(each.tokens): each.factor for each in own} or {0.0: 1.0}

    def corrected(us: float, tokens: int, factors: dict[float, float]) -> float:
        return min(max(MIN_US, round(us * interpolate(factors, log(tokens)), 1)), MAX_US)

    def fit(times: Times, factors: dict[float, float]) -> Times:
        return {tokens: corrected(us, tokens, factors) for tokens, us in times.items()}

    host = factors("host")
    dense = factors("dense")
    # If decode reports no rate of resident blocks, their time for one token stays as profiled.
    # Without a GPU, one rate covers all blocks.
    resident = {0.0: 1.0} | factors("resident") if machine.device.kind == "cuda" else host

    def fit_experts(experts: EncodedExperts) -> dict:
        by_share = {
            tokens: {share: corrected(us, tokens, host) for share, us in row.items()}
            for tokens, row in experts.host_expert_us.items()
        }
        return {
            "host_expert_us": by_share,
            "resident_expert_us": fit(experts.resident_expert_us, resident),
        }

    # The other encodings get the same factors, or the next plan would choose them unfairly.
    encodings = {
        name: experts.model_copy(update=fit_experts(experts))
        for name, experts in machine.encodings.items()
    }
    return machine.model_copy(
        update={
            "source": "measured",
            **fit_experts(machine.encoded_experts),
            "encodings": encodings,
            "dense_layer_us": fit(machine.dense_layer_us, dense),
            "dense_device_us": fit(machine.dense_device_us, dense),
            "head_us": fit(machine.head_us, factors("head")),
            "provenance": ProfileProvenance(
                command=command,
                created=date.today().isoformat(),
                software=machine.provenance.software,
            ),
        }
    )
