"""Re-tunes the CPU/link split once the weights are loaded, from measured times.

Decode gets a factor per layer, prefill one factor for all layers. The plan's split is right for the
average speed of memory and CPU at the time of profiling. But the system places a layer's experts
differently at each start, for example on another NUMA node or, in a virtual machine, in memory that
others use. Also, the tokens of a real prompt rarely fill an expert's tiles. After that the split is
fixed: the same input gives the same bits as long as the model is loaded, but not after it is loaded
again. Another model that runs in the same process meanwhile would disturb the measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from fiddler_run.engine.layer import ExpertsLayer
from fiddler_run.engine.resources import Resources
from fiddler_run.engine.timeline import Span, Work, whole_s
from fiddler_run.kernels.limits import MAX_DECODE_TOKENS
from fiddler_run.plan.shape import ModelShape
from fiddler_run.plan.split import split

ROUNDS = 2
TOKENS = 4  # measured in each round
PROMPT_TOKENS = 128  # per expert: enough to give both CPU and link a substantial share
MAX_CHANGE = 3.0  # largest factor by which a round may change the odds


@dataclass(frozen=True)
class Tuning:
    """Factors that multiply the plan's odds, the ratio of streamed blocks to blocks on the CPU.

    `decode`: by layer, for one token; layers that use only CPU or only link are left out.
    `prefill`: one factor for long prompts in all layers.
    """

    decode: dict[int, float] = field(default_factory=dict)
    prefill: float = 1.0

    def apply(self, layers: Sequence[ExpertsLayer]) -> None:
        """Applies the factors to the layers."""
        for layer in layers:
            layer.prefill_odds = self.prefill
            if layer.decode is not None:
                layer.decode.scale_odds(self.decode.get(layer.number, 1.0))


@dataclass(frozen=True)
class RouterSizes:
    """The sizes of a model's router: experts, experts per token, and the width of its input."""

    num_experts: int
    top_k: int
    hidden_size: int

    @classmethod
    def of(cls, shape: ModelShape) -> RouterSizes:
        return cls(shape.num_experts, shape.num_experts_per_tok, shape.hidden_size)


@dataclass(frozen=True)
class LayerTimes:
    """One layer's host blocks for one token.

    `streamed` and `on_cpu` count them, `link_s` and `cpu_s` are the busy seconds of each resource,
    and `both_s` is the elapsed time of both together.
    """

    streamed: int
    on_cpu: int
    link_s: float
    cpu_s: float
    both_s: float


def tune(
    layers: Sequence[ExpertsLayer], resources: Resources, router: RouterSizes, prompt_tokens: int
) -> Tuning:
    """Finds the factors with which CPU and link finish at the same time.

    Applies them to the layers.

    Args:
        prompt_tokens: the largest batch of prefill.
    """
    prefill = _tune_prefill(layers, resources, router, prompt_tokens)
    return _tune_decode(layers, resources, router, prefill)


def decode_shares(layers: Sequence[ExpertsLayer]) -> dict[int, float]:
    """By layer, the stream share for one token, where both CPU and link are used."""
    with_host = [
        layer
        for layer in layers
        if layer.decode is not None and any(expert.num_host for expert in layer.experts)
    ]
    shares = {layer.number: layer.decode.shares[1] for layer in with_host}
    return {number: share for number, share in shares.items() if 0 < share < 1}


def _tune_decode(
    layers: Sequence[ExpertsLayer], resources: Resources, router: RouterSizes, tuning: Tuning
) -> Tuning:
    tuned = [layer for layer in layers if layer.decode is not None]
    if resources.kernels.decode is None or not decode_shares(tuned):
        return tuning
    for _ in range(ROUNDS):
        tokens = [measure_token(tuned, resources, router, number) for number in range(TOKENS)]
        odds = dict(tuning.decode)
        for layer, times in zip(tuned, zip(*tokens, strict=True), strict=True):
            share = layer.decode.shares[1]
            # Ratio of the CPU's time to the link's, per block, because whole blocks do not match a
            # share exactly.
            factors = [
                (each.cpu_s / each.on_cpu * (1 - share)) / (each.link_s / each.streamed * share)
                for each in times
                if each.on_cpu and each.streamed
            ]
            if factors:
                odds[layer.number] = odds.get(layer.number, 1.0) * _limited(median(factors))
        tuning = Tuning(odds, tuning.prefill)
        tuning.apply(layers)
    return tuning


def _tune_prefill(
    layers: Sequence[ExpertsLayer], resources: Resources, router: RouterSizes, prompt_tokens: int
) -> Tuning:
    per_token = router.top_k / router.num_experts
    tokens = min(int(PROMPT_TOKENS / per_token), prompt_tokens)
    has_host = any(expert.num_host for layer in layers for expert in layer.experts)
    share = layers[0].stream_share(int(tokens * per_token)) if layers else 0.0
    tuning = Tuning()
    if tokens <= MAX_DECODE_TOKENS or not has_host or share in (0, 1):
        return tuning
    for _ in range(ROUNDS):
        times = measure_prompt(layers, resources, router, tokens)
        factors = [cpu_s / link_s for cpu_s, link_s in times if cpu_s and link_s]
        factor = _limited(median(factors)) if factors else 1.0
        tuning = Tuning({}, tuning.prefill * factor)
        tuning.apply(layers)
    return tuning


def _limited(factor: float) -> float:
    return min(MAX_CHANGE, max(1 / MAX_CHANGE, factor))


@torch.inference_mode()
def measure_prompt(
    layers: Sequence[ExpertsLayer], resources: Resources, router: RouterSizes, tokens: int
) -> list[tuple[float, float]]:
    """Computes every layer's experts for a batch of random states with random choices.

    Returns:
        For each layer, the busy seconds of CPU and link, including the prefetch for the next layer.
    """
    device = resources.device
    generator = torch.Generator(device).manual_seed(0)
    random = {"generator": generator, "device": device}
    states = torch.randn(tokens, router.hidden_size, dtype=resources.dtype, **random)
    weights, index = torch.rand(tokens, router.num_experts, **random).topk(router.top_k)
    of_calls = _spans(layers, resources, states, index, weights)
    return [(_at_work_s(spans, Work.BLOCKS), _at_work_s(spans, Work.COPY)) for spans in of_calls]


@torch.inference_mode()
def measure_token(
    layers: Sequence[ExpertsLayer], resources: Resources, router: RouterSizes, number: int = 0
) -> list[LayerTimes]:
    """Computes every layer's experts for one token, one layer after the other.

    The called experts are spread over a layer's memory. A different `number` calls different
    experts.
    """
    device = resources.device
    states = torch.zeros(1, router.hidden_size, dtype=resources.dtype, device=device)
    top_k = router.top_k
    step = router.num_experts // top_k
    first = number * max(1, router.num_experts // (top_k * TOKENS))
    chosen = sorted((first + choice * step) % router.num_experts for choice in range(top_k))
    index = torch.tensor([chosen], device=device)
    weights = torch.full((1, top_k), 1 / top_k, device=device)
    of_calls = _spans(layers, resources, states, index, weights)
    return [
        _layer_times(layer, chosen, spans) for layer, spans in zip(layers, of_calls, strict=True)
    ]


def _spans(
    layers: Sequence[ExpertsLayer],
    resources: Resources,
    states: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
) -> list[list[Span]]:
    """The timeline's spans of each layer's experts, computed one layer after the other."""
    resources.jobs.finish()  # otherwise its last job would appear on the timeline
    with resources.timeline.recording() as spans:
        for layer in layers:
            layer(states, index, weights)
        resources.jobs.finish()
    return [[span for span in spans if span.call == call] for call in range(len(layers))]


def _layer_times(layer: ExpertsLayer, chosen: list[int], spans: list[Span]) -> LayerTimes:
    counts = [layer.experts[expert].num_host for expert in chosen]
    streamed = sum(split((layer.decode.shares[1], count) for count in counts))
    on_cpu = sum(counts) - streamed
    blocks = {Work.BLOCKS: on_cpu, Work.IN_PLACE: streamed}
    at_work = [span for span in spans if blocks.get(span.name)]
    link_s = _at_work_s(at_work, Work.IN_PLACE)
    cpu_s = _at_work_s(at_work, Work.BLOCKS)
    return LayerTimes(streamed, on_cpu, link_s, cpu_s, whole_s(at_work))


def _at_work_s(spans: list[Span], work: Work) -> float:
    return sum(span.stop_s - span.start_s for span in spans if span.name == work)
