"""The least GPU memory that reaches a speed: more never predicts slower, so it is searched by halves."""

import re
from collections.abc import Callable

from fiddler_opt.units import format_bytes
from fiddler_run.errors import FiddlerError
from fiddler_run.plan import Plan

STEP_BYTES = 100_000_000


def parse_rate(text: str) -> float:
    """Tokens per second of `6tok/s` or `6.5 tokens/s`.

    Raises:
        FiddlerError: it is something else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*tok(?:ens)?/s\s*", text)
    if match is None or float(match[1]) == 0:
        raise FiddlerError(f"--target {text}: not a speed; write for example 6tok/s")
    return float(match[1])


def least_memory(solve: Callable[[int], Plan], tokens_per_s: float, device_bytes: int) -> Plan:
    """The plan with the least GPU memory, in steps of STEP_BYTES, that is predicted to decode so fast.

    Args:
        solve: GPU bytes -> their best plan.
        device_bytes: what the GPU has.

    Raises:
        FiddlerError: not even all of it suffices.
    """

    def attempt(steps: int) -> tuple[Plan | None, str]:
        try:
            plan = solve(steps * STEP_BYTES)
        except FiddlerError as error:  # less than what is not experts needs
            return None, str(error)
        rate = plan.predicted.decode_tokens_per_s
        return (plan if rate >= tokens_per_s else None), f"they reach {rate:.2f} tokens/s"

    low, high = -1, device_bytes // STEP_BYTES
    best, said = attempt(high)
    if best is None:
        raise FiddlerError(
            f"--target {tokens_per_s:g}tok/s cannot be reached with the GPU's {format_bytes(device_bytes)} by this profile: {said}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        plan, _ = attempt(middle)
        low, high, best = (low, middle, plan) if plan else (middle, high, best)
    return best
