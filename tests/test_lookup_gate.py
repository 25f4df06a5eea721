"""The gate of prompt lookup, with invented times."""

import pytest

from fiddler_run.generation.lookup_gate import (
    CREDIT_PER_STEP,
    DRAFT_TOKENS,
    FIRST_CREDIT,
    MIN_STEPS,
    LookupGate,
)

STEP_S = 0.01
SHORTEST = DRAFT_TOKENS[0]


def cost(tokens: int, experts: int = 8, chosen: int = 2) -> float:
    """Plain steps in a pass, where every called expert takes the same time."""
    return experts * (1 - (1 - chosen / experts) ** tokens) / chosen


def run(gate: LookupGate, passes: int, accept, cost=cost, matches=lambda place: True) -> tuple:
    """The tokens and the plain steps' time of passes; `accept` maps a draft to its right tokens."""
    tokens = 0
    steps = 0.0
    for place in range(passes):
        drafted = gate.draft_tokens() if matches(place) else 0
        accepted = min(drafted, accept(place, drafted))
        taken = cost(drafted + 1)
        gate.record(drafted, accepted, taken * STEP_S)
        tokens += accepted + 1
        steps += taken
    return tokens, steps


def right(place: int, drafted: int) -> int:
    return drafted


def wrong(place: int, drafted: int) -> int:
    return 0


def test_longest_drafts_are_found_where_all_are_right():
    gate = LookupGate()
    run(gate, MIN_STEPS + 5, right)
    assert gate.draft_tokens() == DRAFT_TOKENS[-1]
    tokens, steps = run(gate, 170, right)
    assert tokens / steps == pytest.approx(17 / cost(17), rel=0.03)  # some steps are plain


def test_gate_closes_where_proposals_fail():
    gate = LookupGate()
    run(gate, 200, wrong)
    assert not gate.is_open
    gate.record(SHORTEST, 0, STEP_S * cost(SHORTEST + 1))
    assert gate.draft_tokens() == 0


@pytest.mark.parametrize("before", [0, 20, 400], ids=lambda count: f"after {count} right")
@pytest.mark.parametrize("experts", [4, 8, 128])
def test_failing_proposals_cost_less_than_three_percent(before, experts):
    """Of the time without them; after right ones, no more than these have saved."""

    def layers(tokens: int) -> float:
        return cost(tokens, experts)

    gate = LookupGate()
    saved = 0.0
    if before:
        tokens, steps = run(gate, before, right, layers)
        saved = tokens - steps
    tokens, steps = run(gate, 1000, wrong, layers)
    assert steps - tokens <= CREDIT_PER_STEP * tokens + FIRST_CREDIT + max(0.0, saved)
    tokens, steps = run(gate, 1000, wrong, layers)
    assert tokens / steps > 0.97


def test_closed_gate_opens_again_where_proposals_are_right():
    gate = LookupGate()
    run(gate, 500, wrong)
    assert not gate.is_open
    run(gate, 200, right)
    assert gate.is_open
    tokens, steps = run(gate, 100, right)
    assert tokens > 3 * steps


def test_nothing_is_proposed_where_right_proposals_do_not_pay():
    """A pass takes as long as its tokens would one by one: nothing is gained, and little lost."""
    gate = LookupGate()
    tokens, steps = run(
        gate, 1000, lambda place, drafted: max(0, drafted - 1), lambda tokens: tokens
    )
    assert tokens / steps > 0.97


def test_shorter_drafts_that_do_not_pay_are_not_proposed():
    """Although a longer one would, whose risk exceeds the credit."""
    gate = LookupGate()
    times = {3: 3.4, 5: 3.6, 9: 3.8, 17: 4.0}
    for _ in range(MIN_STEPS):
        gate.record(0, 0, STEP_S)
    for _ in range(3):
        gate.record(SHORTEST, SHORTEST, times[3] * STEP_S)
    assert gate.expected(SHORTEST) < gate.cost(SHORTEST + 1)
    assert gate.is_open
    assert gate.draft_tokens() == 0


def test_edited_copies_pay():
    """Every third draft is wrong after its first token."""
    gate = LookupGate()
    tokens, steps = run(gate, 300, lambda place, drafted: 1 if place % 3 == 0 else drafted)
    assert tokens > 1.5 * steps


def test_one_delay_does_not_close_the_gate():
    gate = LookupGate()
    run(gate, 20, right)
    gate.record(DRAFT_TOKENS[-1], DRAFT_TOKENS[-1], 100 * STEP_S)
    assert gate.is_open
    gate.record(0, 0, 100 * STEP_S)
    run(gate, 20, right)
    assert gate.cost(17) == pytest.approx(cost(17), rel=0.3)


def test_cost_of_lengths_not_yet_timed_is_between_known_ones():
    gate = LookupGate()
    assert gate.cost(1) == 1
    assert gate.cost(3) == 2
    for _ in range(MIN_STEPS):
        assert gate.draft_tokens() == 0
        gate.record(0, 0, STEP_S)
    assert gate.draft_tokens() == SHORTEST
    gate.record(2, 2, 1.6 * STEP_S)
    assert gate.cost(3) == pytest.approx(1.6)
    assert gate.cost(5) == pytest.approx(2.2)
    gate.record(8, 8, 2 * STEP_S)
    assert gate.cost(5) == pytest.approx(2.0)
