"""The experts of a checkpoint that `fiddler-opt pack` wrote: stored in blocks, already encoded.

Such an expert is one tensor, uint8 [blocks, block_bytes], named after the encoding. The metadata of
its file holds the encoding's name and sizes, and the SHA-256 of each tensor. An expert that does
not fit the encoding is stored as three matrices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fiddler_run.encodings.base import Encoding
from fiddler_run.encodings.table import ENCODINGS
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.shape import ModelShape
from fiddler_run.weights.shard import Shard
from fiddler_run.weights.tensor_files import TensorFiles

if TYPE_CHECKING:
    from torch import Tensor

ENCODING = "encoding"
MATRICES = ("gate", "up", "down")  # of an expert that does not fit the encoding
SIZES = ("hidden_size", "block_neurons", "intermediate_size")
MAX_DIGITS = 9  # of a size
AGAIN = "pack the model again with `fiddler-opt pack`"


@dataclass(frozen=True)
class PackedFormat:
    """How the experts of a checkpoint are stored."""

    encoding: Encoding
    intermediate_size: int

    @classmethod
    def of(cls, files: TensorFiles) -> PackedFormat | None:
        """The format of a checkpoint's files. None if no experts are stored encoded.

        Raises:
            FiddlerError: the metadata are damaged, or differ between files.
        """
        found: PackedFormat | None = None
        for shard in files.shards:
            if ENCODING not in shard.metadata:
                continue
            this = cls._of_shard(shard)
            if found is not None and this.metadata != found.metadata:
                raise FiddlerError(f"{shard.path}: stored unlike the files next to it; {AGAIN}")
            found = this
        return found

    @classmethod
    def _of_shard(cls, shard: Shard) -> PackedFormat:
        name = shard.metadata[ENCODING]
        sizes = [shard.metadata.get(key, "") for key in SIZES]
        if name not in ENCODINGS:
            raise FiddlerError(f"{shard.path}: the metadata name no known encoding; {AGAIN}")
        if not all(size.isdecimal() and len(size) <= MAX_DIGITS and int(size) for size in sizes):
            raise FiddlerError(f"{shard.path}: the metadata name no valid sizes; {AGAIN}")
        hidden, neurons, intermediate = map(int, sizes)
        problem = ENCODINGS[name].size_problem(hidden) or ENCODINGS[name].size_problem(neurons)
        if problem is not None:
            raise FiddlerError(f"{shard.path}: {ENCODING} {name}: {problem}; {AGAIN}")
        return cls(ENCODINGS[name](hidden, neurons), intermediate)

    @property
    def metadata(self) -> dict[str, str]:
        """The format as metadata of a file."""
        sizes = self.encoding.hidden_size, self.encoding.block_neurons, self.intermediate_size
        return {ENCODING: self.encoding.name, **dict(zip(SIZES, map(str, sizes), strict=True))}

    @property
    def tensor_shape(self) -> list[int]:
        blocks = self.encoding.blocks_per_expert(self.intermediate_size)
        return [blocks, self.encoding.block_bytes]

    def name(self, layer: int, expert: int) -> str:
        """The name of an expert's tensor. Layers count those with experts."""
        return f"layers.{layer}.experts.{expert}.{self.encoding.name}"

    def matrix(self, layer: int, expert: int, which: str) -> str:
        """The name of one of MATRICES of an expert that does not fit the encoding."""
        return f"layers.{layer}.experts.{expert}.{which}"

    def tensors(self, shape: ModelShape, files: TensorFiles) -> dict[str, list[int]]:
        """The names and shapes of the expert tensors that the files should contain."""
        row = [shape.intermediate_size, shape.hidden_size]
        sizes = dict(zip(MATRICES, (row, row, row[::-1]), strict=True))
        expected = {}
        for layer in range(shape.num_layers):
            for expert in range(shape.num_experts):
                raw = {self.matrix(layer, expert, which): size for which, size in sizes.items()}
                if all(name in files for name in raw):
                    expected |= raw
                else:
                    expected[self.name(layer, expert)] = self.tensor_shape
        return expected

    def shape_problem(self, shape: ModelShape) -> str | None:
        """Why these are not the experts of a model of this shape. None if they may be."""
        found = self.encoding.hidden_size, self.intermediate_size, self.encoding.dtype
        expected = shape.hidden_size, shape.intermediate_size, shape.dtype
        if found == expected:
            return None
        return (
            f"the packed experts are {found[0]} x {found[1]} in {found[2]}, but config.json implies"
            f" {expected[0]} x {expected[1]} in {expected[2]}; {AGAIN}"
        )

    def decoded(self, number: int, block: Tensor) -> tuple[slice, Tensor, Tensor, Tensor]:
        """Decodes block `number` of an expert, uint8 [1, block_bytes].

        Returns:
            Its neurons, and their gate rows, up rows and down columns.
        """
        neurons = self.encoding.block_neurons
        first = number * neurons
        count = min(neurons, self.intermediate_size - first)
        gate_up, down = self.encoding.decode(block)
        gate, up = gate_up[0].split(neurons)
        return slice(first, first + count), gate[:count], up[:count], down[0, :, :count]


def checksum_key(name: str) -> str:
    """The key of a tensor's SHA-256 in the metadata of its file."""
    return f"sha256 {name}"


def blocks_of(shard: Shard, name: str) -> Iterator[Tensor]:
    """Reads the blocks of an expert one after the other, uint8 [1, block_bytes] each.

    They share memory: each is overwritten by the next.

    Raises:
        FiddlerError: the file cannot be read or, after the last block, the checksum differs.
    """
    import torch

    count, block_bytes = shard.tensors[name].shape
    block = torch.empty((1, block_bytes), dtype=torch.uint8)
    content = memoryview(block.numpy()).cast("B")
    checksum = hashlib.sha256()
    for number in range(count):
        shard.read(name, content, number * block_bytes)
        checksum.update(content)
        yield block
    if checksum.hexdigest() != shard.metadata.get(checksum_key(name)):
        raise FiddlerError(f"{shard.path}: tensor {name} is damaged: its SHA-256 differs; {AGAIN}")
