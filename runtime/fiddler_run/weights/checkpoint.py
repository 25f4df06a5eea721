"""The sources of weights: a checkpoint in Hugging Face format, or random numbers."""

import random
from typing import Protocol

import torch

from fiddler_run.encodings.base import Encoding
from fiddler_run.models.experts import Matrices
from fiddler_run.models.tensor_map import TensorMap
from fiddler_run.plan.shape import ModelShape
from fiddler_run.weights.packed import MATRICES, PackedFormat, blocks_of
from fiddler_run.weights.tensor_files import STORED_DTYPES, TensorFiles


class Weights(Protocol):
    def expert(self, layer: int, expert: int) -> Matrices:
        """An expert's matrices in host memory. The caller must not write to them."""

    def blocks(self, layer: int, expert: int, encoding: Encoding) -> torch.Tensor | None:
        """An expert's blocks, uint8 [count, block_bytes], if they are stored in this encoding."""


class DummyWeights:
    """Experts of random numbers, reproducible by seed.

    Each matrix is a different slice of one pool of normal numbers, because drawing 46 billion would
    take longer than loading a file.
    """

    def __init__(self, shape: ModelShape, dtype: torch.dtype, std: float = 0.02, seed: int = 0):
        self._size = shape.intermediate_size, shape.hidden_size
        self._elements = shape.intermediate_size * shape.hidden_size
        self._seed = seed
        pool = torch.empty(self._elements + min(self._elements, 2**24))
        self._pool = pool.normal_(std=std, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def expert(self, layer: int, expert: int) -> Matrices:
        starts = random.Random(f"{self._seed} {layer} {expert}")
        last = len(self._pool) - self._elements
        gate, up, down = (
            self._pool[start:][: self._elements]
            for start in (starts.randint(0, last) for _ in range(3))
        )
        return gate.view(self._size), up.view(self._size), down.view(self._size[::-1])

    def blocks(self, layer: int, expert: int, encoding: Encoding) -> None:
        return None


class Checkpoint:
    """The tensors of a checkpoint.

    They are read in large pieces rather than mapped. This is three times as fast if the files are
    in the page cache; if not, several threads keep the disk busy.
    """

    def __init__(self, files: TensorFiles, tensors: TensorMap):
        """Opens a checkpoint.

        Args:
            files: the checkpoint's files, already checked.
            tensors: the sources of the model's parameters in these files.
        """
        self.files = files
        self.tensors = tensors
        self._packed = PackedFormat.of(files)

    def dense(self, target: str) -> dict[str, torch.Tensor]:
        """The parameters outside the experts that the target's tensors make up, by name."""
        return self.tensors.dense(target, self.read)

    def expert(self, layer: int, expert: int) -> Matrices:
        if self._packed is None:
            return self.tensors.expert(layer, expert, self.read)
        name = self._packed.name(layer, expert)
        if name in self.files:
            return self._decoded(name)
        gate, up, down = (self.read(self._packed.matrix(layer, expert, each)) for each in MATRICES)
        return gate, up, down

    def blocks(self, layer: int, expert: int, encoding: Encoding) -> torch.Tensor | None:
        if self._packed is None or self._packed.encoding != encoding:
            return None
        name = self._packed.name(layer, expert)
        if name not in self.files:
            return None
        stored = torch.empty(self._packed.tensor_shape, dtype=torch.uint8)
        for number, block in enumerate(blocks_of(self.files.shard(name), name)):
            stored[number] = block[0]
        return stored

    def _decoded(self, name: str) -> Matrices:
        packed = self._packed
        dtype = getattr(torch, packed.encoding.dtype)
        row = packed.intermediate_size, packed.encoding.hidden_size
        gate, up, down = (torch.empty(size, dtype=dtype) for size in (row, row, row[::-1]))
        for number, block in enumerate(blocks_of(self.files.shard(name), name)):
            here, gate_rows, up_rows, columns = packed.decoded(number, block)
            gate[here] = gate_rows
            up[here] = up_rows
            down[:, here] = columns
        return gate, up, down

    def read(self, name: str, expert: int | None = None) -> torch.Tensor:
        """Reads a tensor by its name in the checkpoint, in its shape and dtype.

        With `expert`, only that part of its first dimension, which becomes 1. The caller owns it.
        """
        shard = self.files.shard(name)
        stored = shard.tensors[name]
        shape = stored.shape if expert is None else [1, *stored.shape[1:]]
        dtype = getattr(torch, STORED_DTYPES[stored.dtype])
        target = torch.empty(shape, dtype=dtype)
        content = target.flatten().view(torch.uint8)
        shard.read(name, memoryview(content.numpy()), (expert or 0) * target.nbytes)
        return target
