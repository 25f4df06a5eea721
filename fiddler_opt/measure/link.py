"""Times copies between host memory and the GPU, in pieces of the size that prefill uses."""

from itertools import cycle

import torch

from fiddler_opt.measure.experts import ExpertBench


def time_copies(bench: ExpertBench) -> dict[str, float]:
    """Bytes per second in both directions, and the round trip of one token's activations."""
    ring = bench.engine.resources.ring
    dtype = bench.engine.resources.dtype
    expert = bench.host[0]
    slots = torch.empty_like(expert, device=bench.device).split(ring.at_once)
    pageable = expert.clone().split(ring.at_once)
    experts = [each.split(ring.at_once) for each in bench.host]
    if not bench.page_locked:
        locked = torch.empty(slots[0].shape, dtype=torch.uint8, pin_memory=True)
        experts = [[locked[: len(piece)] for piece in slots]]
    pinned = cycle(experts)
    state = torch.ones(1, bench.block_format.hidden_size, dtype=dtype, device=bench.device)
    host_state = torch.empty(state.shape, dtype=dtype, pin_memory=True)

    def copy(source, target) -> None:
        for to, piece in zip(target, source, strict=True):
            to.copy_(piece, non_blocking=True)

    def round_trip() -> None:
        host_state.copy_(state, non_blocking=True)
        torch.cuda.current_stream().record_event().synchronize()
        state.copy_(host_state, non_blocking=True)

    *copies_us, trip_us = bench.stopwatch.time(
        lambda: copy(next(pinned), slots),
        lambda: copy(pageable, slots),
        lambda: copy(slots, next(pinned)),
        round_trip,
    )
    h2d, pageable_h2d, d2h = (round(expert.nbytes / (us * 1e-6)) for us in copies_us)
    return {
        "h2d_bytes_per_s": h2d,
        "h2d_pageable_bytes_per_s": pageable_h2d,
        "d2h_bytes_per_s": d2h,
        "round_trip_us": round(trip_us, 1),
    }
