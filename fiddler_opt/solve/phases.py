"""The phases of a workload. A phase is a series of passes with the same number of tokens."""

from dataclasses import dataclass

from fiddler_run.plan.schema import Workload


@dataclass(frozen=True)
class Phase:
    """`steps` passes through the model with `tokens` tokens each.

    Tokens come in groups of `copies` equal ones, like the beams of a prompt at first.
    """

    name: str
    steps: int
    tokens: int
    copies: int = 1


def workload_phases(workload: Workload, chunk_tokens: int) -> list[Phase]:
    """The phases in order. Decode is always the last.

    A prompt passes once, in chunks. With beams, its last token passes separately, once per beam.
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
