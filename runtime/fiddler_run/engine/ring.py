"""The staging ring: device memory through which host blocks are streamed during prefill."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fiddler_run.engine.timeline import Lane, Timeline, Work

# The device reads one place while blocks arrive in the others. With two, the link would be idle
# between layers.
PLACES = 3
# blocks on the device, and the event after which they are there
Staged = tuple[torch.Tensor, "torch.cuda.Event | None"]


class StagingRing:
    """Places of `at_once` blocks each, reused in turn. Copies run on their own stream.

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
        places = min(num_blocks, PLACES)
        self._places = deque(self.blocks.split(self.at_once)[:places])
        self._free: dict[int, torch.cuda.Event] = {}  # by address: done when the last reader is
        self._prefetched: deque[tuple[torch.Tensor, Staged]] = deque()

    def prefetch(self, pieces: list[torch.Tensor], timeline: Timeline) -> None:
        """Starts to copy the first pieces that the next `stream` will probably need.

        The previous stream must have ended. All pieces but the first wait for the device's queued
        work. Otherwise, a copy in that work would wait for all pieces.
        """
        self._places.rotate(len(self._take_prefetched()))
        queued = None
        if self.copy_stream is not None:
            queued = torch.cuda.current_stream(self.blocks.device).record_event()
        for piece in pieces[: len(self._places)]:
            if queued is not None and self._prefetched:
                self.copy_stream.wait_event(queued)  # a second time, it changes nothing
            self._prefetched.append((piece, self.copy(piece, timeline)))

    def stream(self, pieces: list[torch.Tensor], timeline: Timeline) -> "Stream":
        """Starts to copy `pieces`, each uint8 [1 to at_once, block_bytes].

        There are as many copies in flight as places.
        """
        rest = deque(pieces)
        under_way: deque[Staged] = deque()
        prefetched = self._take_prefetched()
        while prefetched and rest and _begins_with(prefetched[0][0], rest[0]):
            _, (place, copied) = prefetched.popleft()
            under_way.append((place[: len(rest.popleft())], copied))
        self._places.rotate(len(prefetched))  # the other prefetched pieces are not needed next
        stream = Stream(self, under_way, rest, timeline)
        for _ in range(len(self._places) - len(under_way)):
            stream.start_next()
        return stream

    def copy(self, piece: torch.Tensor, timeline: Timeline) -> Staged:
        """Queues the copy of a piece into the next place."""
        place = self._places[0][: len(piece)]
        self._places.rotate(-1)
        if self.copy_stream is None:
            timeline.begin(Lane.LINK, Work.COPY)
            place.copy_(piece)
            timeline.end(Lane.LINK, Work.COPY)
            return place, None
        with torch.cuda.stream(self.copy_stream):
            if place.data_ptr() in self._free:
                self.copy_stream.wait_event(self._free[place.data_ptr()])
            timeline.begin(Lane.LINK, Work.COPY)
            place.copy_(piece, non_blocking=True)
            timeline.end(Lane.LINK, Work.COPY)
            return place, self.copy_stream.record_event()

    def release(self, place: torch.Tensor) -> None:
        """Lets the place be overwritten once the work queued so far has finished."""
        if self.copy_stream is not None:
            reader = torch.cuda.current_stream(self.blocks.device)
            self._free[place.data_ptr()] = reader.record_event()

    def _take_prefetched(self) -> "deque[tuple[torch.Tensor, Staged]]":
        taken = self._prefetched
        self._prefetched = deque()
        return taken


class Stream:
    """Pieces on their way to the device, in order."""

    def __init__(
        self,
        ring: StagingRing,
        under_way: "deque[Staged]",
        rest: "deque[torch.Tensor]",
        timeline: Timeline,
    ):
        self._ring = ring
        self._under_way = under_way
        self._rest = rest
        self._timeline = timeline

    @contextmanager
    def next(self) -> Iterator[torch.Tensor]:
        """Yields the next piece on the device. Leaving the context frees its place for a new copy.

        Work queued after the context does not delay copies.
        """
        place, copied = self._under_way.popleft()
        if copied is not None:
            torch.cuda.current_stream(place.device).wait_event(copied)
        try:
            yield place
        finally:
            self._ring.release(place)
            self.start_next()

    def start_next(self) -> None:
        if self._rest:
            self._under_way.append(self._ring.copy(self._rest.popleft(), self._timeline))


def _begins_with(blocks: torch.Tensor, piece: torch.Tensor) -> bool:
    return blocks.data_ptr() == piece.data_ptr() and len(blocks) >= len(piece)
