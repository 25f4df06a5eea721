"""Finds the least GPU memory that reaches a speed, by bisection.

More memory predicts a faster decode, except for the solver's gap and the choice of the chunk, which
may cost 1 or 2%. The returned plan reaches the speed, and STEP_BYTES less does not. A much smaller
budget might happen to reach the speed, too; of these, only 0 GB is tried: the CPU alone.
"""

import re
from collections.abc import Callable

from fiddler_opt.units import format_bytes
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan

STEP_BYTES = 100_000_000
NOISE = 0.02  # relative; more memory may predict a slower decode by this much
PROBES = 8
MIN_RATE = 1e-6
MAX_RATE = 1e12


def parse_rate(text: str) -> float:
    """Parses tokens per second from `6tok/s` or `6.5 tokens/s`.

    Raises:
        FiddlerError: the text is not a rate.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*tok(?:ens)?/s\s*", text)
    if match is None or not MIN_RATE <= float(match[1]) <= MAX_RATE:
        shown = text if len(text) <= 30 else f"{text[:30]}..."
        raise FiddlerError(f"--target {shown}: not a speed; write for example 6tok/s")
    return float(match[1])


def least_memory(solve: Callable[[int], Plan], tokens_per_s: float, device_bytes: int) -> Plan:
    """The plan with the least GPU memory, in steps of STEP_BYTES, that reaches a decode speed.

    Args:
        solve: maps GPU bytes to the best plan.
        device_bytes: the GPU's memory.

    Raises:
        FiddlerError: all of the GPU's memory is not enough.
    """

    def attempt(steps: int) -> tuple[Plan | None, float, str]:
        """The plan if it reaches the speed, its speed, and a description for errors."""
        try:
            plan = solve(steps * STEP_BYTES)
        except FiddlerError as error:  # the budget is too small even without experts
            return None, 0.0, str(error)
        rate = plan.predicted.decode_tokens_per_s
        reached = plan if rate >= tokens_per_s else None
        return reached, rate, f"they reach {rate:.2f} tokens/s"

    best, _, _ = attempt(0)
    if best is not None:
        return best
    low = 0
    high = everything = device_bytes // STEP_BYTES
    best, rate, said = attempt(high)
    while best is None and rate >= (1 - NOISE) * tokens_per_s and high > 0:
        high = max(0, high - max(1, everything // PROBES))
        best, rate, _ = attempt(high)
    if best is None:
        raise FiddlerError(
            f"--target {tokens_per_s:g}tok/s cannot be reached with the GPU's"
            f" {format_bytes(device_bytes)}, according to this profile: {said}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        plan, _, _ = attempt(middle)
        if plan is None:
            low = middle
        else:
            high = middle
            best = plan
    return best
