"""bfloat16 weights in 12 bits each, without loss.

A bfloat16 is a sign, an exponent of 8 bits, and a mantissa of 7 bits. The weights of a row rarely
use more than 14 of the 256 exponents. So a weight is stored as its low byte (the lowest bit of the
exponent, and the mantissa) and a code of 4 bits: the sign, and which of 8 pairs of exponents it
has. Code 0 is the pair {0, 1}, so zeros and subnormals are exact; codes 1 to 7 are consecutive
pairs, chosen for each row. A weight with any other exponent is an *escape*: it is stored as +0, and
its value in a list. Lists have fixed room, so that all blocks have the same size. A list that does
not fit is kept elsewhere in host memory, and the block holds its address. lossless12.h has the
layout.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache, partial
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING

from fiddler_run.encodings.base import Encoding
from fiddler_run.errors import FiddlerError

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 64  # weights of a row that are stored together; sizes are multiples of it
WEIGHTS_PER_ESCAPE = 512
ESCAPE_BYTES = 4  # column and value, uint16 each
ALIGNMENT = 64


class Lossless12(Encoding):
    name = "lossless12"
    dtype = "bfloat16"
    multiple = GROUP
    max_row = 2**16  # an escape's column is a uint16

    @property
    def rows(self) -> int:
        """Rows of gate, up and down."""
        return self.rows_per_neuron * self.block_neurons + self.hidden_size

    @property
    def capacity(self) -> int:
        """Escapes for which a block has room."""
        return self.block_weights // WEIGHTS_PER_ESCAPE

    @property
    def block_bytes(self) -> int:
        return _aligned(self.offsets()[-1] + self.block_weights // 2 * 3)

    @property
    def decoded_bytes(self) -> int:
        return 2 * self.block_weights

    def offsets(self) -> tuple[int, int, int, int]:
        """Where the bases, the first escapes, the escapes and the weights begin."""
        firsts = ALIGNMENT + _aligned(self.rows)
        escapes = firsts + _aligned(4 * (self.rows + 1))
        return ALIGNMENT, firsts, escapes, escapes + _aligned(ESCAPE_BYTES * self.capacity)

    @classmethod
    def available(cls) -> bool:
        return _library() is not None

    def encode(
        self, blocks: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, first_neuron: int
    ) -> list[Tensor]:
        import torch

        library = _library()
        if library is None:
            raise FiddlerError(
                "the encoder of lossless12 is not built; install fiddler-opt again where a C++20"
                " compiler can build it, or plan with `--encoding bf16`"
            )
        given = (gate if self.gated else up, up, down)
        matrices = [matrix.to(torch.bfloat16).contiguous() for matrix in given]
        sizes = self.hidden_size, self.block_neurons
        scratch = torch.empty(4 * max(sizes), dtype=torch.uint8)
        encode = partial(
            library.lossless12_encode,
            *sizes,
            *(matrix.data_ptr() for matrix in matrices),
            len(up),
        )
        overflows = []
        for number, block in enumerate(blocks):
            into = first_neuron + number * self.block_neurons, block.data_ptr()
            escapes = encode(*into, None, scratch.data_ptr(), self.gated)
            if escapes > self.capacity:
                # a GPU reads the list in place
                overflow = torch.empty(
                    (escapes, 2), dtype=torch.uint16, pin_memory=torch.cuda.is_available()
                )
                encode(*into, overflow.data_ptr(), scratch.data_ptr(), self.gated)
                overflows.append(overflow)
        return overflows

    def decode(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        library = _library()
        if library is None or blocks.device.type != "cpu":
            return self.decode_with_pytorch(blocks)
        sizes = self.hidden_size, self.block_neurons
        rows = self.rows_per_neuron * self.block_neurons
        gate_up = torch.empty((len(blocks), rows, self.hidden_size), dtype=torch.bfloat16)
        down = torch.empty((len(blocks), *sizes), dtype=torch.bfloat16)
        for parts in zip(blocks.contiguous(), gate_up, down, strict=True):
            library.lossless12_decode(*sizes, *(part.data_ptr() for part in parts), self.gated)
        return gate_up, down

    def decode_with_pytorch(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """As `decode`, on any device. Takes several times as much memory, and more time."""
        import torch

        hidden, neurons = self.hidden_size, self.block_neurons
        first_down = self.rows_per_neuron * neurons
        at_bases, at_firsts, at_escapes, at_weights = self.offsets()
        bases = blocks[:, at_bases : at_bases + self.rows].split((first_down, hidden), dim=1)
        split = at_weights + first_down * hidden // 2 * 3
        gate_up = _unpacked(blocks[:, at_weights:split].unflatten(1, (first_down, -1)), bases[0])
        stop = split + 3 * neurons * hidden // 2
        down = _unpacked(blocks[:, split:stop].unflatten(1, (hidden, -1)), bases[1])
        firsts = blocks[:, at_firsts : at_firsts + 4 * (self.rows + 1)].view(torch.int32).long()
        inside = blocks[:, at_escapes:at_weights].view(torch.int16).unflatten(1, (-1, 2))
        for number, first in enumerate(firsts.cpu()):
            escapes = inside[number, : first[-1]]
            overflow = blocks[number, :8].cpu().view(torch.int64).item()
            if overflow:
                escapes = _at_address(overflow, int(first[-1])).to(blocks.device)
            rows = torch.arange(self.rows).repeat_interleave(first.diff()).to(blocks.device)
            columns = escapes[:, 0].long() & 0xFFFF
            for matrix, start in ((gate_up[number], 0), (down[number], first_down)):
                here = (rows >= start) & (rows < start + len(matrix))
                matrix[rows[here] - start, columns[here]] = escapes[here, 1]
        return gate_up.view(torch.bfloat16), down.view(torch.bfloat16)


def _unpacked(rows: Tensor, bases: Tensor) -> Tensor:
    """The bits of weights without escapes, int16 [blocks, rows, width].

    Args:
        rows: uint8 [blocks, rows, 3/2 width].
        bases: uint8 [blocks, rows].
    """
    import torch

    width = rows.shape[-1] // 3 * 2
    low, codes = rows.split((width, width // 2), dim=-1)
    codes = codes.unflatten(-1, (-1, GROUP // 2))
    codes = torch.cat((codes & 15, codes >> 4), dim=-1).flatten(-2).int()
    index = codes & 7
    pair = torch.where(index == 0, 0, index + bases.unsqueeze(-1))
    bits = (codes & 8) << 12 | pair << 8 | low
    # Places 16 i + 8 h + j of a group hold weights 32 h + 8 i + j.
    in_order = bits.unflatten(-1, (-1, 4, 2, 8)).transpose(-3, -2).flatten(-4)
    return in_order.to(torch.int16)


def _at_address(address: int, escapes: int) -> Tensor:
    """A list of escapes in host memory, int16 [escapes, 2]: columns and values."""
    import torch

    stored = (ctypes.c_int16 * (2 * escapes)).from_address(address)
    return torch.frombuffer(stored, dtype=torch.int16).view(escapes, 2)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@cache
def _library() -> ctypes.CDLL | None:
    """The encoder, built during installation if there is a compiler. None otherwise."""
    names = (Path(__file__).with_name("_lossless12" + suffix) for suffix in EXTENSION_SUFFIXES)
    found = next((path for path in names if path.exists()), None)
    if found is None:
        return None
    loaded = ctypes.CDLL(os.fspath(found))
    pointer = ctypes.c_void_p
    integer = ctypes.c_int
    loaded.lossless12_bytes.argtypes = [integer, integer, integer]
    loaded.lossless12_bytes.restype = ctypes.c_int64
    loaded.lossless12_encode.argtypes = [
        *(integer, integer, pointer, pointer, pointer),
        *(integer, integer, pointer, pointer, pointer, integer),
    ]
    loaded.lossless12_encode.restype = ctypes.c_int64
    loaded.lossless12_decode.argtypes = [*(integer, integer, pointer, pointer, pointer), integer]
    loaded.lossless12_decode.restype = None
    return loaded
