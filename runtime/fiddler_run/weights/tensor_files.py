"""The safetensors files of a checkpoint: their tensors and their problems. Imports no torch."""

import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from fiddler_run.encodings.table import ENCODINGS
from fiddler_run.errors import FiddlerError
from fiddler_run.system.files import is_file
from fiddler_run.system.parsing import read_json_object
from fiddler_run.weights.shard import AGAIN, INDEX, Shard

SINGLE_FILE = "model.safetensors"
# The stored dtypes that each plan dtype can hold without loss.
LOSSLESS = {"bfloat16": {"BF16"}, "float16": {"F16"}, "float32": {"BF16", "F16", "F32"}}
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
STORED_DTYPES = {**DTYPE_NAMES, "I64": "int64", "I32": "int32", "BOOL": "bool"}
# Names of tensors that only quantised checkpoints have: AWQ and GPTQ, bitsandbytes, fp8,
# compressed-tensors.
QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|absmax|quant_map|SCB|weight_scale|weight_scale_inv|weight_packed)$"
    r"|\.quant_state\."
)
MISTRAL = re.compile(r"^(tok_embeddings|layers\.\d+\.(attention|feed_forward|block_sparse_moe))\.")


class TensorFiles:
    """The safetensors files of the checkpoint in `folder`.

    These are the files named by the index or, without an index, model.safetensors.

    Raises:
        FiddlerError: there are none, or the index cannot be read.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._file_of = _file_of_tensors(folder)
        self._shards: dict[Path, Shard] = {}
        self._damage: dict[Path, str] = {}
        for path in sorted(set(self._file_of.values())):
            try:
                self._shards[path] = Shard(path)
            except FiddlerError as error:
                self._damage[path] = str(error)

    def __iter__(self) -> Iterator[str]:
        """The names of the tensors."""
        return iter(self._file_of)

    def __contains__(self, name: str) -> bool:
        """True if the index names the tensor."""
        return name in self._file_of

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def shards(self) -> list[Shard]:
        """The files that can be read."""
        return list(self._shards.values())

    def shard(self, name: str) -> "Shard":
        """The file that contains tensor `name`."""
        return self._shards[self._file_of[name]]

    def shape(self, name: str) -> list[int]:
        return self.shard(name).tensors[name].shape

    @property
    def paths(self) -> set[Path]:
        """The files."""
        return set(self._file_of.values())

    @property
    def missing(self) -> list[Path]:
        """The files that the index names but that do not exist."""
        return [path for path in self._damage if not is_file(path)]

    def dtype(self) -> str:
        """The narrowest dtype, by a plan's name, that holds every weight without loss."""
        tensors = (entry for shard in self._shards.values() for entry in shard.tensors.items())
        found = {tensor.dtype for name, tensor in tensors if name.endswith(".weight")}
        return next((name for name, held in LOSSLESS.items() if found <= held), "float32")

    def format_problem(self) -> str | None:
        """Why these files are not an unquantised checkpoint in Hugging Face format."""
        names = {
            **self._file_of,
            **{name: path for path, shard in self._shards.items() for name in shard.tensors},
        }
        for pattern, what in (
            (QUANTISED, "these weights are quantised; name the original, unquantised checkpoint"),
            (MISTRAL, "Mistral's own format; name the same model in Hugging Face format"),
        ):
            name = next(filter(pattern.search, names), None)
            if name is not None:
                return f"{names[name]}: contains {name}: {what}"
        for path, shard in self._shards.items():
            for name, tensor in shard.tensors.items():
                if tensor.dtype not in DTYPE_NAMES and name.endswith(".weight"):
                    return (
                        f"{path}: tensor {name} is {tensor.dtype}: quantised; name the original,"
                        " unquantised checkpoint"
                    )
        return None

    def problems(
        self, expected: dict[str, list[int] | None], dtype: str, cast: Collection[str] = ()
    ) -> list[str]:
        """The problems of the files, at most one line each.

        A file can be missing, damaged or truncated. A tensor of `expected`, shapes by name, can be
        missing, have another shape (None: any), or not fit `dtype` without loss. Those of `cast`
        need not fit.
        """
        problem = self.format_problem()
        if problem is not None:
            return [problem]
        found: dict[Path | None, str] = {**self._damage}
        for name, shape in expected.items():
            path = self._file_of.get(name)
            if path not in found:
                problem = self._problem(name, path, shape, None if name in cast else dtype)
                if problem is not None:
                    found[path] = problem
        return list(found.values())

    def wider(self, names: Iterable[str], dtype: str) -> int:
        """How many of these tensors `dtype` cannot hold without loss."""
        stored = (self.shard(name).tensors[name].dtype for name in names)
        return sum(each in DTYPE_NAMES and each not in LOSSLESS[dtype] for each in stored)

    def _problem(
        self, name: str, path: Path | None, shape: list[int] | None, dtype: str | None
    ) -> str | None:
        if path is None or name not in self._shards[path].tensors:
            return f"{path or self._folder}: tensor {name} is missing; {AGAIN}"
        stored = self._shards[path].tensors[name]
        is_packed = name.rpartition(".")[2] in ENCODINGS
        if shape is not None and stored.shape != shape:
            source = "the file's metadata imply" if is_packed else "config.json implies"
            return f"{path}: tensor {name} has shape {stored.shape}, but {source} {shape}"
        if dtype is None:
            known = stored.dtype in STORED_DTYPES
            return None if known else f"{path}: tensor {name} is {stored.dtype}: quantised"
        if stored.dtype not in ({"U8"} if is_packed else LOSSLESS[dtype]):
            return (
                f"{path}: tensor {name} is {stored.dtype}, which the plan's {dtype} cannot hold"
                " without loss; "
                f'set "dtype": "{self.dtype()}" in config.json and plan again'
            )
        return None


def shard_names(folder: Path) -> list[str]:
    """The files named by the index in `folder`.

    Raises:
        FiddlerError: the index cannot be read, or does not contain plain file names.
    """
    return sorted(set(_weight_map(folder / INDEX).values()))


def other_weights(folder: Path) -> str | None:
    """The kind of other weights in a folder that `TensorFiles` cannot read. None if none."""
    for pattern, what in (
        ("*.gguf", "a GGUF file"),
        ("consolidated*", "weights in Mistral's own format"),
        ("*.bin", "weights as PyTorch pickles"),
        ("*.pt", "weights as PyTorch pickles"),
        ("*.safetensors", "safetensors files without an index"),
    ):
        if next(folder.glob(pattern), None) is not None:
            return what
    return None


def _file_of_tensors(folder: Path) -> dict[str, Path]:
    index = folder / INDEX
    single = folder / SINGLE_FILE
    if is_file(index):
        return {name: folder / file for name, file in _weight_map(index).items()}
    if is_file(single):
        return dict.fromkeys(Shard(single).tensors, single)
    found = other_weights(folder)
    what = f"{folder}: contains neither {INDEX} nor {SINGLE_FILE}" + (
        f", but {found}" if found else ""
    )
    raise FiddlerError(
        f"{what}; --model names a checkpoint in Hugging Face format, with safetensors"
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FiddlerError(f"{index}: has no weight_map; {AGAIN}")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or "\0" in file or len(file) > 200:
            raise FiddlerError(
                f"{index}: {str(file)[:60]!r} is not the name of a file next to it; {AGAIN}"
            )
    return weight_map
