"""A Mixtral checkpoint in Hugging Face format: which file holds which expert, checked before anything is loaded."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fiddler_run.errors import FiddlerError
from fiddler_run.plan import ModelShape, Plan

EXPERT_TENSOR = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
MATRICES = ("w1", "w3", "w2")  # gate [intermediate, hidden], up [intermediate, hidden], down [hidden, intermediate]
LOSSLESS = {"bfloat16": {"BF16"}, "float16": {"F16"}, "float32": {"BF16", "F16", "F32"}}


class Checkpoint:
    """The expert tensors of the checkpoint in `folder`, memory-mapped.

    Raises:
        FiddlerError: a file is missing or cut off, or lacks an expert of `shape`, or holds it in another shape or a wider dtype.
    """

    def __init__(self, folder: Path, shape: ModelShape):
        self.folder = folder
        self._file_of = _tensor_files(folder)
        self._open = {path: _open_shard(path) for path in sorted(set(self._file_of.values()))}
        self._check(shape)

    def expert(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate [intermediate, hidden], up [intermediate, hidden] and down [hidden, intermediate]; views of the mapped files."""
        return tuple(self._tensor(EXPERT_TENSOR.format(layer=layer, expert=expert, matrix=m)) for m in MATRICES)

    def _tensor(self, name: str) -> torch.Tensor:
        return self._open[self._file_of[name]].get_tensor(name)

    def _check(self, shape: ModelShape) -> None:
        row, column = [shape.intermediate_size, shape.hidden_size], [shape.hidden_size, shape.intermediate_size]
        for layer in range(shape.num_layers):
            for expert in range(shape.num_experts):
                for matrix, expected in zip(MATRICES, (row, row, column), strict=True):
                    self._check_tensor(EXPERT_TENSOR.format(layer=layer, expert=expert, matrix=matrix), expected, shape.dtype)

    def _check_tensor(self, name: str, expected: list[int], dtype: str) -> None:
        path = self._file_of.get(name)
        if path is None:
            raise FiddlerError(
                f"{self.folder}: tensor {name} is missing; is this the checkpoint of a Mixtral with unfused experts?"
            )
        entry = self._open[path].get_slice(name)
        if entry.get_shape() != expected:
            raise FiddlerError(f"{path}: tensor {name} has shape {entry.get_shape()}, expected {expected}")
        if entry.get_dtype() not in LOSSLESS[dtype]:
            raise FiddlerError(f"{path}: tensor {name} is {entry.get_dtype()}, which the plan's {dtype} cannot hold without loss")


def check_model(plan: Plan, config: dict, origin: str, config_file: Path) -> None:
    """Whether a config.json describes the model that a plan was made for.

    Raises:
        FiddlerError: it does not; the message names the first number that differs.
    """
    remedy = "make a plan for this model with `fiddler-opt plan --model`"
    if config.get("model_type") != "mixtral":
        raise FiddlerError(f"{config_file}: model_type is {config.get('model_type')!r}; only 'mixtral' is supported")
    if config.get("hidden_act", "silu") != "silu":
        raise FiddlerError(f"{config_file}: hidden_act is {config['hidden_act']!r}; only 'silu' is supported")
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


def read_json(path: Path) -> dict:
    """A JSON file of a checkpoint.

    Raises:
        FiddlerError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FiddlerError(f"{path}: missing; --model names a checkpoint folder in Hugging Face format") from None
    except (OSError, ValueError) as error:
        raise FiddlerError(f"{path}: cannot read: {error}") from None


def _tensor_files(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        files = {name: folder / file for name, file in read_json(index).get("weight_map", {}).items()}
        for path in sorted(set(files.values())):
            if not path.is_file():
                raise FiddlerError(f"{path}: missing, though {index.name} names it; download the checkpoint again")
        return files
    if single.is_file():
        return dict.fromkeys(_open_shard(single).keys(), single)
    raise FiddlerError(f"{folder}: holds neither {index.name} nor {single.name}; --model names a checkpoint in safetensors format")


def _open_shard(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise FiddlerError(f"{path}: damaged or cut off ({error}); download it again") from None
