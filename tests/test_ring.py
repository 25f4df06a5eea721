"""The staging ring delivers the requested blocks, after any prefetch and any error."""

import random

import numpy as np
import pytest
import torch

from fiddler_run.encodings.plain import Bf16, Fp32
from fiddler_run.engine.calls import Choices, Expert, ExpertCalls, LayerExperts, Runs
from fiddler_run.engine.device_part import SinglePart, queue
from fiddler_run.engine.prefill_path import takes_long
from fiddler_run.engine.resources import Resources
from fiddler_run.engine.ring import Part, Piece, StagingRing, Stream, _copy, _joined
from fiddler_run.engine.timeline import Timeline
from fiddler_run.kernels.cpu import PyTorchExperts
from fiddler_run.kernels.table import Kernels

CPU = torch.device("cpu")
BLOCK_BYTES = 3


def numbered_blocks() -> torch.Tensor:
    return torch.arange(60, dtype=torch.uint8).view(20, BLOCK_BYTES)


def calls_of(*calls: tuple[int, Expert, int]) -> ExpertCalls:
    """Calls of different experts: the tokens of each, the expert, and its streamed blocks."""
    tokens, experts, streamed = zip(*calls, strict=True)
    starts = np.concatenate(([0], np.cumsum(tokens)))
    numbers = np.arange(starts[-1])
    weights = np.ones(starts[-1], dtype=np.float32)
    choices = Choices(np.arange(len(calls)), starts, numbers, numbers, weights)
    return ExpertCalls(LayerExperts(experts), choices, np.array(streamed))


def runs_of(blocks: list[torch.Tensor]) -> Runs:
    return Runs(blocks, [len(each) for each in blocks])


def received(stream: Stream, runs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The blocks of each run, in the order in which they arrive."""
    arrived = [[] for _ in runs]
    for _ in stream.pieces:
        with stream.next() as piece:
            for part in piece.parts:
                blocks = piece.place[part.slot : part.slot + part.count]
                assert part.first == sum(map(len, arrived[part.run]))
                arrived[part.run].append(blocks.clone())
    return [torch.cat(blocks) for blocks in arrived]


def test_blocks_that_follow_each_other_are_copied_together():
    """Within one allocation, and within a place of the ring."""
    blocks = numbered_blocks()
    elsewhere = torch.full((2, BLOCK_BYTES), 99, dtype=torch.uint8)
    cut = [blocks[0:3], blocks[3:5], blocks[6:9], elsewhere, blocks[9:12]]
    runs = Runs(cut, [3, 2, 2, 2, 3])  # of the third run, the last block is left out
    parts = [Part(0, 1, 2, 0), Part(1, 0, 2, 2), Part(2, 0, 2, 4), Part(3, 0, 2, 6)]
    parts.append(Part(4, 0, 3, 8))
    found = list(_joined(runs, parts))
    assert [slot for _, slot in found] == [0, 4, 6, 8]
    expected = (blocks[1:5], blocks[6:8], elsewhere, blocks[9:12])
    assert all(
        torch.equal(together, each) for (together, _), each in zip(found, expected, strict=True)
    )
    piece = Piece(0, torch.zeros((11, BLOCK_BYTES), dtype=torch.uint8), parts)
    _copy(runs, piece)
    assert torch.equal(piece.place, torch.cat(expected))


def test_streamed_blocks_are_computed_before_resident_ones():
    """This frees a place for the next copy; later, streamed and resident blocks alternate."""
    done = []
    encoding = Fp32(2, 1)
    resident = torch.full((1, 6), 1.0).view(torch.uint8)
    host = torch.full((5, 6), 2.0).view(torch.uint8)
    calls = calls_of(*((3, Expert(resident, host.clone(), host[:0]), 5) for _ in range(2)))

    def apply(blocks: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        values = blocks.view(torch.float32)
        done.append((int(values[0, 0]), len(values)))
        return values.sum() * states

    kernels = Kernels(PyTorchExperts(encoding), None, apply)
    resources = Resources(encoding, kernels, CPU, 6)
    inputs = torch.ones(3, 2), torch.tensor([[0, 1]] * 3), torch.ones(3, 2)
    stream = resources.ring.stream(calls.runs(), resources.timeline)
    part = SinglePart(resources, calls, inputs)
    queue(part, stream, resources)
    output = part.output(lambda: None)
    # five pieces of two blocks; the third has one block of either expert
    assert done == [(2, 2), (1, 1), (2, 2), (1, 1), (2, 1), (2, 1), (2, 2), (2, 2)]
    assert torch.equal(output, torch.full((3, 2), 2 * 6 * (1.0 + 5 * 2.0)))


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
def test_ring_delivers_the_requested_blocks_after_any_prefetch(slots):
    rng = random.Random(slots)
    blocks = numbered_blocks()
    ring = StagingRing(slots, BLOCK_BYTES, CPU)
    timeline = Timeline(CPU)
    assert 1 <= ring.at_once <= slots

    def runs() -> list[torch.Tensor]:
        """Consecutive blocks, with gaps between the runs."""
        bounds = sorted(rng.sample(range(21), 2 * rng.randint(1, 5)))
        return [blocks[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True)]

    for _ in range(300):
        asked = runs()
        if rng.random() < 0.8:
            longer = [blocks[run.storage_offset() // BLOCK_BYTES :][:8] for run in asked]
            shorter = [run[: rng.randint(1, len(run))] for run in asked]
            prefetched = rng.choice([asked, longer, shorter, asked[1:], runs()])
            ring.prefetch(runs_of(prefetched), timeline)
        stream = ring.stream(runs_of(asked), timeline)
        assert all(sum(p.count for p in piece.parts) <= ring.at_once for piece in stream.pieces)
        found = received(stream, asked)
        assert all(torch.equal(*pair) for pair in zip(found, asked, strict=True))


def test_prefetched_blocks_are_not_copied_again():
    """Even if the next layer streams fewer blocks of one run, and more of another."""
    blocks = numbered_blocks()
    ring = StagingRing(12, BLOCK_BYTES, CPU)
    timeline = Timeline(CPU)
    ring.prefetch(runs_of([blocks[:3], blocks[5:8], blocks[10:14]]), timeline)
    asked = runs_of([blocks[:2], blocks[5:9], blocks[10:11], blocks[15:16]])
    with timeline.recording() as spans:
        stream = ring.stream(asked, timeline)
        found = received(stream, [blocks] * 4)
    wanted = [[0, 1], [5, 6, 7, 8], [10], [15]]
    assert [(run[:, 0] // BLOCK_BYTES).tolist() for run in found] == wanted
    assert len(spans) == 1  # one copy, of blocks 8 and 15
    assert [sum(p.count for p in piece.parts) for piece in stream.pieces] == [3, 3, 2]


def test_ring_works_after_an_interrupt():
    blocks = numbered_blocks()
    ring = StagingRing(6, BLOCK_BYTES, CPU)
    timeline = Timeline(CPU)
    runs = list(blocks.split(3))

    def staged(stop: int | None = None) -> list[torch.Tensor]:
        stream = ring.stream(runs_of(runs), timeline)
        if stop is None:
            return received(stream, runs)
        for number in range(len(stream.pieces)):
            with stream.next():
                if number == stop:
                    raise KeyboardInterrupt
        return []

    for stop in range(10):
        with pytest.raises(KeyboardInterrupt):
            staged(stop)
        assert torch.equal(torch.cat(staged()), blocks)


def test_gpu_waits_only_for_short_cpu_work():
    """CPU work is counted in tokens times weights; reading disk blocks is always too long."""

    def call(tokens: int, resident: int, host: int, streamed: int, on_disk: int = 0) -> tuple:
        expert = Expert(*(torch.empty(count, 6) for count in (resident, host, on_disk)))
        return tokens, expert, streamed

    def long(*calls: tuple, neurons: int = 14336 // 4) -> bool:
        return takes_long(calls_of(*calls), Bf16(4096, neurons))

    assert not long(call(512, 0, 4, 0))
    assert long(call(513, 0, 4, 0))
    assert not long(call(513, 0, 4, 0), neurons=3552)
    assert not long(call(2000, 0, 11, 10))
    assert long(*[call(100, 0, 4, 0)] * 6)
    assert not long(call(10**6, 4, 0, 0), call(10**6, 0, 4, 4))
    assert long(call(1, 3, 0, 0, on_disk=1))
