"""Where weights come from: a Mixtral checkpoint in Hugging Face format, checked before anything is loaded, or random numbers."""

import random
from pathlib import Path
from typing import Protocol, Self

import torch

from fiddler_run.errors import FiddlerError
from fiddler_run.plan import ModelShape
from fiddler_run.tensor_files import TensorFiles

EXPERT_TENSOR = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
MATRICES = ("w1", "w3", "w2")  # gate [intermediate, hidden], up [intermediate, hidden], down [hidden, intermediate]
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Weights(Protocol):
    def expert(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate [intermediate, hidden], up [intermediate, hidden] and down [hidden, intermediate], in host memory.

        The caller must not write to them.
        """


class DummyWeights:
    """Experts of random numbers, the same for the same seed: speed and memory of a model without its checkpoint.

    Every matrix is another stretch of one pool of normal numbers: drawing 46 billion would take longer than loading a file.
    """

    def __init__(self, shape: ModelShape, dtype: torch.dtype, std: float = 0.02, seed: int = 0):
        self._size = shape.intermediate_size, shape.hidden_size
        self._elements = shape.intermediate_size * shape.hidden_size
        self._seed = seed
        pool = torch.empty(self._elements + min(self._elements, 2**24))
        self._pool = pool.normal_(std=std, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def expert(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        starts = random.Random(f"{self._seed} {layer} {expert}")
        last = len(self._pool) - self._elements
        gate, up, down = (self._pool[start:][: self._elements] for start in (starts.randint(0, last) for _ in MATRICES))
        return gate.view(self._size), up.view(self._size), down.view(self._size[::-1])


class Checkpoint:
    """The tensors of a checkpoint.

    They are read in large pieces rather than mapped: that is three times as fast where the files are in the page cache already,
    and where they are not, several threads keep the disk busy.
    """

    def __init__(self, files: TensorFiles):
        """`files`: those of its folder, in which nothing was found wrong."""
        self.files = files

    @classmethod
    def of_experts(cls, folder: Path, shape: ModelShape) -> Self:
        """The checkpoint in a folder that has at least all experts of a model of `shape`.

        Raises:
            FiddlerError: a file is missing or cut off, or lacks an expert, or holds it in another shape or a wider dtype.
        """
        files = TensorFiles(folder)
        problems = files.problems(expert_tensors(shape), shape.dtype)
        if problems:
            raise FiddlerError(problems[0])
        return cls(files)

    def expert(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return tuple(self.read(EXPERT_TENSOR.format(layer=layer, expert=expert, matrix=matrix)) for matrix in MATRICES)

    def read(self, name: str) -> torch.Tensor:
        """A tensor by its name in the checkpoint, in its shape and dtype there, owned by the caller."""
        shard = self.files.shard(name)
        stored = shard.tensors[name]
        target = torch.empty(stored.num_bytes, dtype=torch.uint8)
        shard.read(name, memoryview(target.numpy()))
        return target.view(STORED_DTYPES[stored.dtype]).view(stored.shape)


def expert_tensors(shape: ModelShape) -> dict[str, list[int]]:
    """The names of all tensors of experts, and their shapes."""
    row, column = [shape.intermediate_size, shape.hidden_size], [shape.hidden_size, shape.intermediate_size]
    return {
        EXPERT_TENSOR.format(layer=layer, expert=expert, matrix=matrix): size
        for layer in range(shape.num_layers)
        for expert in range(shape.num_experts)
        for matrix, size in zip(MATRICES, (row, row, column), strict=True)
    }
