"""The device's part of one layer on the prefill path: resident blocks, and blocks that arrive.

A few launches take many experts (`GroupedPart`). If experts are large and have many tokens, matrix
products of one expert each (`SinglePart`) are faster, and take longer than their launches.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch

from fiddler_run.encodings.base import Encoding
from fiddler_run.engine.calls import ExpertCalls
from fiddler_run.engine.resources import Resources
from fiddler_run.engine.ring import Piece, Stream
from fiddler_run.engine.timeline import Lane, Work
from fiddler_run.kernels.block_table import BlockTable, Parts, build_table
from fiddler_run.kernels.limits import MAX_GROUPED_WORK

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # states, index, weights, on the device
Receive = Callable[[], torch.Tensor | None]


class DevicePart(Protocol):
    """A way to compute the device's part of a layer."""

    def add_resident(self) -> Iterator[None]:
        """Queues the resident blocks' work, one step before each yield."""

    def add_piece(self, number: int, piece: Piece) -> None:
        """Queues the work of a streamed piece, which is on the device."""

    def output(self, receive: Receive) -> torch.Tensor:
        """The layer's output [tokens, hidden], in the resources' `output_dtype`.

        Args:
            receive: queues a wait for the CPU's part and its copy, and returns it, float32 on the
                device. None if there is none.
        """


def device_part(
    resources: Resources, calls: ExpertCalls, inputs: Inputs, pieces: list[Piece]
) -> DevicePart:
    """The faster way to compute these calls."""
    on_device = len(pieces) or calls.num_resident.any()
    if resources.kernels.decode is None or not on_device:
        return SinglePart(resources, calls, inputs)
    blocks = calls.layer.num_blocks[calls.choices.experts]
    work = float((calls.choices.tokens * blocks).mean())
    if computed_singly(resources.kernels.cpu.block_format, work):
        return SinglePart(resources, calls, inputs)
    return GroupedPart(resources, calls, inputs, pieces)


def computed_singly(block_format: Encoding, token_blocks: float) -> bool:
    """True if calls of this many tokens times blocks, on average, are for `SinglePart`."""
    return token_blocks * block_format.block_weights > MAX_GROUPED_WORK


def queue(part: DevicePart, stream: Stream | None, resources: Resources) -> None:
    """Queues the part's work.

    To keep the link busy, streamed blocks are computed as they arrive, which frees their place in
    the ring, and a step of the resident blocks between two arrivals. The first piece comes before
    all resident blocks, because prefetched blocks fill the ring until it has been computed.
    """
    timeline = resources.timeline
    resident = part.add_resident()
    for number in range(len(stream.pieces) if stream else 0):
        with stream.next() as piece:
            timeline.begin(Lane.GPU, Work.STREAMED)
            part.add_piece(number, piece)
            timeline.end(Lane.GPU, Work.STREAMED)
        next(resident, None)
    for _ in resident:
        pass


class GroupedPart:
    """Takes a few launches of the GPU kernels for all resident blocks, and for each piece."""

    def __init__(
        self, resources: Resources, calls: ExpertCalls, inputs: Inputs, pieces: list[Piece]
    ):
        self._resources = resources
        self._kernels = resources.kernels.decode
        self._num_experts = len(calls.layer.num_blocks)
        self._states, self._index, self._weights = inputs
        self._group_tokens = self._kernels.group_tokens(float(calls.choices.tokens.mean()))
        self._of_layer = build_table(
            _parts(calls, pieces),
            1 + len(pieces),
            calls.choices.starts,
            calls.choices.numbers,
            calls.layer.block_bytes,
            self._group_tokens,
            self._kernels.max_launch_blocks(self._group_tokens),
        )
        table = resources.buffers.prefill_table(self._of_layer.table)
        gave_up = resources.buffers.gave_up
        self._table = self._kernels.read_table(table, gave_up, resources.device)
        shape = (*self._weights.shape, self._states.shape[1])
        self._results = self._states.new_zeros(shape, dtype=torch.float32)

    def add_resident(self) -> Iterator[None]:
        timeline = self._resources.timeline
        for number in range(len(self._of_layer.launches[0])):
            timeline.begin(Lane.GPU, Work.RESIDENT)
            self._launch(0, number)
            timeline.end(Lane.GPU, Work.RESIDENT)
            yield

    def add_piece(self, number: int, piece: Piece) -> None:
        for launch in range(len(self._of_layer.launches[1 + number])):
            self._launch(1 + number, launch)

    def output(self, receive: Receive) -> torch.Tensor:
        return self._kernels.combine(
            self._results,
            self._index,
            self._num_experts,
            receive(),
            self._resources.output_dtype,
        )

    def _launch(self, step: int, number: int) -> None:
        table: BlockTable = self._of_layer
        self._kernels.expert_gemm(
            self._table,
            table.num_blocks,
            table.num_groups,
            table.launches[step][number],
            self._group_tokens,
            self._states,
            self._weights,
            self._results,
        )


def _parts(calls: ExpertCalls, pieces: list[Piece]) -> Parts:
    """Step 0 has all resident blocks, step 1 + i those of piece i."""
    resident = calls.num_resident.nonzero()[0]
    listed = [
        (step, part.run, piece.place.data_ptr() + part.slot * calls.layer.block_bytes, part.count)
        for step, piece in enumerate(pieces, 1)
        for part in piece.parts
    ]
    step, run, address, count = np.array(listed, dtype=np.int64).reshape(-1, 4).T
    of_resident = calls.layer.resident.address[calls.choices.experts[resident]]
    return Parts(
        np.concatenate((np.zeros_like(resident), step)),
        np.concatenate((resident, calls.streaming[run])),
        np.concatenate((of_resident, address)),
        np.concatenate((calls.num_resident[resident], count)),
    )


class SinglePart:
    """Takes matrix products of one call at a time."""

    def __init__(self, resources: Resources, calls: ExpertCalls, inputs: Inputs):
        self._resources = resources
        self._calls = calls
        self._hidden_states, index, weights = inputs
        # The order of `sorted_choices`. Choices of nonexistent experts come last.
        chosen = index.flatten()
        last = torch.iinfo(chosen.dtype).max
        order = chosen.where(chosen >= 0, last).argsort(stable=True)
        self._rows = order // index.shape[1]
        self._weights = weights.flatten()[order].unsqueeze(1)
        # by call
        self._states: dict[int, torch.Tensor] = {}
        self._sums: dict[int, torch.Tensor] = {}

    def add_resident(self) -> Iterator[None]:
        timeline = self._resources.timeline
        blocks = self._calls.layer.resident.blocks
        experts = self._calls.choices.experts.tolist()
        for call in self._calls.num_resident.nonzero()[0].tolist():
            timeline.begin(Lane.GPU, Work.RESIDENT)
            self._add(blocks[experts[call]], call)
            timeline.end(Lane.GPU, Work.RESIDENT)
            yield

    def add_piece(self, number: int, piece: Piece) -> None:
        for part in piece.parts:
            blocks = piece.place[part.slot : part.slot + part.count]
            self._add(blocks, int(self._calls.streaming[part.run]))

    def output(self, receive: Receive) -> torch.Tensor:
        output = torch.zeros_like(self._hidden_states, dtype=torch.float32)
        for call, total in self._sums.items():
            tokens = self._tokens(call)
            output.index_add_(0, self._rows[tokens], total * self._weights[tokens])
        cpu_output = receive()
        if cpu_output is not None:
            output += cpu_output
        return output.to(self._resources.output_dtype)

    def _tokens(self, call: int) -> slice:
        return slice(*self._calls.choices.starts[call : call + 2].tolist())

    def _add(self, blocks: torch.Tensor, call: int) -> None:
        if call not in self._states:
            self._states[call] = self._hidden_states[self._rows[self._tokens(call)]]
        part = self._resources.kernels.apply(blocks, self._states[call])
        self._sums[call] = self._sums[call].add_(part) if call in self._sums else part
