"""Which cases run by default, and which only with `-m slow`."""

from collections.abc import Iterable

import pytest


def seeds(usual: int, count: int) -> list:
    """The seeds 0 to `count` - 1; only the first `usual` are run by default."""
    return [_case(seed, seed < usual) for seed in range(count)]


def spread(values: Iterable, usual: int) -> list:
    """All values; only `usual` of them, at equal distances, are run by default.

    A tuple has one value for each of several arguments.
    """
    values = list(values)
    chosen = {number * len(values) // usual for number in range(usual)}
    return [_case(value, number in chosen) for number, value in enumerate(values)]


def _case(value: object, is_usual: bool):
    arguments = value if isinstance(value, tuple) else (value,)
    return pytest.param(*arguments, marks=() if is_usual else pytest.mark.slow)
