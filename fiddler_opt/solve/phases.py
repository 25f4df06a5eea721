"""The phases of a workload: passes through the model with the same number of tokens."""

from dataclasses import dataclass

from fiddler_run.plan.schema import Workload


@dataclass(frozen=True)
class Phase:
    """`steps` passes through the model with `tokens` tokens each.

    Tokens come in groups of `copies` equal ones, as the beams of one prompt do at first.
    """

    name: str
    steps: int
    tokens: int
    copies: int = 1


def workload_phases(workload: Workload, chunk_tokens: int) -> list[Phase]:
    """The phases in their order; decode is always the last.

    Each prompt passes once, in chunks. With beams, its last token passes by itself, once for each
    beam.
    """
    beams = workload.num_beams > 1
    whole, rest = divmod(workload.prompt_tokens - beams, chunk_tokens)
    phases = []
    if whole:
        phases.append(Phase("prefill", whole, chunk_tokens * workload.batch_size))
    if rest:
        phases.append(Phase("prefill of the rest", 1, rest * workload.batch_size))
    if beams:
        phases.append(
            Phase("prefill of the last token", 1, workload.sequences, copies=workload.num_beams)
        )
    return [*phases, Phase("decode", workload.output_tokens - 1, workload.sequences)]
