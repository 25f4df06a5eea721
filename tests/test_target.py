"""The least memory for a target, also where more memory predicts slightly slower."""

import random
from types import SimpleNamespace

import pytest

from fiddler_opt.solve.target import STEP_BYTES, least_memory, parse_rate
from fiddler_run.errors import FiddlerError


def solver(rates: dict[int, float]):
    """A stand-in for the solver with `rates` by memory steps; other budgets are too small."""

    def solve(gpu_bytes: int):
        steps = gpu_bytes // STEP_BYTES
        if steps not in rates:
            raise FiddlerError("too small")
        return SimpleNamespace(
            steps=steps, predicted=SimpleNamespace(decode_tokens_per_s=rates[steps])
        )

    return solve


@pytest.mark.parametrize("seed", range(40))
def test_least_memory_reaches_the_target_and_one_step_less_does_not(seed):
    rng = random.Random(seed)
    most = rng.randint(3, 240)
    rates = {
        n: (1 + n / 20) * rng.uniform(0.985, 1.0) for n in range(rng.randint(0, most), most + 1)
    }
    rate = rng.choice(list(rates.values()))
    try:
        plan = least_memory(solver(rates), rate, most * STEP_BYTES)
    except FiddlerError:
        assert rates[most] < rate
        return
    assert plan.predicted.decode_tokens_per_s >= rate
    assert rates.get(plan.steps - 1, 0.0) < rate


def test_target_is_found_where_all_memory_misses_it():
    rates = dict.fromkeys(range(10, 100), 5.0) | {100: 4.95}
    assert least_memory(solver(rates), 5.0, 100 * STEP_BYTES).steps == 10


def test_the_cpu_alone_may_reach_the_target():
    rates = {0: 4.0} | dict.fromkeys(range(51, 101), 4.5)
    assert least_memory(solver(rates), 4.0, 100 * STEP_BYTES).steps == 0
    assert least_memory(solver(rates), 4.1, 100 * STEP_BYTES).steps == 51


def test_unreachable_target_is_refused():
    with pytest.raises(
        FiddlerError,
        match="with the GPU's 10.00 GB, according to this profile: they reach 4.00",
    ):
        least_memory(solver(dict.fromkeys(range(101), 4.0)), 5.0, 100 * STEP_BYTES)
    with pytest.raises(FiddlerError, match="according to this profile: too small"):
        least_memory(solver({}), 5.0, 100 * STEP_BYTES)


@pytest.mark.parametrize(
    "text",
    ["9" * 400 + "tok/s", "0.0000000001tok/s", "0tok/s", "6", "-1tok/s", "1" * 5000 + "tok/s"],
)
def test_invalid_speeds_are_refused(text):
    with pytest.raises(
        FiddlerError, match="--target .*: not a speed; write for example 6tok/s"
    ) as caught:
        parse_rate(text)
    assert len(str(caught.value)) < 120
