"""The staging ring yields the requested pieces, after any prefetch and any error."""

import random

import numpy as np
import pytest
import torch

from fiddler_run.encodings.plain import Fp32
from fiddler_run.engine.calls import Expert, ExpertCall
from fiddler_run.engine.prefill_path import DevicePart, _takes_long
from fiddler_run.engine.resources import Resources
from fiddler_run.engine.ring import StagingRing
from fiddler_run.engine.timeline import Timeline
from fiddler_run.kernels.cpu import PyTorchExperts
from fiddler_run.kernels.table import Kernels

CPU = torch.device("cpu")
BLOCK_BYTES = 3


def numbered_blocks() -> torch.Tensor:
    return torch.arange(60, dtype=torch.uint8).view(20, BLOCK_BYTES)


def test_streamed_blocks_are_computed_before_resident_ones():
    """This frees a place for the next copy; later, streamed and resident blocks alternate."""
    done = []
    encoding = Fp32(2, 1)
    resident = torch.full((1, 6), 1.0).view(torch.uint8)
    host = torch.full((5, 6), 2.0).view(torch.uint8)
    rows = np.arange(3)
    weights = np.ones(3, dtype=np.float32)
    calls = [
        ExpertCall(Expert(resident, host, host[:0]), 3 * number, rows, weights, 5)
        for number in range(2)
    ]

    def apply(blocks: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        values = blocks.view(torch.float32)
        done.append((int(values[0, 0]), len(values)))
        return values.sum() * states

    kernels = Kernels(PyTorchExperts(encoding), None, apply)
    resources = Resources(encoding, kernels, CPU, 6)
    states = torch.ones(3, 2)
    part = DevicePart(resources, states, torch.tensor([[0, 1]] * 3), torch.ones(3, 2))
    output = part.compute(calls)
    assert done == [(2, 2), (1, 1), (2, 2), (1, 1), (2, 1), (2, 2), (2, 2), (2, 1)]
    assert torch.equal(output, torch.full((3, 2), 2 * 6 * (1.0 + 5 * 2.0)))


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
def test_ring_yields_the_requested_pieces_after_any_prefetch(slots):
    rng = random.Random(slots)
    blocks = numbered_blocks()
    ring = StagingRing(slots, BLOCK_BYTES, CPU)
    timeline = Timeline(CPU)
    assert 1 <= ring.at_once <= slots

    def pieces() -> list[torch.Tensor]:
        starts = [rng.randrange(20 - ring.at_once) for _ in range(rng.randint(1, 6))]
        return [blocks[start : start + rng.randint(1, ring.at_once)] for start in starts]

    for _ in range(200):
        asked = pieces()
        if rng.random() < 0.8:
            longer = [
                blocks[piece.storage_offset() // BLOCK_BYTES :][: ring.at_once] for piece in asked
            ]
            ring.prefetch(rng.choice([asked, longer, asked[1:], pieces()]), timeline)
        stream = ring.stream(asked, timeline)
        found = []
        for _ in asked:
            with stream.next() as staged:
                found.append(staged.clone())
        assert all(torch.equal(*pair) for pair in zip(found, asked, strict=True))


def test_ring_works_after_an_interrupt():
    blocks = numbered_blocks()
    ring = StagingRing(6, BLOCK_BYTES, CPU)
    timeline = Timeline(CPU)
    pieces = list(blocks.split(2))

    def staged(stop: int | None = None) -> torch.Tensor:
        found = []
        stream = ring.stream(pieces, timeline)
        for number in range(len(pieces)):
            with stream.next() as piece:
                if number == stop:
                    raise KeyboardInterrupt
                found.append(piece.clone())
        return torch.cat(found)

    for stop in range(len(pieces)):
        with pytest.raises(KeyboardInterrupt):
            staged(stop)
        assert torch.equal(staged(), blocks)


def test_gpu_waits_only_for_short_cpu_work():
    """CPU work is counted in tokens times experts; reading disk blocks is always too long."""

    def call(tokens: int, resident: int, host: int, streamed: int, on_disk: int = 0) -> ExpertCall:
        expert = Expert(*(torch.empty(count, 6) for count in (resident, host, on_disk)))
        rows = np.zeros(tokens, dtype=np.int64)
        weights = np.zeros(tokens, dtype=np.float32)
        return ExpertCall(expert, 0, rows, weights, streamed)

    assert not _takes_long([call(512, 0, 4, 0)])
    assert _takes_long([call(513, 0, 4, 0)])
    assert not _takes_long([call(2000, 3, 13, 10)])
    assert _takes_long([call(100, 0, 4, 0)] * 6)
    assert not _takes_long([call(10**6, 4, 0, 0), call(10**6, 0, 4, 4)])
    assert _takes_long([call(1, 3, 0, 0, on_disk=1)])
