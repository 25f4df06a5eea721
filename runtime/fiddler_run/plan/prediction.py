"""What a plan says of itself: its predictions, and how it was made."""

from typing import Annotated, Literal

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
    """Expert bytes per second that the profiled machine handles for one token.

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

    `gap` is relative: (found - bound) / found, in seconds. `decode_ms`, `ttft_ms`: milliseconds of
    a decode step, and until the first token, by the parts of `plan.parts`. `binding`: the budget of
    which more would be used. `next_gb_tokens_per_s`: what another GB of GPU memory would add.
    `regret`: by set of prompts, how much longer the workload takes there than with a plan for that
    set, as a part. `alternatives`: what rules of thumb give.
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
    """How the file was made. `routing` is a file, or "uniform (assumed)"."""

    command: str
    machine: str
    machine_sha256: str
    machine_source: str
    routing: str
    solver: str
    status: str
    solve_s: SecondsOrZero
    created: str
