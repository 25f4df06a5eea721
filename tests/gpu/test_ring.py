"""The staging ring, whose copies run on a stream of their own."""

import random

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from fiddler_run.encodings.plain import Bf16
from fiddler_run.engine.ring import StagingRing
from fiddler_run.engine.timeline import Timeline
from fiddler_run.kernels.pytorch import apply_blocks
from gpu.conftest import CUDA, page_locked

BLOCKS = Bf16(hidden_size=512, block_neurons=256)
PIECES = 1000
PIECES_OF_A_STREAM = 50


@pytest.mark.parametrize("slots", [3, 6])
def test_streamed_blocks_are_the_resident_ones_bit_for_bit(slots: int):
    """A ring of few places reused a thousand times: no copy overtakes the computation that still
    reads its place.
    """
    torch.manual_seed(0)
    weights = torch.randn(40, BLOCKS.block_bytes // 2).mul_(0.05).bfloat16()
    blocks = page_locked(weights.view(torch.uint8))
    resident = blocks.to(CUDA)
    ring = StagingRing(slots, BLOCKS.block_bytes, CUDA)
    timeline = Timeline(CUDA)
    states = torch.randn(5, BLOCKS.hidden_size, dtype=torch.bfloat16, device=CUDA)
    rng = random.Random(0)
    firsts = [rng.randrange(38) for _ in range(PIECES)]
    where = [(first, first + rng.randint(1, ring.at_once)) for first in firsts]
    pieces = [blocks[first:stop] for first, stop in where]
    torch.cuda._sleep(int(2e8))  # a tenth of a second for the host to queue ahead of the device
    results = []
    for start in range(0, PIECES, PIECES_OF_A_STREAM):
        ring.prefetch(pieces[start + rng.randint(0, 1) :], timeline)  # right ones or wrong ones
        stream = ring.stream(pieces[start : start + PIECES_OF_A_STREAM], timeline)
        for _ in range(PIECES_OF_A_STREAM):
            with stream.next() as staged:
                results.append(apply_blocks(BLOCKS, staged, states))
    for (first, stop), result in zip(where, results, strict=True):
        assert torch.equal(result, apply_blocks(BLOCKS, resident[first:stop], states))
