"""Breaks the time of a phase into parts, from the spans of a timeline."""

from dataclasses import dataclass
from itertools import pairwise

from fiddler_run.engine.calls import Traffic
from fiddler_run.engine.timeline import Lane, Span, Work
from fiddler_run.generation.intervals import intersection, length_s, union
from fiddler_run.plan.schema import Plan


@dataclass(frozen=True)
class PhaseTimes:
    """The parts of a decode step's time or of a prompt's time, over all layers.

    `ms`: milliseconds by part, which add up to the whole. `host`: blocks in host memory or on disk
    are being computed, by the CPU, over the link or on the device after arrival. `resident`: only
    resident blocks are being computed. `exchange`: states and sums are on their way between ranks,
    or another rank is waited for. `dense`: the rest of the layers. `head`: the rest of the step.

    `at_work_ms`: how long each resource was busy, at the same time as others; `idle`: none was
    within the layers, during a hand-over or while all waited for Python. `bytes_per_s`: the expert
    bytes that a resource handled per busy second; the link's time includes resident blocks computed
    by the same GPU kernel. Its `host` entry is the rate of CPU and link together during
    `ms["host"]`.

    `passes`: through all layers, with `tokens_per_pass` tokens each, of which `tokens_per_expert`
    called an expert at once, on average.
    """

    passes: int
    tokens_per_pass: float
    tokens_per_expert: float
    ms: dict[str, float]
    at_work_ms: dict[str, float]
    bytes_per_s: dict[str, float]


def phase_times(
    plan: Plan,
    spans: list[Span],
    traffic: list[Traffic],
    seconds: float,
    passes: int,
    tokens_per_pass: float,
    rank: int = 0,
) -> PhaseTimes:
    """The parts of a phase's time in one rank.

    Args:
        spans: of the rank, in the phase or in several equal ones.
        traffic: likewise, of each rank.
        seconds, passes: of one phase.
    """
    layers = plan.model.num_layers
    at_work = _at_work(spans, layers * passes)
    ms = {}
    if at_work:
        of_layers = at_work.pop("layers")
        ms = {"host": at_work.pop("host")}
        experts = at_work.pop("experts")
        ms["resident"] = experts - ms["host"]
        ms["exchange"] = at_work.pop("with_others") - experts
        ms["dense"] = of_layers - experts - ms["exchange"]
        ms["head"] = max(0.0, seconds * 1e3 - of_layers)
    layers_seen = sum(span.name == Work.ROUTER for span in spans)
    choices = layers_seen * tokens_per_pass * plan.model.num_experts_per_tok
    needed_blocks = sum(each.needed_blocks for each in traffic)
    per_expert = choices / (needed_blocks / plan.blocks_per_expert)
    rates = _rates(spans, traffic[rank], plan.block_bytes)
    return PhaseTimes(passes, tokens_per_pass, per_expert, ms, at_work, rates)


def _at_work(spans: list[Span], layers: float) -> dict[str, float]:
    """Milliseconds of `layers` layers, and how long each resource was busy in them.

    A layer lasts from its router's result to that of the next layer.
    """
    results = sorted(
        (span for span in spans if span.name == Work.ROUTER), key=lambda span: span.stop_s
    )
    windows = [(a.stop_s, b.stop_s) for a, b in pairwise(results) if b.layer == a.layer + 1]
    if not windows:
        return {}

    def milliseconds(*which: str) -> float:
        at_work = union([span for span in spans if span.lane in which or span.name in which])
        return length_s(intersection(at_work, windows)) / len(windows) * layers * 1e3

    total = length_s(windows) / len(windows) * layers * 1e3
    host = (Work.BLOCKS, Lane.LINK, Work.STREAMED)
    return {
        "layers": total,
        "host": milliseconds(*host),
        "experts": milliseconds(*host, Work.RESIDENT),
        "with_others": milliseconds(*host, Work.RESIDENT, Work.EXCHANGE),
        "dense": milliseconds(Work.DENSE),
        "resident": milliseconds(Work.RESIDENT),
        "streamed": milliseconds(Work.STREAMED),
        "link": milliseconds(Lane.LINK),
        "CPU": milliseconds(Work.BLOCKS),
        "idle": total - milliseconds(*host, Work.RESIDENT, Work.EXCHANGE, Work.DENSE),
    }


def _rates(spans: list[Span], traffic: Traffic, block_bytes: int) -> dict[str, float]:
    link, cpu = (
        [span for span in spans if which in (span.lane, span.name)]
        for which in (Lane.LINK, Work.BLOCKS)
    )
    in_place = any(span.name == Work.IN_PLACE for span in spans)
    alone = [span for span in spans if span.name == Work.RESIDENT]
    cpu_blocks = traffic.cpu_blocks
    if not in_place and not alone:  # without a GPU, the CPU does everything
        cpu_blocks += traffic.resident_blocks
    handled = {
        "resident": (traffic.resident_blocks, [] if in_place else alone),
        "link": (traffic.streamed_blocks, link),
        "CPU": (cpu_blocks, cpu),
        "host": (
            traffic.streamed_blocks + cpu_blocks,
            link + cpu + [span for span in spans if span.name == Work.STREAMED],
        ),
    }
    return {
        name: blocks * block_bytes / length_s(union(during))
        for name, (blocks, during) in handled.items()
        if blocks and during
    }
