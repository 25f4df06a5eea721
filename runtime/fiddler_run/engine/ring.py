"""The staging ring: device memory through which host blocks are streamed during prefill."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch

from fiddler_run.engine.calls import Runs
from fiddler_run.engine.timeline import Lane, Timeline, Work

# The device reads one place while blocks arrive in the others. With two, the link would be idle
# between layers.
PLACES = 3


class Part(NamedTuple):
    """`count` blocks of one run, from its block `first` on. In the place they begin at `slot`."""

    run: int
    first: int
    count: int
    slot: int


@dataclass
class Piece:
    """Blocks that share a place of the ring, uint8 [at_once, block_bytes]; see `Part`.

    `copied`: the event after which they are there. None before the copy is queued, and without
    CUDA.
    """

    number: int  # of the place
    place: torch.Tensor
    parts: list[Part]
    copied: "torch.cuda.Event | None" = None


class StagingRing:
    """Places of `at_once` blocks each, reused in turn. Copies run on their own stream.

    What is streamed are runs of blocks, one for each expert. A place holds one run or a part of it,
    or several runs: with few small blocks at once, the link would wait for Python.

    On a machine without CUDA, the ring is in host memory and copies are synchronous.
    """

    def __init__(self, num_blocks: int, block_bytes: int, device: torch.device):
        """Allocates room for `num_blocks` blocks: PLACES equal places, or places of one block."""
        self.blocks = torch.empty((num_blocks, block_bytes), dtype=torch.uint8, device=device)
        self.copy_stream = None
        if device.type == "cuda":
            self.copy_stream = torch.cuda.Stream(device)
            # the memory may have earlier users
            self.copy_stream.wait_stream(torch.cuda.current_stream(device))
        self.at_once = max(1, num_blocks // PLACES)
        self._places = self.blocks.split(self.at_once)[: min(num_blocks, PLACES)]
        self._order = deque(range(len(self._places)))  # the place released last comes last
        self._released: dict[int, torch.cuda.Event] = {}  # by place: done when the last reader is
        self._prefetched: list[tuple[Piece, list[int]]] = []  # with the addresses of their runs

    def prefetch(self, runs: Runs, timeline: Timeline) -> None:
        """Starts to copy the first of the runs that the next `stream` will probably need.

        The previous stream must have ended. All pieces but the first wait for the device's queued
        work. Otherwise, a copy in that work would wait for all pieces.
        """
        self._prefetched = []
        queued = None
        if self.copy_stream is not None:
            queued = torch.cuda.current_stream(self.blocks.device).record_event()
        packed = _packed(runs.counts, [0] * len(runs), self.at_once)
        for number, parts in zip(list(self._order), packed, strict=False):
            piece = Piece(number, self._places[number], parts)
            if queued is not None and self._prefetched:
                self.copy_stream.wait_event(queued)  # a second time, it changes nothing
            self.copy(runs, piece, timeline)
            addresses = [runs.blocks[part.run].data_ptr() for part in parts]
            self._prefetched.append((piece, addresses))

    def stream(self, runs: Runs, timeline: Timeline) -> "Stream":
        """Starts to copy `runs`, except the blocks of them that were prefetched.

        There are as many copies in flight as places.
        """
        pieces, covered = self._take_prefetched(runs)
        taken = {piece.number for piece in pieces}
        # Pieces take the free places first, then those of the pieces before them, in order.
        places = [number for number in self._order if number not in taken]
        num_free = len(places)
        places += [piece.number for piece in pieces]
        first = len(pieces)
        for index, parts in enumerate(_packed(runs.counts, covered, self.at_once)):
            number = places[index]
            pieces.append(Piece(number, self._places[number], parts))
            places.append(number)
        stream = Stream(self, runs, pieces, first, timeline)
        for _ in range(num_free):
            stream.start_next()
        return stream

    def copy(self, runs: Runs, piece: Piece, timeline: Timeline) -> None:
        """Queues the copy of a piece of `runs` to its place."""
        if self.copy_stream is None:
            timeline.begin(Lane.LINK, Work.COPY)
            _copy(runs, piece)
            timeline.end(Lane.LINK, Work.COPY)
            return
        with torch.cuda.stream(self.copy_stream):
            if piece.number in self._released:
                self.copy_stream.wait_event(self._released[piece.number])
            timeline.begin(Lane.LINK, Work.COPY)
            _copy(runs, piece)
            timeline.end(Lane.LINK, Work.COPY)
            piece.copied = self.copy_stream.record_event()

    def release(self, piece: Piece) -> None:
        """Lets the piece's place be overwritten once the work queued so far has finished."""
        self._order.remove(piece.number)
        self._order.append(piece.number)
        if self.copy_stream is not None:
            reader = torch.cuda.current_stream(self.blocks.device)
            self._released[piece.number] = reader.record_event()

    def _take_prefetched(self, runs: Runs) -> tuple[list[Piece], list[int]]:
        """The prefetched pieces with blocks of `runs`, and how many of each run's they have.

        Only the first blocks of a run are prefetched, so those that remain are its last ones.
        """
        covered = [0] * len(runs)
        pieces = []
        if not self._prefetched:
            return pieces, covered
        by_address = {address: number for number, address in enumerate(runs.addresses())}
        for piece, addresses in self._prefetched:
            parts = []
            for part, address in zip(piece.parts, addresses, strict=True):
                run = by_address.get(address)
                if run is None or covered[run] != part.first:
                    continue
                count = min(part.count, runs.counts[run] - part.first)
                if count > 0:
                    parts.append(Part(run, part.first, count, part.slot))
                    covered[run] += count
            if parts:
                pieces.append(Piece(piece.number, piece.place, parts, piece.copied))
        self._prefetched = []
        return pieces, covered


class Stream:
    """Pieces of `runs` on their way to the device, in order."""

    def __init__(
        self,
        ring: StagingRing,
        runs: Runs,
        pieces: list[Piece],
        first: int,
        timeline: Timeline,
    ):
        """`first`: the first of the pieces that is not under way."""
        self.pieces = pieces
        self._ring = ring
        self._runs = runs
        self._coming = iter(pieces)
        self._to_copy = islice(pieces, first, None)
        self._timeline = timeline

    @contextmanager
    def next(self) -> Iterator[Piece]:
        """Yields the next piece, on the device. Leaving the context frees its place for a new copy.

        Work queued after the context does not delay copies.
        """
        piece = next(self._coming)
        if piece.copied is not None:
            torch.cuda.current_stream(piece.place.device).wait_event(piece.copied)
        try:
            yield piece
        finally:
            self._ring.release(piece)
            self.start_next()

    def start_next(self) -> None:
        piece = next(self._to_copy, None)
        if piece is not None:
            self._ring.copy(self._runs, piece, self._timeline)


def _packed(counts: list[int], covered: list[int], at_once: int) -> Iterator[list[Part]]:
    """Yields the parts of each piece: up to `at_once` blocks, in the order of the runs.

    Args:
        counts: blocks of each run.
        covered: how many of these, the first ones, are left out.
    """
    parts = []
    slot = 0
    for run, (stop, first) in enumerate(zip(counts, covered, strict=True)):
        while first < stop:
            count = min(stop - first, at_once - slot)
            parts.append(Part(run, first, count, slot))
            first += count
            slot += count
            if slot == at_once:
                yield parts
                parts = []
                slot = 0
    if parts:
        yield parts


def _copy(runs: Runs, piece: Piece) -> None:
    for blocks, slot in _joined(runs, piece.parts):
        piece.place[slot : slot + len(blocks)].copy_(blocks, non_blocking=True)


def _joined(runs: Runs, parts: list[Part]) -> Iterator[tuple[torch.Tensor, int]]:
    """Yields the blocks of the parts, and their slots, as few tensors.

    Host blocks of a layer's experts follow each other in memory. For small experts, queueing a copy
    for each would take longer than the copies.
    """
    start = 0
    while start < len(parts):
        run, first, count, slot = parts[start]
        source = runs.blocks[run]
        width = source.shape[1]
        address = source.data_ptr() + (first + count) * width  # of what follows
        start += 1
        while start < len(parts) and _follows(runs, parts[start], source, address):
            count += parts[start].count
            address += parts[start].count * width
            start += 1
        offset = source.storage_offset() + first * width
        yield source.as_strided((count, width), (width, 1), offset), slot


def _follows(runs: Runs, part: Part, source: torch.Tensor, address: int) -> bool:
    """True if a part begins at this address, in the same allocation as `source`."""
    blocks = runs.blocks[part.run]
    return (
        blocks.data_ptr() + part.first * blocks.shape[1] == address
        and blocks.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
    )
