"""What crosses the link: activations to the CPU and back, and blocks that are streamed to the device."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice

import torch

from fiddler_run.kernels.routed import RoutedInput, table_size
from fiddler_run.plan import MOST_ROUTED_TOKENS
from fiddler_run.timeline import Timeline


class Mailbox:
    """Page-locked host memory through which activations go to the CPU and its results come back."""

    def __init__(self, device: torch.device):
        self._device, self._on_gpu = device, device.type == "cuda"
        self._buffers: dict[str, torch.Tensor] = {}
        # Numbers of the CPU's jobs: of the last finished one; of the last whose table is complete; of the last that the GPU gave
        # up waiting for, or 0; of the last that gave up waiting for the GPU, or 0; of those whose tokens have come. Each row is a
        # cache line.
        flags = torch.zeros((4 + MOST_ROUTED_TOKENS // 8, 8), dtype=torch.int64, pin_memory=self._on_gpu)
        self.finished = flags[0, :1]
        self._described = flags[1, :1]
        self.gave_up = flags[2, :1]
        self._timed_out = flags[3, :1]
        self._arrived = flags[4:].flatten()

    def receive(
        self, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, meanwhile: Callable[[], None]
    ) -> list[torch.Tensor]:
        """The device's tensors in host memory, until the next call. Does something useful, then waits for the device."""
        if not self._on_gpu:
            meanwhile()
            return [states, index, weights]
        received = self._room(states, index, weights)
        for host, tensor in zip(received, (states, index, weights), strict=True):
            host.copy_(tensor, non_blocking=True)
        arrived = torch.cuda.current_stream(self._device).record_event()
        meanwhile()
        arrived.synchronize()
        return received

    def output(self, shape: torch.Size) -> torch.Tensor:
        """Room for the CPU's result, float32, until the device has sent the next layer's tokens: by then it has read it."""
        return self._buffer("output", shape, torch.float32)

    def routed(
        self, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, num_experts: int, max_blocks: int
    ) -> RoutedInput:
        """Room for what the device will send, until the next call of this: the device sends nothing before the last job is done."""
        size = table_size(max_blocks, num_experts, index.numel())
        return RoutedInput(
            *self._room(states, index, weights),
            arrived=self._arrived,
            table=self._buffer("table", torch.Size([size]), torch.int64),
            described=self._described,
            timed_out=self._timed_out,
            max_blocks=max_blocks,
        )

    def _room(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        named = zip(("states", "index", "weights"), tensors, strict=True)
        return [self._buffer(name, tensor.shape, tensor.dtype) for name, tensor in named]

    def _buffer(self, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        buffer, elements = self._buffers.get(name), shape.numel()
        if buffer is None or len(buffer) < elements or buffer.dtype != dtype:
            if buffer is not None and self._on_gpu:
                torch.cuda.synchronize(self._device)  # kernels may still read the old one, of which PyTorch does not know
            with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside of it
                buffer = self._buffers[name] = torch.empty(elements, dtype=dtype, pin_memory=self._on_gpu)
        return buffer[:elements].view(shape)


class StagingRing:
    """Device memory through which absent blocks are streamed, a few at a time: places for `at_once` blocks are reused in turn,
    copies run on their own stream.

    On a machine without CUDA the ring lies in host memory and the copies are plain ones.
    """

    def __init__(self, num_slots: int, block_elements: int, dtype: torch.dtype, device: torch.device):
        """`num_slots`: blocks that there is room for."""
        self.slots = torch.empty((num_slots, block_elements), dtype=dtype, device=device)
        self.copy_stream = None
        if device.type == "cuda":
            self.copy_stream = torch.cuda.Stream(device)
            self.copy_stream.wait_stream(torch.cuda.current_stream(device))  # earlier users of the slots' memory
        self.at_once = max(1, num_slots // 2)  # the device reads some while the next ones arrive
        self._places = deque(self.slots.split(self.at_once)[: num_slots // self.at_once])
        self._free: dict[int, torch.cuda.Event] = {}  # by address of a place: the last computation that read it is done
        self._ahead: deque[tuple[torch.Tensor, _Arrival]] = deque()  # what was copied before it was asked for

    def stream(self, pieces: list[torch.Tensor], timeline: Timeline) -> Iterator[AbstractContextManager[torch.Tensor]]:
        """Starts to copy `pieces`, each some blocks [1 to at_once, block_elements]; for each yields a context in which it is on
        the device, to be left before the next is asked for. What the device is given to do after it keeps no copy waiting.

        As many copies as there are places are under way at once.
        """
        under_way, rest, ahead = deque(), deque(pieces), self._take_ahead()
        while ahead and rest and _begins_with(ahead[0][0], rest[0]):
            _, (place, copied) = ahead.popleft()
            under_way.append((place[: len(rest.popleft())], copied))
        self._places.rotate(len(ahead))  # what else was copied is not what comes next: there is room in its places
        copies = (self._copy(piece, timeline) for piece in rest)
        under_way.extend(islice(copies, len(self._places) - len(under_way)))
        return self._arrivals(under_way, copies)

    def stream_ahead(self, pieces: list[torch.Tensor], timeline: Timeline) -> None:
        """Starts to copy the first of these, with which the next call of `stream` will probably begin. Of the one before,
        all contexts must have been left."""
        self._places.rotate(len(self._take_ahead()))
        self._ahead = deque((piece, self._copy(piece, timeline)) for piece in pieces[: len(self._places)])

    def _take_ahead(self) -> "deque[tuple[torch.Tensor, _Arrival]]":
        ahead, self._ahead = self._ahead, deque()
        return ahead

    def _arrivals(
        self, under_way: "deque[_Arrival]", copies: Iterator["_Arrival"]
    ) -> Iterator[AbstractContextManager[torch.Tensor]]:
        @contextmanager
        def lent(arrived: torch.Tensor, copied: "torch.cuda.Event | None") -> Iterator[torch.Tensor]:
            if copied is not None:
                torch.cuda.current_stream(self.slots.device).wait_event(copied)
            try:
                yield arrived
            finally:
                if copied is not None:
                    self._free[arrived.data_ptr()] = torch.cuda.current_stream(self.slots.device).record_event()
                under_way.extend(islice(copies, 1))

        while under_way:
            yield lent(*under_way.popleft())

    def _copy(self, piece: torch.Tensor, timeline: Timeline) -> "_Arrival":
        """Queues the copy of a piece into the next place."""
        place = self._places[0][: len(piece)]
        self._places.rotate(-1)
        if self.copy_stream is None:
            timeline.begin("link", "copy")
            place.copy_(piece)
            timeline.end("link", "copy")
            return place, None
        with torch.cuda.stream(self.copy_stream):
            if place.data_ptr() in self._free:
                self.copy_stream.wait_event(self._free[place.data_ptr()])
            timeline.begin("link", "copy")
            place.copy_(piece, non_blocking=True)
            timeline.end("link", "copy")
            return place, self.copy_stream.record_event()


_Arrival = tuple[torch.Tensor, "torch.cuda.Event | None"]  # where on the device, and when it is there


def _begins_with(blocks: torch.Tensor, piece: torch.Tensor) -> bool:
    return blocks.data_ptr() == piece.data_ptr() and len(blocks) >= len(piece)
