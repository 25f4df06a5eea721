"""After loading, each layer's absent blocks are divided anew between link and CPU, for decode, by what both take for that layer.

The plan's division is right where memory is as fast as it was, on average, when the machine was profiled. But a layer's experts lie
where the system put them, which differs from one start to the next: on another NUMA node, or, in a virtual machine, in memory that
others are using. Found once, a division stays: the same input gives the same bits as long as the model is loaded.
"""

from statistics import median

import torch

from fiddler_run.dispatch import LayerDispatch
from fiddler_run.model import DispatchedMixtral

ROUNDS, CALLS = 2, 4  # how often all layers are tried, each with how many tokens
FEW_TOKENS = 16  # of an expert: up to so many, memory sets the pace of both
MOST_CHANGE = 3.0  # of a division at once


@torch.inference_mode()
def balance(model: DispatchedMixtral) -> None:
    """Lets CPU and link finish at the same time in each layer that uses both for one token."""
    model.executors.finish_cpu()  # or its last job would appear on the timeline
    for _ in range(ROUNDS):
        for dispatch in _divided(model):
            factor = _cpu_over_link(dispatch, model)
            dispatch.routed.favour_link(min(MOST_CHANGE, max(1 / MOST_CHANGE, factor)), FEW_TOKENS)


def balanced_shares(model: DispatchedMixtral) -> list[float]:
    """The link's share for one token, of each layer that uses both."""
    return [dispatch.routed.shares[1] for dispatch in _divided(model)]


def _divided(model: DispatchedMixtral) -> list[LayerDispatch]:
    if not model.executors.routes(1):
        return []
    dispatches = [experts.dispatch for experts in model.experts_modules()]
    return [each for each in dispatches if each.routed is not None and 0 < each.routed.shares[1] < 1]


def _cpu_over_link(dispatch: LayerDispatch, model: DispatchedMixtral) -> float:
    """How much longer the CPU takes for its blocks of a token than the link for those that it should have had."""
    executors, config, share = dispatch.executors, model.config, dispatch.routed.shares[1]
    top_k, num_experts = config.num_experts_per_tok, config.num_local_experts
    states = torch.randn(1, config.hidden_size, dtype=model.dtype, device=model.device)
    weights = torch.full((1, top_k), 1 / top_k, device=model.device)
    chosen, blocks = torch.arange(top_k, device=model.device)[None], []
    executors.timeline.start()
    for call in range(CALLS):
        before = executors.traffic
        dispatch(states, (chosen + call * top_k) % num_experts, weights)
        executors.finish_cpu()
        blocks.append(executors.traffic - before)
    spans = executors.timeline.stop()
    cpu_s, link_s = (
        {span.call: span.stop_s - span.start_s for span in spans if which in (span.lane, span.name)} for which in ("blocks", "link")
    )
    # By the block: whole ones do not meet a share exactly.
    ratios = [
        (cpu_s[call] / of.cpu_blocks * (1 - share)) / (link_s[call] / of.streamed_blocks * share)
        for call, of in enumerate(blocks)
        if of.cpu_blocks and of.streamed_blocks
    ]
    return median(ratios) if ratios else 1.0
