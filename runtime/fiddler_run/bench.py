"""How fast a loaded model runs: speeds of whole generations, and in a further one what each layer's time goes into."""

import json
import resource
import time
from dataclasses import asdict, dataclass
from itertools import cycle

import torch
import transformers

from fiddler_run.dispatch import Traffic
from fiddler_run.executors import Executors
from fiddler_run.generate import Measured, Options, generate_ids
from fiddler_run.host import cpu_name, num_cores
from fiddler_run.kernels.cpu import CompiledExperts
from fiddler_run.model import DispatchedMixtral
from fiddler_run.plan import Plan
from fiddler_run.timeline import Span

TRACED_TOKENS = 16
BARE_EXPERTS = 48  # at least so many, if there are


@dataclass(frozen=True)
class BenchResult:
    """`first` is the first generation after loading; `measured` the one after it, whose speeds count.

    `layer_ms`: milliseconds of a layer in decode: from one router's result to the next (`total`), of which each part was at
    work so long, and `waiting`, when neither the dense part nor any executor of experts was.
    `bytes_per_s`: expert bytes that a part handled while at work (the link's time includes resident blocks that the same GPU
    kernel computes), and, as `absent`, that CPU and link together handled while either was.
    `bare_bytes_per_s`: what the same memory gives to loops that only read with the CPU's threads, only copy to the GPU, and do
    both at once.
    Peaks: what PyTorch's allocator held, what the whole GPU held at the end, and what this process held in RAM.
    """

    first: Measured
    measured: Measured
    layer_ms: dict[str, float]
    bytes_per_s: dict[str, float]
    bare_bytes_per_s: dict[str, float]
    peak_gpu_bytes: int
    used_gpu_bytes: int
    peak_host_bytes: int


def bench(model: DispatchedMixtral, prompt_tokens: int, output_tokens: int, num_beams: int = 1) -> tuple[BenchResult, list[Span]]:
    """Generates, greedily, after `prompt_tokens` random ones: a few tokens, then `output_tokens`, then a few under the timeline."""
    timeline, layers = model.executors.timeline, model.plan.model.num_layers
    ids = torch.randint(3, model.config.vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    traced = min(output_tokens, TRACED_TOKENS)

    def run(tokens: int) -> Measured:
        options = Options(max_new_tokens=tokens, num_beams=num_beams)
        return generate_ids(model, ids, options, min_new_tokens=tokens, pad_token_id=0)[1]

    first, measured = run(traced), run(output_tokens)
    timeline.start()
    try:
        traffic = run(traced).traffic
        model.executors.finish_cpu()  # or its last job would be missing
    finally:
        spans = timeline.stop()
    first_call = max(span.call for span in spans) + 1 - (traced - 1) * layers
    decode = [span for span in spans if span.call >= first_call]
    result = BenchResult(
        first=first,
        measured=measured,
        layer_ms=_layer_ms(decode),
        bytes_per_s=_rates(decode, traffic, model.plan.block_bytes),
        bare_bytes_per_s=_bare_rates(model),
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


def _layer_ms(spans: list[Span]) -> dict[str, float]:
    results = [span.stop_s for span in spans if span.name == "wait for the router"]
    if len(results) < 2:
        return {}
    calls = len(results) - 1
    within = [span for span in spans if results[0] <= span.start_s < results[-1]]
    lanes = {name: [span for span in within if span.name == name] for name in ("dense", "resident", "streamed")}
    lanes |= {lane: [span for span in within if span.lane == lane] for lane in ("link", "CPU")}
    total = results[-1] - results[0]
    waiting = total - _covered_s([span for each in lanes.values() for span in each])
    seconds = {"total": total, **{name: _covered_s(each) for name, each in lanes.items()}, "waiting": waiting}
    return {name: value / calls * 1e3 for name, value in seconds.items()}


def _rates(spans: list[Span], traffic: Traffic, block_bytes: int) -> dict[str, float]:
    link, cpu = ([span for span in spans if span.lane == lane] for lane in ("link", "CPU"))
    alone = [] if any(span.name == "in place" for span in spans) else [span for span in spans if span.name == "resident"]
    handled = {
        "resident": (traffic.resident_blocks, alone),
        "link": (traffic.streamed_blocks, link),
        "CPU": (traffic.cpu_blocks, cpu),
        "absent": (traffic.streamed_blocks + traffic.cpu_blocks, link + cpu),
    }
    return {name: blocks * block_bytes / _covered_s(during) for name, (blocks, during) in handled.items() if blocks and during}


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


def _covered_s(spans: list[Span]) -> float:
    """Seconds in which at least one of the spans was under way."""
    covered, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start_s):
        covered += max(0.0, span.stop_s - max(span.start_s, until))
        until = max(until, span.stop_s)
    return covered


def _used_gpu_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free
