"""Where weights come from: a Mixtral checkpoint in Hugging Face format, checked before anything is loaded, or random numbers."""

import ctypes
import mmap
import random
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from fiddler_run.errors import FiddlerError
from fiddler_run.locate import read_json, require_mixtral
from fiddler_run.plan import ModelShape, Plan

EXPERT_TENSOR = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
MATRICES = ("w1", "w3", "w2")  # gate [intermediate, hidden], up [intermediate, hidden], down [hidden, intermediate]
LOSSLESS = {"bfloat16": {"BF16"}, "float16": {"F16"}, "float32": {"BF16", "F16", "F32"}}


class Weights(Protocol):
    def expert(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate [intermediate, hidden], up [intermediate, hidden] and down [hidden, intermediate], in host memory."""


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
    """The tensors of the checkpoint in `folder`, memory-mapped.

    Raises:
        FiddlerError: a file is missing or cut off, or lacks an expert of `shape`, or holds it in another shape or a wider dtype.
    """

    def __init__(self, folder: Path, shape: ModelShape):
        self.folder = folder
        self._file_of = _tensor_files(folder)
        self._open = {path: _open_shard(path) for path in sorted(set(self._file_of.values()))}
        self._held = {path: set(shard.keys()) for path, shard in self._open.items()}
        row, column = [shape.intermediate_size, shape.hidden_size], [shape.hidden_size, shape.intermediate_size]
        for layer in range(shape.num_layers):
            for expert in range(shape.num_experts):
                for matrix, expected in zip(MATRICES, (row, row, column), strict=True):
                    self.check(EXPERT_TENSOR.format(layer=layer, expert=expert, matrix=matrix), expected, shape.dtype)

    def expert(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of the mapped files, asked of the disk at once: page by page, as they are touched, would be slower."""
        names = (EXPERT_TENSOR.format(layer=layer, expert=expert, matrix=matrix) for matrix in MATRICES)
        tensors = tuple(self._open[self._file_of[name]].get_tensor(name) for name in names)
        for tensor in tensors:
            _read_ahead(tensor)
        return tensors

    def check(self, name: str, shape: list[int], dtype: str) -> None:
        """Whether tensor `name` is there, of that shape, and fits `dtype` without loss.

        Raises:
            FiddlerError: it is not.
        """
        path = self._file_of.get(name)
        if path is None or name not in self._held[path]:
            raise FiddlerError(f"{path or self.folder}: tensor {name} is missing; download the checkpoint again")
        entry = self._open[path].get_slice(name)
        if entry.get_shape() != shape:
            raise FiddlerError(f"{path}: tensor {name} has shape {entry.get_shape()}, by config.json it would be {shape}")
        if entry.get_dtype() not in LOSSLESS[dtype]:
            raise FiddlerError(f"{path}: tensor {name} is {entry.get_dtype()}, which the plan's {dtype} cannot hold without loss")


def check_model(plan: Plan, config: dict, origin: str, config_file: Path) -> None:
    """Whether a config.json describes the model that a plan was made for.

    Raises:
        FiddlerError: it does not; the message names the first number that differs.
    """
    remedy = "make a plan for this model with `fiddler-opt plan --model`"
    require_mixtral(config, config_file)
    names = {
        "num_layers": "num_hidden_layers",
        "num_experts": "num_local_experts",
        "num_experts_per_tok": "num_experts_per_tok",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
    }
    for ours, theirs in names.items():
        planned, found = getattr(plan.model, ours), config.get(theirs)
        if planned != found:
            raise FiddlerError(f"{origin}: model.{ours} is {planned}, but {theirs} is {found} in {config_file}; {remedy}")


def _tensor_files(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise FiddlerError(f"{index}: holds no weight_map; download the checkpoint again")
        files = {name: folder / file for name, file in weight_map.items()}
        for path in sorted(set(files.values())):
            if not path.is_file():
                raise FiddlerError(f"{path}: missing, though {index.name} names it; download the checkpoint again")
        return files
    if single.is_file():
        return dict.fromkeys(_open_shard(single).keys(), single)
    raise FiddlerError(f"{folder}: holds neither {index.name} nor {single.name}; --model names a checkpoint in safetensors format")


def _read_ahead(tensor: torch.Tensor) -> None:
    """Has the system read a mapped file's part from the disk, in large requests; does not wait. Only ever a hint."""
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.nbytes - start
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_WILLNEED)


def _open_shard(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise FiddlerError(f"{path}: damaged or cut off ({error}); download it again") from None
