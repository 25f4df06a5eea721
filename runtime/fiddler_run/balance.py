"""After loading, each layer's absent blocks are divided anew between link and CPU, for few tokens, by what both take for it.

The plan's division is right where memory is as fast as it was, on average, when the machine was profiled. But a layer's experts lie
where the system put them, which differs from one start to the next: on another NUMA node, or, in a virtual machine, in memory that
others are using. Found once, a division stays: the same input gives the same bits as long as the model is loaded, but
not when it is loaded again. Another model that runs meanwhile in the same process would disturb what is found.
"""

from dataclasses import dataclass
from statistics import median

import torch

from fiddler_run.dispatch import LayerDispatch
from fiddler_run.model import DispatchedMixtral
from fiddler_run.timeline import whole_s

ROUNDS, TOKENS = 2, 4  # how often the division changes, and by what so many tokens took
FEW_TOKENS = 16  # of an expert: with so many it is no longer memory that sets the CPU's pace, and the plan's division stays
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
    """Lets CPU and link finish at the same time in each layer that uses both for one token."""
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
                factor = min(MOST_CHANGE, max(1 / MOST_CHANGE, median(factors)))
                dispatch.routed.favour_link(factor, FEW_TOKENS)


@torch.inference_mode()
def observe(model: DispatchedMixtral, number: int = 0) -> list[Observed]:
    """Has every layer's experts computed for one token, one layer after the other. Those that it calls lie all over a layer's
    memory, and others with each `number`."""
    executors, config = model.executors, model.config
    states = torch.zeros(1, config.hidden_size, dtype=model.dtype, device=model.device)
    top_k, num_experts = config.num_experts_per_tok, config.num_local_experts
    first = number * max(1, num_experts // (top_k * TOKENS))
    chosen = [(first + choice * (num_experts // top_k)) % num_experts for choice in range(top_k)]
    index, weights = torch.tensor([chosen], device=model.device), torch.full((1, top_k), 1 / top_k, device=model.device)
    executors.finish_cpu()  # or its last job would appear on the timeline
    executors.timeline.start()
    for dispatch in _routed(model):
        dispatch(states, index, weights)
    executors.finish_cpu()
    spans = [span for span in executors.timeline.stop() if span.name in ("blocks", "in place")]
    return [
        _observed(dispatch, chosen, [span for span in spans if span.call == call]) for call, dispatch in enumerate(_routed(model))
    ]


def shares(model: DispatchedMixtral) -> dict[int, float]:
    """By layer, the link's share for one token, of those that use both."""
    both = [each for each in _routed(model) if any(expert.num_absent for expert in each.experts)]
    return {dispatch.layer: share for dispatch in both if 0 < (share := dispatch.routed.shares[1]) < 1}


def _routed(model: DispatchedMixtral) -> list[LayerDispatch]:
    if not model.executors.routes(1):
        return []
    dispatches = [experts.dispatch for experts in model.experts_modules()]
    return [dispatch for dispatch in dispatches if dispatch.routed is not None]


def _observed(dispatch: LayerDispatch, chosen: list[int], spans: list) -> Observed:
    absent = sum(dispatch.experts[expert].num_absent for expert in chosen)
    streamed = int(dispatch.routed.shares[1] * absent + 0.5)  # the rule of `LayerDispatch`
    at_work = [span for span in spans if (absent - streamed if span.name == "blocks" else streamed)]
    cpu_s, link_s = (sum(s.stop_s - s.start_s for s in at_work if s.name == name) for name in ("blocks", "in place"))
    return Observed(streamed, absent - streamed, link_s, cpu_s, whole_s(at_work))
