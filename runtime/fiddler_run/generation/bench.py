"""Benchmarks a loaded model: the speed of whole generations, and the parts of their time."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
import transformers

from fiddler_run.engine.timeline import Span
from fiddler_run.engine.tuning import decode_shares
from fiddler_run.generation.bare_rates import bare_rates
from fiddler_run.generation.generate import Measured, generate_ids, never_stopping
from fiddler_run.generation.model import PlannedModel
from fiddler_run.generation.phase_times import PhaseTimes, phase_times
from fiddler_run.generation.sampling import Options
from fiddler_run.plan.schema import Plan
from fiddler_run.system.host import cpu_name, num_cores

TRACED_TOKENS = 16


@dataclass(frozen=True)
class BenchResult:
    """The measurements of three generations.

    `first` is the first one after loading. `measured` follows it; its speeds are the reported ones.
    `prefill` and `decode` come from a third one, with the timeline on. `other_ranks` are the decode
    of the ranks after the first. `bare_bytes_per_s`: see `bare_rates`. `stream_share` is by layer,
    for one token, as tuned after loading. `prefill_odds` is the factor on the plan's odds,
    streamed : CPU, for long prompts. Peaks are what PyTorch's allocator held, what the whole GPU
    held at the end, and what this process held in RAM.
    """

    num_beams: int
    batch_size: int
    first: Measured
    measured: Measured
    prefill: PhaseTimes
    decode: PhaseTimes
    other_ranks: list[PhaseTimes]
    bare_bytes_per_s: dict[str, float]
    stream_share: dict[int, float]
    prefill_odds: float
    peak_gpu_bytes: int
    used_gpu_bytes: int
    peak_host_bytes: int


def bench(
    model: PlannedModel,
    prompt_tokens: int,
    output_tokens: int,
    num_beams: int = 1,
    batch_size: int = 1,
) -> tuple[BenchResult, list[list[Span]]]:
    """Generates greedily from random tokens, three times, the last time under the timeline.

    Returns:
        The measurements, and the spans of each rank.
    """
    jobs = model.engine.resources.jobs
    kernels = model.engine.resources.kernels
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        3, model.config.vocab_size, (batch_size, prompt_tokens), generator=generator
    )
    traced = min(output_tokens, TRACED_TOKENS)

    def run(tokens: int) -> Measured:
        options = Options(max_new_tokens=tokens, num_beams=num_beams)
        return generate_ids(model, ids, options, **never_stopping(model))[1]

    first = run(traced)
    measured = run(output_tokens)
    jobs.finish()  # otherwise its last job would appear on the timeline
    with recording(model) as spans:
        observed = run(traced)
        jobs.finish()  # otherwise its last job would be missing
    prefill, decode = _phases(model.plan, spans, observed, traced, num_beams, batch_size)
    result = BenchResult(
        num_beams=num_beams,
        batch_size=batch_size,
        first=first,
        measured=measured,
        prefill=prefill,
        decode=decode[0],
        other_ranks=decode[1:],
        bare_bytes_per_s=bare_rates(model),
        stream_share=decode_shares(model.layers) if kernels.decode else {},
        prefill_odds=model.tuning.prefill,
        peak_gpu_bytes=measured.peak_gpu_bytes,
        used_gpu_bytes=_used_gpu_bytes(model.device),
        peak_host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    return result, spans


@contextmanager
def recording(model: PlannedModel) -> Iterator[list[list[Span]]]:
    """Records the timelines of all ranks. Yields a list, filled with the spans of each in the end.

    Times are since the start of rank 0's timeline. Those of ranks on other machines, whose clocks
    differ, are since the start of their own, a round trip earlier.
    """
    timeline = model.engine.resources.timeline
    peers = model.peers
    by_rank: list[list[Span]] = []
    try:
        if peers is not None:
            peers.replies(peers.request(do="trace"))
        with timeline.recording() as own:
            yield by_rank
    except BaseException:
        if peers is not None:
            peers.tell(do="traced", request=None)  # nobody waits for the reply
        raise
    replies = peers.replies(peers.request(do="traced")) if peers is not None else []
    by_rank.append(own)
    here = model.plan.ranks_beside(0)
    for rank, reply in enumerate(replies, 1):
        late_s = reply["origin_s"] - timeline.origin_s if rank in here else 0.0
        by_rank.append([Span(*each).later(late_s) for each in reply["spans"]])


def _phases(
    plan: Plan,
    spans: list[list[Span]],
    observed: Measured,
    output_tokens: int,
    num_beams: int,
    batch_size: int,
) -> tuple[PhaseTimes, list[PhaseTimes]]:
    """The times of prefill in rank 0, and of decode in each, from the spans of one generation."""
    layers = plan.model.num_layers
    sequences = num_beams * batch_size
    # passes of the prompt
    passes = (1 + max(span.call for span in spans[0])) // layers - (output_tokens - 1)
    # Each beam passes the prompt's last token separately.
    prompts = batch_size * observed.prompt_tokens + sequences - batch_size
    of_prefill = [span for span in spans[0] if span.call < passes * layers]
    of_decode = [[span for span in each if span.call >= passes * layers] for each in spans]
    step_s = batch_size / observed.decode_tokens_per_s
    per_pass = prompts / passes
    prefill = phase_times(
        plan, of_prefill, observed.prefill_traffic_by_rank, observed.ttft_s, passes, per_pass
    )
    decode = [
        phase_times(plan, of_rank, observed.traffic_by_rank, step_s, 1, sequences, rank)
        for rank, of_rank in enumerate(of_decode)
    ]
    return prefill, decode


def as_json(result: BenchResult, plan: Plan, load_s: float, command: str) -> str:
    machine = {
        "cpu": cpu_name(),
        "cores": num_cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    about = {
        "command": command,
        "machine": machine,
        "plan": plan.provenance.model_dump(),
        "load_s": load_s,
    }
    expected = {
        "predicted": plan.predicted.model_dump(),
        "profiled_bytes_per_s": plan.bytes_per_s.model_dump(),
    }
    return json.dumps({**about, **expected, **asdict(result)}, indent=2)


def _used_gpu_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free
