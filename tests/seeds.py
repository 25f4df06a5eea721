"""Seeds for tests with random cases."""

import pytest


def seeds(usual: int, count: int) -> list:
    """The seeds 0 to `count` - 1; only the first `usual` are run by default."""
    return [
        pytest.param(seed, marks=() if seed < usual else pytest.mark.slow) for seed in range(count)
    ]
