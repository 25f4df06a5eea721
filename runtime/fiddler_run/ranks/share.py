"""A rank's share of the experts, ready to compute."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fiddler_run.engine.engine import ExpertEngine, make_engine
from fiddler_run.engine.layer import ExpertsLayer
from fiddler_run.plan.schema import Plan
from fiddler_run.weights.store import ExpertStore


class Share(NamedTuple):
    """An engine, and the layers that it computes.

    With several ranks, a layer's output is a partial sum, in float32.
    """

    engine: ExpertEngine
    layers: list[ExpertsLayer]


def share_of(plan: Plan, store: ExpertStore, device: torch.device, number: int = 0) -> Share:
    """The share of rank `number`, whose blocks are in `store`.

    Args:
        device: of the rank.
    """
    rank = plan.ranks[number]
    engine = make_engine(
        plan.block_format,
        device,
        rank.cpu_threads,
        rank.gpu_memory_bytes.staging // plan.block_bytes,
        rank.cpu_pinned,
        plan.model.activation,
        torch.float32 if len(plan.ranks) > 1 else None,
    )
    places = zip(store.resident, store.host, store.on_disk, strict=True)
    layers = [
        ExpertsLayer(layer, resident, host, rank.stream_share_at, engine, on_disk)
        for layer, (resident, host, on_disk) in enumerate(places)
    ]
    for layer, following in zip(layers, layers[1:], strict=False):
        layer.next = following
    return Share(engine, layers)
