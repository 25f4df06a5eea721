"""Writes a checkpoint whose experts are stored encoded. packed.py reads it.

One file holds the experts of a layer. It is written under another name, read back, and compared
with the original, decoded, bit for bit. Only then does it get its name; and only when all files
have theirs is the index written that makes the folder a checkpoint.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fiddler_run.errors import FiddlerError
from fiddler_run.models.experts import Matrices
from fiddler_run.models.tensor_map import TensorMap
from fiddler_run.plan.shape import LOADING_THREADS, ModelShape
from fiddler_run.system.files import cannot_write, is_file, reason, write_whole
from fiddler_run.weights.checkpoint import Checkpoint
from fiddler_run.weights.model_folder import SMALL_FILES
from fiddler_run.weights.packed import MATRICES, PackedFormat, blocks_of, checksum_key
from fiddler_run.weights.shard import INDEX, Shard
from fiddler_run.weights.store import one_thread_each
from fiddler_run.weights.tensor_files import TensorFiles

LAYER = re.compile(r"\.layers\.(\d+)\.")
EXPERTS = "experts-{:05}.safetensors"  # of a layer
DENSE = "dense-{:05}.safetensors"  # what else a layer has
REST = "dense.safetensors"  # what belongs to no layer


@dataclass
class Packed:
    """What was written: bytes of experts, and how many experts did not fit the encoding."""

    experts: int = 0
    raw_experts: int = 0
    original_bytes: int = 0
    expert_bytes: int = 0


class Packer:
    """Packs the experts of one checkpoint into `folder`."""

    def __init__(
        self,
        files: TensorFiles,
        tensors: TensorMap,
        shape: ModelShape,
        packed: PackedFormat,
        folder: Path,
    ):
        """Prepares to write.

        Args:
            files: the checkpoint, already checked.
            tensors: the sources of the model's parameters in these files.
            packed: how to store experts.
            folder: an empty folder.
        """
        self._weights = Checkpoint(files, tensors)
        self._shape = shape
        self._packed = packed
        self._folder = folder
        self._dense: dict[str, list[str]] = {}  # by file
        for name in tensors.dense_names():
            found = LAYER.search(name)
            file = DENSE.format(int(found[1])) if found else REST
            self._dense.setdefault(file, []).append(name)
        self._result = Packed()

    def pack(self, source: Path, on_layer: Callable[[], None]) -> Packed:
        """Writes all files. Calls `on_layer` after each layer.

        Args:
            source: the folder of the checkpoint's other files, which are copied.

        Raises:
            FiddlerError: a file cannot be written, or was not written correctly.
        """
        weight_map = {}
        for file, names in self._dense.items():
            weight_map |= self._write(file, {name: self._weights.read(name) for name in names}, {})
        with one_thread_each():
            for layer in range(self._shape.num_layers):
                tensors, originals = self._encode(layer)
                weight_map |= self._write(EXPERTS.format(layer), tensors, originals)
                on_layer()
        for name in SMALL_FILES:
            if name != INDEX and is_file(source / name):
                write_whole(self._folder / name, (source / name).read_bytes())
        size = sum((self._folder / file).stat().st_size for file in set(weight_map.values()))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_whole(self._folder / INDEX, json.dumps(index, indent=1))
        return self._result

    def _encode(self, layer: int) -> tuple[dict[str, torch.Tensor], dict[str, Matrices]]:
        """A layer's experts, and the matrices of those that were encoded, by tensor."""

        def encoded(expert: int) -> tuple[Matrices, torch.Tensor | None]:
            matrices = self._weights.expert(layer, expert)
            blocks = torch.empty(self._packed.tensor_shape, dtype=torch.uint8)
            referred = self._packed.encoding.encode(blocks, *matrices, first_neuron=0)
            return matrices, None if referred else blocks

        tensors = {}
        originals = {}
        for expert, (matrices, blocks) in enumerate(_all(encoded, range(self._shape.num_experts))):
            size = sum(matrix.nbytes for matrix in matrices)
            self._result.experts += 1
            self._result.original_bytes += size
            self._result.expert_bytes += size if blocks is None else blocks.nbytes
            if blocks is None:
                self._result.raw_experts += 1
                for which, matrix in zip(MATRICES, matrices, strict=True):
                    tensors[self._packed.matrix(layer, expert, which)] = matrix
            else:
                name = self._packed.name(layer, expert)
                tensors[name] = blocks
                originals[name] = matrices
        return tensors, originals

    def _write(
        self, file: str, tensors: dict[str, torch.Tensor], originals: dict[str, Matrices]
    ) -> dict[str, str]:
        """Writes and verifies a file. Returns the index's entries for it."""
        path = self._folder / file
        partial = self._folder / f".{file}.partial"
        sums = _all(lambda name: sha256(tensors[name]), originals)
        checksums = dict(zip(map(checksum_key, originals), sums, strict=True))
        metadata = {"format": "pt", **self._packed.metadata, **checksums}
        try:
            save_file(tensors, partial, metadata)
            _settle(partial)
            shard = Shard(partial)

            def differs(name: str) -> bool:
                if name in originals:
                    return not self._holds(shard, name, originals[name])
                return not _holds_tensor(shard, name, tensors[name])

            found = _all(differs, tensors)
            wrong = [name for name, is_wrong in zip(tensors, found, strict=True) if is_wrong]
            if wrong:
                raise FiddlerError(
                    f"{path}: tensor {wrong[0]} differs from the original after writing; check the"
                    " disk and the memory of this machine"
                )
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            raise cannot_write(path, error) from None
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        return dict.fromkeys(tensors, file)

    def _holds(self, shard: Shard, name: str, original: Matrices) -> bool:
        """True if an expert's tensor in a file decodes to the original."""
        gate, up, down = original
        for number, block in enumerate(blocks_of(shard, name)):
            here, *found = self._packed.decoded(number, block)
            if not all(map(_same_bits, found, (gate[here], up[here], down[:, here]))):
                return False
        return True


def _all(function: Callable, items: Iterable) -> list:
    """The function's results, several items at a time. An interrupt does not start more."""
    threads = ThreadPoolExecutor(LOADING_THREADS)
    try:
        return list(threads.map(function, items))
    finally:
        threads.shutdown(cancel_futures=True)


def _settle(path: Path) -> None:
    """Waits until a file is on disk, so that it is read back from there, and gives it the usual
    permissions.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _holds_tensor(shard: Shard, name: str, tensor: torch.Tensor) -> bool:
    """True if a tensor in a file has the same bits."""
    found = torch.empty(tensor.nbytes, dtype=torch.uint8)
    shard.read(name, memoryview(found.numpy()))
    return torch.equal(found, tensor.contiguous().view(-1).view(torch.uint8))


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True also for equal NaN."""
    return torch.equal(one.view(torch.int16), other.view(torch.int16))


def require_space(folder: Path, needed_bytes: int) -> None:
    """Checks that the disk of `folder` has room.

    Raises:
        FiddlerError: it has not.
    """
    try:
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        raise FiddlerError(f"{folder}: cannot read the free space: {reason(error)}") from None
    if free_bytes < needed_bytes:
        raise FiddlerError(
            f"{folder}: {needed_bytes / 1e9:.2f} GB are needed, but {free_bytes / 1e9:.2f} GB are"
            " free; free some, or name another folder with -o"
        )


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(memoryview(tensor.numpy()).cast("B")).hexdigest()
