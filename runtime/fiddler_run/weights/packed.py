"""The experts of a checkpoint that `fiddler-opt pack` wrote: stored in blocks, already encoded.

Such an expert is one tensor, uint8 [blocks, block_bytes], instead of three matrices. It is named
after the encoding. The metadata of its file holds the encoding's name and sizes, and the SHA-256 of
each tensor. Experts that do not fit the encoding are stored as in any checkpoint.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING

from fiddler_run.encodings.base import Encoding
from fiddler_run.encodings.table import ENCODINGS
from fiddler_run.errors import FiddlerError
from fiddler_run.models.family import Family
from fiddler_run.plan.shape import ModelShape
from fiddler_run.weights.shard import Shard
from fiddler_run.weights.tensor_files import TensorFiles

if TYPE_CHECKING:
    from torch import Tensor

ENCODING = "encoding"
SIZES = ("hidden_size", "block_neurons", "intermediate_size")
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
        if name not in ENCODINGS or not all(size.isdecimal() and int(size) for size in sizes):
            raise FiddlerError(f"{shard.path}: the metadata name no known encoding; {AGAIN}")
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

    def holds(self, encoding: Encoding) -> bool:
        """True if the stored blocks are those of `encoding`."""
        return type(encoding) is type(self.encoding) and vars(encoding) == vars(self.encoding)

    def name(self, family: Family, layer: int, expert: int) -> str:
        """The name of an expert's tensor."""
        matrices = commonprefix(family.expert_names(layer, expert))
        return f"{matrices.rpartition('.')[0]}.{self.encoding.name}"

    def matrices(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gate, up and down matrices of an expert, from its blocks."""
        import torch

        hidden, neurons = self.encoding.hidden_size, self.encoding.block_neurons
        rows = len(blocks) * neurons
        dtype = getattr(torch, self.encoding.dtype)
        gate, up = (torch.empty((rows, hidden), dtype=dtype) for _ in range(2))
        down = torch.empty((hidden, rows), dtype=dtype)
        for number, block in enumerate(blocks):  # one by one, because decoding takes memory
            gate_up, columns = self.encoding.decode(block.unsqueeze(0))
            here = slice(number * neurons, (number + 1) * neurons)
            gate[here], up[here] = gate_up[0].split(neurons)
            down[:, here] = columns[0]
        size = self.intermediate_size
        return gate[:size], up[:size], down[:, :size].contiguous()


def expert_tensors(files: TensorFiles, family: Family, shape: ModelShape) -> dict[str, list[int]]:
    """The names and shapes of the expert tensors that the files should contain."""
    packed = PackedFormat.of(files)
    expected = family.expert_tensors(shape)
    if packed is None:
        return expected
    for layer in range(shape.num_layers):
        for expert in range(shape.num_experts):
            name = packed.name(family, layer, expert)
            if name in files:
                expected[name] = packed.tensor_shape
                for matrix in family.expert_names(layer, expert):
                    del expected[matrix]
    return expected


def checksum_key(name: str) -> str:
    """The key of a tensor's SHA-256 in the metadata of its file."""
    return f"sha256 {name}"


def check_sum(shard: Shard, name: str, content: memoryview) -> None:
    """Compares the content of a tensor with its checksum.

    Raises:
        FiddlerError: they differ.
    """
    if hashlib.sha256(content).hexdigest() != shard.metadata.get(checksum_key(name)):
        raise FiddlerError(f"{shard.path}: tensor {name} is damaged: its SHA-256 differs; {AGAIN}")
