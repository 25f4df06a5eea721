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
from fiddler_run.plan import FEW_TOKENS, MOST_ROUTED_TOKENS
from fiddler_run.timeline import Span, whole_s

ROUNDS, TOKENS = 2, 4  # how often the division changes, and by what so many tokens took
PROMPT_TOKENS = 128  # of an expert: with so many neither CPU nor link has nearly all of the work
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
    plan, per_token = model.plan, model.config.num_experts_per_tok / model.config.num_local_experts
    at_once = min(plan.prefill_chunk_tokens, plan.workload.max_seq_len) * plan.workload.batch_size
    tokens = min(int(PROMPT_TOKENS / per_token), at_once)
    if tokens <= MOST_ROUTED_TOKENS or not plan.num_absent_blocks or plan.stream_share_at(int(tokens * per_token)) in (0, 1):
        return
    for _ in range(ROUNDS):
        factors = [cpu_s / link_s for cpu_s, link_s in observe_prompt(model, tokens) if cpu_s and link_s]
        factor = _limited(median(factors)) if factors else 1.0
        for dispatch in _dispatches(model):
            dispatch.prompts_favour_link *= factor


def _limited(factor: float) -> float:
    return min(MOST_CHANGE, max(1 / MOST_CHANGE, factor))


@torch.inference_mode()
def observe_prompt(model: DispatchedMixtral, tokens: int) -> list[tuple[float, float]]:
    """Has every layer's experts computed for `tokens` tokens of random states, which choose experts at random: how long the CPU and
    the link were at work in each, in seconds, what is copied ahead for the next one included."""
    config = model.config
    generator = torch.Generator(model.device).manual_seed(0)
    random = {"generator": generator, "device": model.device}
    states = torch.randn(tokens, config.hidden_size, dtype=model.dtype, **random)
    weights, index = torch.rand(tokens, config.num_local_experts, **random).topk(config.num_experts_per_tok)
    of_calls = _spans(model, _dispatches(model), states, index, weights)
    return [(_at_work_s(spans, "blocks"), _at_work_s(spans, "copy")) for spans in of_calls]


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
    dispatches = _routed(model)
    of_calls = _spans(model, dispatches, states, index, weights)
    return [_observed(dispatch, chosen, spans) for dispatch, spans in zip(dispatches, of_calls, strict=True)]


def shares(model: DispatchedMixtral) -> dict[int, float]:
    """By layer, the link's share for one token, of those that use both."""
    both = [each for each in _routed(model) if any(expert.num_absent for expert in each.experts)]
    return {dispatch.layer: share for dispatch in both if 0 < (share := dispatch.routed.shares[1]) < 1}


def prompts_favour_link(model: DispatchedMixtral) -> float:
    """How many times the plan's blocks the link has with long prompts, for each of the CPU's."""
    return _dispatches(model)[0].prompts_favour_link


def _spans(
    model: DispatchedMixtral, dispatches: list[LayerDispatch], states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> list[list[Span]]:
    """Of each layer's experts, computed one after the other."""
    executors = model.executors
    executors.finish_cpu()  # or its last job would appear on the timeline
    with executors.timeline.recording() as spans:
        for dispatch in dispatches:
            dispatch(states, index, weights)
        executors.finish_cpu()
    return [[span for span in spans if span.call == call] for call in range(len(dispatches))]


def _dispatches(model: DispatchedMixtral) -> list[LayerDispatch]:
    return [experts.dispatch for experts in model.experts_modules()]


def _routed(model: DispatchedMixtral) -> list[LayerDispatch]:
    """Those in which few tokens go the way of decode."""
    return [each for each in _dispatches(model) if each.routed is not None] if model.executors.routes(1) else []


def _observed(dispatch: LayerDispatch, chosen: list[int], spans: list[Span]) -> Observed:
    absent = sum(dispatch.experts[expert].num_absent for expert in chosen)
    streamed = int(dispatch.routed.shares[1] * absent + 0.5)  # the rule of `LayerDispatch`
    blocks = {"blocks": absent - streamed, "in place": streamed}
    at_work = [span for span in spans if blocks.get(span.name)]
    link_s, cpu_s = _at_work_s(at_work, "in place"), _at_work_s(at_work, "blocks")
    return Observed(streamed, absent - streamed, link_s, cpu_s, whole_s(at_work))


def _at_work_s(spans: list[Span], name: str) -> float:
    return sum(span.stop_s - span.start_s for span in spans if span.name == name)
