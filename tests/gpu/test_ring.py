"""The staging ring on a GPU, where copies run on their own CUDA stream."""

import random

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from fiddler_run.encodings.plain import Bf16
from fiddler_run.engine.calls import Runs
from fiddler_run.engine.ring import StagingRing
from fiddler_run.engine.timeline import Timeline
from fiddler_run.kernels.pytorch import apply_blocks
from gpu.conftest import CUDA, page_locked

BLOCKS = Bf16(hidden_size=512, block_neurons=256)
STREAMS = 60


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
    torch.cuda._sleep(int(2e8))  # about 0.1 s, in which the host queues work ahead of the device
    results = []
    following = random_runs(blocks, rng)
    for _ in range(STREAMS):
        runs, following = following, random_runs(blocks, rng)
        stream = ring.stream(runs, timeline)
        for _ in stream.pieces:
            with stream.next() as piece:
                for part in piece.parts:
                    staged = piece.place[part.slot : part.slot + part.count]
                    first = (runs.addresses()[part.run] - blocks.data_ptr()) // BLOCKS.block_bytes
                    where = (first + part.first, first + part.first + part.count)
                    results.append((where, apply_blocks(BLOCKS, staged, states)))
        # the right blocks or wrong ones
        ring.prefetch(following if rng.random() < 0.7 else random_runs(blocks, rng), timeline)
    for (first, stop), result in results:
        assert torch.equal(result, apply_blocks(BLOCKS, resident[first:stop], states))


def random_runs(blocks: torch.Tensor, rng: random.Random) -> Runs:
    """Some runs of consecutive blocks."""
    bounds = sorted(rng.sample(range(len(blocks) + 1), 24))
    runs = [blocks[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
    return Runs(runs, [len(run) for run in runs])
