"""The staging ring on a GPU, where copies run on their own CUDA stream."""

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
PIECES_PER_STREAM = 50


@pytest.mark.parametrize("slots", [3, 6])
def test_streamed_blocks_match_resident_blocks(slots: int):
    """A few places are reused a thousand times: no copy may overwrite one that is still read."""
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
    torch.cuda._sleep(int(2e8))  # about 0.1 s, in which the host queues work ahead of the device
    results = []
    for start in range(0, PIECES, PIECES_PER_STREAM):
        # The right pieces or wrong ones.
        ring.prefetch(pieces[start + rng.randint(0, 1) :], timeline)
        stream = ring.stream(pieces[start : start + PIECES_PER_STREAM], timeline)
        for _ in range(PIECES_PER_STREAM):
            with stream.next() as staged:
                results.append(apply_blocks(BLOCKS, staged, states))
    for (first, stop), result in zip(where, results, strict=True):
        assert torch.equal(result, apply_blocks(BLOCKS, resident[first:stop], states))
