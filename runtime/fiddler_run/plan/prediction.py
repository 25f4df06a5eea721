"""The sections of a plan that describe it: its predictions, and how it was made."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fiddler_run.plan.yaml_file import (
    Milliseconds,
    Rate,
    Ratio,
    Seconds,
    SecondsOrZero,
    Section,
)


class Rates(Section):
    """Bytes per second at which the profiled machine processes an expert's weights for one token.

    `host`: CPU and link together, from host memory.
    """

    resident: Rate
    link: Rate | None
    cpu: Rate
    host: Rate


class Alternative(Section):
    decode_tokens_per_s: Rate
    ttft_s: Seconds


class Predicted(Section):
    """What the planner expects of a plan on the profiled machine.

    `gap` is relative: (found - bound) / found, in seconds. `decode_ms` and `ttft_ms` are the
    milliseconds of a decode step and of the time to first token, by the parts of `plan.parts`.
    `binding` is the budget that limits the speed. `next_gb_tokens_per_s` is the gain from another
    GB of the first rank's GPU memory. `regret` is, by set of prompts, the relative extra time
    compared with a plan made for that set. `alternatives` are the predictions of simpler rules.
    """

    decode_tokens_per_s: Rate
    ttft_s: Seconds
    gpu_hit_rate: float = Field(ge=0, le=1)
    bound_tokens_per_s: Rate
    gap: Ratio
    decode_ms: dict[str, Milliseconds]
    ttft_ms: dict[str, Milliseconds]
    binding: Literal["GPU memory", "GPU and host memory", "host memory", "nothing"]
    next_gb_tokens_per_s: Annotated[float, Field(ge=0, le=1e18)]
    regret: dict[str, Ratio]
    alternatives: dict[str, Alternative]


class Provenance(Section):
    """How the plan was made.

    `machine` names the profiles of all machines, joined by " + ". `network` is between them, as
    given to the planner; empty if there is one profile. `routing` is a file, or "uniform
    (assumed)".
    """

    optional: ClassVar[tuple[str, ...]] = ("network",)

    command: str
    machine: str
    machine_sha256: str
    machine_source: str
    network: str = ""
    routing: str
    solver: str
    status: str
    solve_s: SecondsOrZero
    created: str
