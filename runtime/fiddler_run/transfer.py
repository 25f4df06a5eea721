"""What crosses the link: activations to the CPU and back, and blocks that are streamed to the device."""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

import torch

from fiddler_run.kernels.cpu import MOST_ROUTED_TOKENS, RoutedInput, table_size
from fiddler_run.timeline import Timeline


class Mailbox:
    """Page-locked host memory through which activations go to the CPU and its results come back."""

    def __init__(self, device: torch.device):
        self._device, self._on_gpu = device, device.type == "cuda"
        self._buffers: dict[str, torch.Tensor] = {}
        # Numbers of the CPU's jobs: of the last finished one; of the last whose table is complete; of those whose tokens have come.
        flags = torch.zeros((2 + MOST_ROUTED_TOKENS // 8, 8), dtype=torch.int64, pin_memory=self._on_gpu)  # rows: cache lines
        self.finished, self._described, self._arrived = flags[0, :1], flags[1, :1], flags[2:].flatten()

    def receive(self, *tensors: torch.Tensor, meanwhile: Callable[[], None]) -> list[torch.Tensor]:
        """The device's tensors in host memory, until the next call. Does something useful, then waits for the device."""
        if not self._on_gpu:
            meanwhile()
            return list(tensors)
        received = [self._buffer(str(number), tensor.shape, tensor.dtype) for number, tensor in enumerate(tensors)]
        for host, tensor in zip(received, tensors, strict=True):
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
        sent = {"states": states, "index": index, "weights": weights}
        room = {name: self._buffer(name, tensor.shape, tensor.dtype) for name, tensor in sent.items()}
        size = table_size(max_blocks, num_experts, index.numel())
        return RoutedInput(
            **room,
            arrived=self._arrived,
            table=self._buffer("table", torch.Size([size]), torch.int64),
            described=self._described,
            max_blocks=max_blocks,
        )

    def _buffer(self, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        buffer, elements = self._buffers.get(name), shape.numel()
        if buffer is None or len(buffer) < elements or buffer.dtype != dtype:
            with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside of it
                buffer = self._buffers[name] = torch.empty(elements, dtype=dtype, pin_memory=self._on_gpu)
        return buffer[:elements].view(shape)


class StagingRing:
    """Device memory through which absent blocks are streamed: slots are reused in turn, copies run on their own stream.

    On a machine without CUDA the ring lies in host memory and the copies are plain ones.
    """

    def __init__(self, num_slots: int, block_elements: int, dtype: torch.dtype, device: torch.device):
        self.slots = torch.empty((num_slots, block_elements), dtype=dtype, device=device)
        self.copy_stream = None
        if device.type == "cuda":
            self.copy_stream = torch.cuda.Stream(device)
            self.copy_stream.wait_stream(torch.cuda.current_stream(device))  # earlier users of the slots' memory
        self._next = 0
        self._free = [None] * num_slots  # event: the last computation that read the slot is done

    def stream(self, blocks: list[torch.Tensor], timeline: Timeline) -> Iterator[torch.Tensor]:
        """Starts to copy `blocks`; yields each [1, block_elements] on the device, to be used before the next is asked for.

        As many copies as there are slots are under way at once.
        """
        copies = (self._copy(block, timeline) for block in blocks)
        return self._arrivals(deque(islice(copies, len(self.slots))), copies)

    def _arrivals(self, under_way: deque, copies: Iterator) -> Iterator[torch.Tensor]:
        while under_way:
            slot, copied = under_way.popleft()
            if copied is not None:
                torch.cuda.current_stream(self.slots.device).wait_event(copied)
            try:
                yield self.slots[slot : slot + 1]
            finally:  # also where nobody asks for more
                if copied is not None:
                    self._free[slot] = torch.cuda.current_stream(self.slots.device).record_event()
            under_way.extend(islice(copies, 1))

    def _copy(self, block: torch.Tensor, timeline: Timeline) -> tuple[int, torch.cuda.Event | None]:
        """Queues the copy of a block into the next slot: (slot, event of its end)."""
        slot, self._next = self._next, (self._next + 1) % len(self.slots)
        if self.copy_stream is None:
            timeline.begin("link", "copy")
            self.slots[slot].copy_(block)
            timeline.end("link", "copy")
            return slot, None
        with torch.cuda.stream(self.copy_stream):
            if self._free[slot] is not None:
                self.copy_stream.wait_event(self._free[slot])
            timeline.begin("link", "copy")
            self.slots[slot].copy_(block, non_blocking=True)
            timeline.end("link", "copy")
            return slot, self.copy_stream.record_event()
