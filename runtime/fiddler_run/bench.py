"""How fast a loaded model runs: speeds of whole generations, and in a further one what the time goes into."""

import json
import resource
import time
from dataclasses import asdict, dataclass
from itertools import cycle, pairwise

import torch
import transformers

from fiddler_run.balance import prompts_favour_link, shares
from fiddler_run.dispatch import Traffic
from fiddler_run.executors import Executors
from fiddler_run.generate import Measured, Options, generate_ids, never_stopping
from fiddler_run.host import cpu_name, num_cores
from fiddler_run.kernels.cpu import CompiledExperts
from fiddler_run.model import DispatchedMixtral
from fiddler_run.plan import Plan
from fiddler_run.timeline import Span

TRACED_TOKENS = 16
BARE_EXPERTS = 48  # at least so many, if there are
Interval = tuple[float, float]  # seconds


@dataclass(frozen=True)
class PhaseTimes:
    """What a decode step, or a whole prompt, spends its time on. Of a single layer, nothing is told.

    `ms`: milliseconds, together the whole time. `absent`: blocks in host memory or on disk were at work, on the CPU, over the link
    or, having arrived, on the device; `resident`: none of those, but resident ones; `dense`: the rest of the layers; `head`: the
    rest of the step.
    `at_work_ms`: how long each part was at work, at the same time as others; `idle`: none was, in the layers: something was
    handed over, or all waited for Python.
    `bytes_per_s`: expert bytes that a part handled while at work (the link's time includes resident blocks that the same GPU
    kernel computes), and, as `absent`, that CPU and link together handled while those of `ms["absent"]` were.
    `passes`: through all layers, of `tokens_per_pass` each, on average; of these, `tokens_per_expert` called an expert at once.
    """

    passes: int
    tokens_per_pass: float
    tokens_per_expert: float
    ms: dict[str, float]
    at_work_ms: dict[str, float]
    bytes_per_s: dict[str, float]


@dataclass(frozen=True)
class BenchResult:
    """`first` is the first generation after loading; `measured` the one after it, whose speeds count; `prefill` and `decode`
    a third one's, taken with the timeline on.

    `bare_bytes_per_s`: what the same memory gives to loops that only read with the CPU's threads, only copy to the GPU, and do
    both at once.
    `stream_share`: the share of a layer's absent blocks that the link has for one token, by layer, if that was found after loading;
    `prompts_favour_link`: how many times the plan's blocks it has with long prompts, for each of the CPU's.
    Peaks: what PyTorch's allocator held, what the whole GPU held at the end, and what this process held in RAM.
    """

    num_beams: int
    batch_size: int
    first: Measured
    measured: Measured
    prefill: PhaseTimes
    decode: PhaseTimes
    bare_bytes_per_s: dict[str, float]
    stream_share: dict[int, float]
    prompts_favour_link: float
    peak_gpu_bytes: int
    used_gpu_bytes: int
    peak_host_bytes: int


def bench(
    model: DispatchedMixtral, prompt_tokens: int, output_tokens: int, num_beams: int = 1, batch_size: int = 1
) -> tuple[BenchResult, list[Span]]:
    """Generates, greedily, after `prompt_tokens` random ones of each sequence: a few tokens, then `output_tokens`, then a few
    under the timeline."""
    timeline = model.executors.timeline
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (batch_size, prompt_tokens), generator=generator)
    traced = min(output_tokens, TRACED_TOKENS)

    def run(tokens: int) -> Measured:
        options = Options(max_new_tokens=tokens, num_beams=num_beams)
        return generate_ids(model, ids, options, **never_stopping(model))[1]

    first, measured = run(traced), run(output_tokens)
    model.executors.finish_cpu()  # or its last job would appear on the timeline
    with timeline.recording() as spans:
        observed = run(traced)
        model.executors.finish_cpu()  # or its last job would be missing
    layers, sequences = model.plan.model.num_layers, num_beams * batch_size
    passes = (1 + max(span.call for span in spans)) // layers - (traced - 1)  # of the prompt
    prompts = batch_size * prompt_tokens + sequences - batch_size  # beams have their last token each
    of_prefill, of_decode = ([span for span in spans if (span.call < passes * layers) == first] for first in (True, False))
    step_s = batch_size / observed.decode_tokens_per_s
    result = BenchResult(
        num_beams=num_beams,
        batch_size=batch_size,
        first=first,
        measured=measured,
        prefill=_phase(model.plan, of_prefill, observed.prefill_traffic, observed.ttft_s, passes, prompts / passes),
        decode=_phase(model.plan, of_decode, observed.traffic, step_s, 1, sequences),
        bare_bytes_per_s=_bare_rates(model),
        stream_share=shares(model),
        prompts_favour_link=prompts_favour_link(model),
        peak_gpu_bytes=measured.peak_gpu_bytes,
        used_gpu_bytes=_used_gpu_bytes(model.device),
        peak_host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    return result, spans


def as_json(result: BenchResult, plan: Plan, load_s: float, command: str) -> str:
    machine = {
        "cpu": cpu_name(),
        "cores": num_cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    about = {"command": command, "machine": machine, "plan": plan.provenance.model_dump(), "load_s": load_s}
    expected = {"predicted": plan.predicted.model_dump(), "profiled_bytes_per_s": plan.bytes_per_s.model_dump()}
    return json.dumps({**about, **expected, **asdict(result)}, indent=2)


def _phase(plan: Plan, spans: list[Span], traffic: Traffic, seconds: float, passes: int, tokens_per_pass: float) -> PhaseTimes:
    """
    Args:
        spans, traffic: of the phase, or of several equal ones.
        seconds, passes: of one.
    """
    layers = plan.model.num_layers
    at_work, ms = _at_work(spans, layers * passes), {}
    if at_work:
        of_layers = at_work.pop("layers")
        ms = {"absent": at_work.pop("absent")}
        ms["resident"] = at_work.pop("experts") - ms["absent"]
        ms["dense"] = of_layers - ms["absent"] - ms["resident"]
        ms["head"] = max(0.0, seconds * 1e3 - of_layers)
    layers_seen = sum(span.name == "wait for the router" for span in spans)
    choices = layers_seen * tokens_per_pass * plan.model.num_experts_per_tok
    per_expert = choices / (traffic.needed_blocks / plan.blocks_per_expert)
    return PhaseTimes(passes, tokens_per_pass, per_expert, ms, at_work, _rates(spans, traffic, plan.block_bytes))


def _at_work(spans: list[Span], layers: float) -> dict[str, float]:
    """Milliseconds that so many layers took, and in which each part of them was at work, from what is seen between the routers'
    results of one layer and the next."""
    results = sorted((span for span in spans if span.name == "wait for the router"), key=lambda span: span.stop_s)
    windows = [(a.stop_s, b.stop_s) for a, b in pairwise(results) if b.layer == a.layer + 1]
    if not windows:
        return {}

    def milliseconds(*which: str) -> float:
        at_work = _union([span for span in spans if span.lane in which or span.name in which])
        return _length_s(_intersection(at_work, windows)) / len(windows) * layers * 1e3

    total = _length_s(windows) / len(windows) * layers * 1e3
    absent = "blocks", "link", "streamed"  # blocks: on the CPU
    return {
        "layers": total,
        "absent": milliseconds(*absent),
        "experts": milliseconds(*absent, "resident"),
        **{name: milliseconds(name) for name in ("dense", "resident", "streamed", "link")},
        "CPU": milliseconds("blocks"),
        "idle": total - milliseconds(*absent, "resident", "dense"),
    }


def _rates(spans: list[Span], traffic: Traffic, block_bytes: int) -> dict[str, float]:
    link, cpu = ([span for span in spans if which in (span.lane, span.name)] for which in ("link", "blocks"))
    in_place, alone = (any(span.name == "in place" for span in spans), [span for span in spans if span.name == "resident"])
    cpu_blocks = traffic.cpu_blocks + (0 if in_place or alone else traffic.resident_blocks)  # without a GPU, it does all
    handled = {
        "resident": (traffic.resident_blocks, [] if in_place else alone),
        "link": (traffic.streamed_blocks, link),
        "CPU": (cpu_blocks, cpu),
        "absent": (traffic.streamed_blocks + cpu_blocks, link + cpu + [span for span in spans if span.name == "streamed"]),
    }
    return {
        name: blocks * block_bytes / _length_s(_union(during)) for name, (blocks, during) in handled.items() if blocks and during
    }


def _bare_rates(model: DispatchedMixtral) -> dict[str, float]:
    """Over experts from all over the host arena, one after the other, as decode visits them; both at once at the best share."""
    executors, share = model.executors, model.plan.stream_share_at(1)
    absent = [blocks for row in model.store.absent for blocks in row if len(blocks)]
    absent = absent[:: max(1, len(absent) // BARE_EXPERTS)]
    if not absent or not isinstance(executors.cpu, CompiledExperts):
        return {}
    rates = {"CPU": _bare_rate(executors, absent, 0.0)}
    if executors.ring is not None and executors.ring.copy_stream is not None:
        rates["link"] = _bare_rate(executors, absent, 1.0)
        rates["absent"] = max(_bare_rate(executors, absent, min(1.0, share * factor)) for factor in (0.8, 1.0, 1.2, 1.4))
    return rates


def _bare_rate(executors: Executors, experts: list[torch.Tensor], share: float) -> float:
    """Bytes per second of copying `share` of each expert's blocks to the device while the CPU reads the others."""
    started = time.perf_counter()
    for blocks in experts:
        copied = round(share * len(blocks))
        if copied:
            with torch.cuda.stream(executors.ring.copy_stream):
                for block, slot in zip(blocks[:copied], cycle(executors.ring.slots), strict=False):
                    slot.copy_(block, non_blocking=True)
        if copied < len(blocks):
            executors.cpu.read(blocks[copied:])
        if copied:
            executors.ring.copy_stream.synchronize()
    return sum(blocks.nbytes for blocks in experts) / (time.perf_counter() - started)


def _union(spans: list[Span]) -> list[Interval]:
    """When at least one of the spans was under way: apart from each other, in order."""
    merged: list[Interval] = []
    for span in sorted(spans, key=lambda span: span.start_s):
        if merged and span.start_s <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], span.stop_s)
        else:
            merged.append((span.start_s, span.stop_s))
    return merged


def _intersection(some: list[Interval], others: list[Interval]) -> list[Interval]:
    """When both are under way; each is apart and in order."""
    common, i, j = [], 0, 0
    while i < len(some) and j < len(others):
        start, stop = max(some[i][0], others[j][0]), min(some[i][1], others[j][1])
        if start < stop:
            common.append((start, stop))
        if some[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return common


def _length_s(intervals: list[Interval]) -> float:
    return sum(stop - start for start, stop in intervals)


def _used_gpu_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free
