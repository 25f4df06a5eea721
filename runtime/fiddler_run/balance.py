"""After loading, absent blocks are divided anew between link and CPU, by what both take for them: for few tokens in each layer by
itself, for long prompts in all layers alike.

The plan's division is right where memory and CPU are as fast as they were, on average, when the machine was profiled. But a layer's
experts lie where the system put them, which differs from one start to the next: on another NUMA node, or, in a virtual machine, in
memory that others are using; and a prompt does not call experts by whole tiles of tokens. Found once, a division stays: the same
input gives the same bits as long as the model is loaded, but not when it is loaded again. Another model that runs meanwhile in the
same process would disturb what is found.
"""

from dataclasses import dataclass
from statistics import median

import torch

from fiddler_run.dispatch import LayerDispatch
from fiddler_run.model import DispatchedMixtral
from fiddler_run.timeline import Span, whole_s

ROUNDS, TOKENS = 2, 4  # how often the division changes, and by what so many tokens took
FEW_TOKENS = 16  # of an expert: with so many it is no longer memory that sets the CPU's pace, and the plan's division stays
PROMPT_TOKENS = 512  # each expert of Mixtral has 128 of them, for which CPU and link are about equally fast
MOST_CHANGE = 3.0  # of a division at once


@dataclass(frozen=True)
class Observed:
    """One layer's absent blocks of one token: how many the link and the CPU had, what each took, and both together, in seconds."""

    streamed: int
    on_cpu: int
    link_s: float
    cpu_s: float
    both_s: float


def balance(model: DispatchedMixtral) -> None:
    """Lets CPU and link finish at the same time, where the plan uses both."""
    _balance_few_tokens(model)
    _balance_prompts(model)


def _balance_few_tokens(model: DispatchedMixtral) -> None:
    if not shares(model):
        return
    for _ in range(ROUNDS):
        tokens = [observe(model, number) for number in range(TOKENS)]
        for dispatch, observed in zip(_routed(model), zip(*tokens, strict=True), strict=True):
            share = dispatch.routed.shares[1]
            # How much longer the CPU takes than the link, by the block: whole ones do not meet a share exactly.
            factors = [
                (each.cpu_s / each.on_cpu * (1 - share)) / (each.link_s / each.streamed * share)
                for each in observed
                if each.on_cpu and each.streamed
            ]
            if factors:
                dispatch.routed.favour_link(_limited(median(factors)), FEW_TOKENS)


def _balance_prompts(model: DispatchedMixtral) -> None:
    plan, config, dispatches = model.plan, model.config, _routed(model)
    tokens = min(PROMPT_TOKENS, plan.prefill_chunk_tokens, plan.workload.max_seq_len)
    of_each = tokens * config.num_experts_per_tok // config.num_local_experts
    divided = any(expert.num_absent for each in dispatches for expert in each.experts) and 0 < plan.stream_share_at(of_each) < 1
    if not divided or model.executors.routes(tokens):
        return
    for _ in range(ROUNDS):
        cpu_s, link_s = observe_prompt(model, tokens)
        if cpu_s and link_s:
            for dispatch in dispatches:
                dispatch.link_favour *= _limited(cpu_s / link_s)


def _limited(factor: float) -> float:
    return min(MOST_CHANGE, max(1 / MOST_CHANGE, factor))


@torch.inference_mode()
def observe_prompt(model: DispatchedMixtral, tokens: int) -> tuple[float, float]:
    """Has every layer's experts computed for `tokens` tokens of random states, which choose experts at random: how long the CPU and
    the link were at work, in seconds."""
    config = model.config
    generator = torch.Generator(model.device).manual_seed(0)
    random = {"generator": generator, "device": model.device}
    states = torch.randn(tokens, config.hidden_size, dtype=model.dtype, **random)
    weights, index = torch.rand(tokens, config.num_local_experts, **random).topk(config.num_experts_per_tok)
    spans = _spans(model, states, index, weights)
    return _at_work_s(spans, "blocks"), _at_work_s(spans, "copy")


@torch.inference_mode()
def observe(model: DispatchedMixtral, number: int = 0) -> list[Observed]:
    """Has every layer's experts computed for one token, one layer after the other. Those that it calls lie all over a layer's
    memory, and others with each `number`."""
    config = model.config
    states = torch.zeros(1, config.hidden_size, dtype=model.dtype, device=model.device)
    top_k, num_experts = config.num_experts_per_tok, config.num_local_experts
    first = number * max(1, num_experts // (top_k * TOKENS))
    chosen = [(first + choice * (num_experts // top_k)) % num_experts for choice in range(top_k)]
    index, weights = torch.tensor([chosen], device=model.device), torch.full((1, top_k), 1 / top_k, device=model.device)
    spans = [span for span in _spans(model, states, index, weights) if span.name in ("blocks", "in place")]
    return [
        _observed(dispatch, chosen, [span for span in spans if span.call == call]) for call, dispatch in enumerate(_routed(model))
    ]


def shares(model: DispatchedMixtral) -> dict[int, float]:
    """By layer, the link's share for one token, of those that use both."""
    both = [each for each in _routed(model) if any(expert.num_absent for expert in each.experts)]
    return {dispatch.layer: share for dispatch in both if 0 < (share := dispatch.routed.shares[1]) < 1}


def _spans(model: DispatchedMixtral, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> list[Span]:
    """Of the experts of all layers, one after the other."""
    executors = model.executors
    executors.finish_cpu()  # or its last job would appear on the timeline
    executors.timeline.start()
    for dispatch in _routed(model):
        dispatch(states, index, weights)
    executors.finish_cpu()
    return executors.timeline.stop()


def _routed(model: DispatchedMixtral) -> list[LayerDispatch]:
    if not model.executors.routes(1):
        return []
    dispatches = [experts.dispatch for experts in model.experts_modules()]
    return [dispatch for dispatch in dispatches if dispatch.routed is not None]


def _observed(dispatch: LayerDispatch, chosen: list[int], spans: list[Span]) -> Observed:
    absent = sum(dispatch.experts[expert].num_absent for expert in chosen)
    streamed = int(dispatch.routed.shares[1] * absent + 0.5)  # the rule of `LayerDispatch`
    at_work = [span for span in spans if (absent - streamed if span.name == "blocks" else streamed)]
    link_s, cpu_s = _at_work_s(at_work, "in place"), _at_work_s(at_work, "blocks")
    return Observed(streamed, absent - streamed, link_s, cpu_s, whole_s(at_work))


def _at_work_s(spans: list[Span], name: str) -> float:
    return sum(span.stop_s - span.start_s for span in spans if span.name == name)
