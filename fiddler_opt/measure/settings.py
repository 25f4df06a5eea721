"""ProfileSettings: how thoroughly a machine is measured."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ProfileSettings:
    """The token counts to time, how often and for how long.

    Attributes:
        tokens: token counts of a timed expert.
        dense_tokens: token counts of a timed layer without experts.
        rounds: passes over all figures, about a minute apart. Their median is robust against a
            temporary slowdown; a single round mispredicts decode by 5%.
        seconds: approximate time for the figures that are timed together.
        memory_fraction: fraction of the available host memory that the timed experts fill.
    """

    tokens: tuple[int, ...]
    dense_tokens: tuple[int, ...]
    rounds: int
    seconds: float
    memory_fraction: float


THOROUGH = ProfileSettings(
    tokens=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
    dense_tokens=(1, 16, 128, 512, 2048),
    rounds=3,
    seconds=0.6,
    memory_fraction=0.75,
)
QUICK = ProfileSettings(
    tokens=(1, 4, 16, 64, 256, 1024),
    dense_tokens=(1, 128, 512),
    rounds=1,
    seconds=0.2,
    memory_fraction=0.25,
)


def profile_settings(quick: bool, num_ranks: int = 1) -> ProfileSettings:
    """The settings of a rank that shares this machine's memory with others."""
    settings = QUICK if quick else THOROUGH
    return replace(settings, memory_fraction=settings.memory_fraction / num_ranks)
