"""Measures the memory rates that plain loops reach over a model's experts."""

import time
from itertools import cycle

import torch

from fiddler_run.engine.resources import Resources
from fiddler_run.generation.model import PlannedModel
from fiddler_run.kernels.cpu import CompiledExperts

MIN_EXPERTS = 48  # visited experts, if available


def bare_rates(model: PlannedModel) -> dict[str, float]:
    """Bytes per second of loops that only read with the CPU, only copy to the GPU, and do both.

    Like decode, the loops visit experts from all over host memory, one after the other. The
    combined loop uses the best of four shares.
    """
    resources = model.engine.resources
    share = model.plan.rank.stream_share_at(1)
    host = [blocks for row in model.store.host for blocks in row if len(blocks)]
    host = host[:: max(1, len(host) // MIN_EXPERTS)]
    if not host or not isinstance(resources.kernels.cpu, CompiledExperts):
        return {}
    rates = {"CPU": _bare_rate(resources, host, 0.0)}
    if resources.ring is not None and resources.ring.copy_stream is not None:
        rates["link"] = _bare_rate(resources, host, 1.0)
        shares = [min(1.0, share * factor) for factor in (0.8, 1.0, 1.2, 1.4)]
        rates["host"] = max(_bare_rate(resources, host, each) for each in shares)
    return rates


def _bare_rate(resources: Resources, experts: list[torch.Tensor], share: float) -> float:
    """Bytes per second of copying `share` of each expert while the CPU reads the rest."""
    ring = resources.ring
    started = time.perf_counter()
    for blocks in experts:
        copied = round(share * len(blocks))
        if copied:
            with torch.cuda.stream(ring.copy_stream):
                for block, slot in zip(blocks[:copied], cycle(ring.blocks), strict=False):
                    slot.copy_(block, non_blocking=True)
        if copied < len(blocks):
            resources.kernels.cpu.pool.read(blocks[copied:])
        if copied:
            ring.copy_stream.synchronize()
    return sum(blocks.nbytes for blocks in experts) / (time.perf_counter() - started)
