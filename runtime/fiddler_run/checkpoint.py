"""Where weights come from: a Mixtral checkpoint in Hugging Face format, checked before anything is loaded, or random numbers."""

import json
import os
import random
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from fiddler_run.errors import FiddlerError
from fiddler_run.locate import read_json
from fiddler_run.plan import ModelShape

EXPERT_TENSOR = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
MATRICES = ("w1", "w3", "w2")  # gate [intermediate, hidden], up [intermediate, hidden], down [hidden, intermediate]
INDEX = "model.safetensors.index.json"
READ_BYTES = 2**25  # at once
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
LOSSLESS = {"bfloat16": {"BF16"}, "float16": {"F16"}, "float32": {"BF16", "F16", "F32"}}


class Weights(Protocol):
    def expert(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate [intermediate, hidden], up [intermediate, hidden] and down [hidden, intermediate], in host memory.

        They may be overwritten by the calling thread's next call.
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
    """The tensors of the checkpoint in `folder`.

    Experts are read in large pieces rather than mapped: that is three times as fast where the files are in the page cache
    already, and where they are not, several threads keep the disk busy.

    Raises:
        FiddlerError: a file is missing or cut off, or lacks an expert of `shape`, or holds it in another shape or a wider dtype.
    """

    def __init__(self, folder: Path, shape: ModelShape):
        self.folder = folder
        self.files = TensorFiles(folder)
        self._buffers = threading.local()
        problems = self.files.problems(expert_tensors(shape), shape.dtype)
        if problems:
            raise FiddlerError(problems[0])

    def expert(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return tuple(self._read(EXPERT_TENSOR.format(layer=layer, expert=expert, matrix=matrix), matrix) for matrix in MATRICES)

    def _read(self, name: str, buffer: str) -> torch.Tensor:
        shard = self.files.shard(name)
        stored = shard.tensors[name]
        target = getattr(self._buffers, buffer, None)
        if target is None or len(target) < stored.num_bytes:
            target = torch.empty(stored.num_bytes, dtype=torch.uint8)
            setattr(self._buffers, buffer, target)
        target = target[: stored.num_bytes]
        shard.read(stored.start, target)
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


class TensorFiles:
    """The safetensors files of the checkpoint in `folder`: which tensor each holds, and where.

    Raises:
        FiddlerError: there are none, or their index cannot be read.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._file_of = _tensor_files(folder)
        self._shards: dict[Path, _Shard] = {}
        self._damage: dict[Path, str] = {}
        for path in sorted(set(self._file_of.values())):
            try:
                self._shards[path] = _Shard(path)
            except FiddlerError as error:
                self._damage[path] = str(error)

    def shard(self, name: str) -> "_Shard":
        """The file that holds tensor `name`."""
        return self._shards[self._file_of[name]]

    @property
    def missing(self) -> list[Path]:
        """The files that the index names and that are not there."""
        return [path for path in self._damage if not path.exists()]

    def problems(self, expected: dict[str, list[int]], dtype: str) -> list[str]:
        """Of each file the first thing that is wrong: it is missing, damaged or cut off, or of the tensors that are expected in
        it, by name, one is missing, has another shape, or does not fit `dtype` without loss."""
        found: dict[Path | None, str] = {**self._damage}
        for name, shape in expected.items():
            path = self._file_of.get(name)
            if path not in found:
                problem = self._problem(name, path, shape, dtype)
                if problem is not None:
                    found[path] = problem
        return list(found.values())

    def _problem(self, name: str, path: Path | None, shape: list[int], dtype: str) -> str | None:
        if path is None or name not in self._shards[path].tensors:
            return f"{path or self._folder}: tensor {name} is missing; download the checkpoint again"
        stored = self._shards[path].tensors[name]
        if stored.shape != shape:
            return f"{path}: tensor {name} has shape {stored.shape}, by config.json it would be {shape}"
        if stored.dtype not in LOSSLESS[dtype]:
            return f"{path}: tensor {name} is {stored.dtype}, which the plan's {dtype} cannot hold without loss"
        return None


def _tensor_files(folder: Path) -> dict[str, Path]:
    index = folder / INDEX
    single = folder / "model.safetensors"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise FiddlerError(f"{index}: holds no weight_map; download the checkpoint again")
        return {name: folder / file for name, file in weight_map.items()}
    if single.is_file():
        return dict.fromkeys(_Shard(single).tensors, single)
    raise FiddlerError(f"{folder}: holds neither {index.name} nor {single.name}; --model names a checkpoint in safetensors format")


@dataclass(frozen=True)
class _Stored:
    """A tensor of a file: its dtype by safetensors' name, its shape, its first byte in the file and their number."""

    dtype: str
    shape: list[int]
    start: int
    num_bytes: int


class _Shard:
    """A safetensors file: 8 bytes of header length, the header in JSON, then the data. `tensors`: what it holds, by name.

    Raises:
        FiddlerError: the file is missing, damaged or cut off.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise FiddlerError(f"{path}: missing, though {INDEX} names it; download the checkpoint again")
        try:
            with safe_open(path, framework="pt"):  # checks all of the header against the file
                pass
        except (SafetensorError, OSError) as error:
            raise FiddlerError(f"{path}: damaged or cut off ({error}); download it again") from None
        self._path, self._file = path, path.open("rb", buffering=0)
        length = int.from_bytes(self._file.read(8), "little")
        header = json.loads(self._file.read(length))
        header.pop("__metadata__", None)
        self.tensors = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            self.tensors[name] = _Stored(entry["dtype"], entry["shape"], 8 + length + start, stop - start)

    def read(self, start: int, target: torch.Tensor) -> None:
        """Fills `target` [n] uint8 with the bytes from `start` on."""
        memory, done = memoryview(target.numpy()), 0
        while done < len(memory):
            count = os.preadv(self._file.fileno(), [memory[done : done + READ_BYTES]], start + done)
            if count == 0:
                raise FiddlerError(f"{self._path}: cut off while it was read; download it again")
            done += count
