"""Writes a checkpoint whose experts are stored encoded. packed.py reads it.

One file holds the tensors of a layer. It is written under another name, read back, and compared
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
from fiddler_run.models.family import Family
from fiddler_run.plan.shape import LOADING_THREADS, ModelShape
from fiddler_run.system.files import cannot_write, is_file, reason, write_whole
from fiddler_run.weights.checkpoint import Checkpoint, Matrices
from fiddler_run.weights.model_folder import SMALL_FILES
from fiddler_run.weights.packed import PackedFormat, checksum_key
from fiddler_run.weights.shard import INDEX, Shard
from fiddler_run.weights.store import one_thread_each
from fiddler_run.weights.tensor_files import TensorFiles

LAYER = re.compile(r"\.layers\.(\d+)\.")


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
        family: Family,
        shape: ModelShape,
        packed: PackedFormat,
        folder: Path,
    ):
        """Prepares to write.

        Args:
            files: the checkpoint, already checked.
            packed: how to store experts.
            folder: exists, and holds no checkpoint.
        """
        self._files = files
        self._weights = Checkpoint(files, family)
        self._family = family
        self._shape = shape
        self._packed = packed
        self._folder = folder
        self._experts = {
            name for layer in range(shape.num_layers) for name in self._matrices_of(layer)
        }
        self.result = Packed()

    @property
    def needed_bytes(self) -> int:
        """Bytes of disk space, if all experts fit the encoding."""
        blocks, block_bytes = self._packed.tensor_shape
        experts = self._shape.num_layers * self._shape.num_experts
        dense = (self._files.shard(name).tensors[name] for name in self._dense_names)
        return experts * blocks * block_bytes + sum(each.num_bytes for each in dense)

    @property
    def _dense_names(self) -> list[str]:
        names = set(self._files.names) - self._experts
        return [name for name in sorted(names) if not name.endswith(f".{self._name}")]

    @property
    def _name(self) -> str:
        return self._packed.encoding.name

    def pack(self, source: Path, on_layer: Callable[[], None]) -> Packed:
        """Writes all files. Calls `on_layer` after each layer.

        Args:
            source: the folder of the checkpoint's other files, which are copied.

        Raises:
            FiddlerError: a file cannot be written, or was not written correctly.
        """
        dense: dict[int | None, list[str]] = {}
        for name in self._dense_names:
            found = LAYER.search(name)
            dense.setdefault(int(found[1]) if found else None, []).append(name)
        weight_map = self._write("dense.safetensors", self._read(dense.pop(None, [])), {})
        with one_thread_each():
            for layer in range(self._shape.num_layers):
                tensors = self._read(dense.pop(layer, []))
                originals = self._encode(layer, tensors)
                weight_map |= self._write(f"layer-{layer:05}.safetensors", tensors, originals)
                on_layer()
        for name in SMALL_FILES:
            if name != INDEX and is_file(source / name):
                write_whole(self._folder / name, (source / name).read_bytes())
        size = sum((self._folder / file).stat().st_size for file in set(weight_map.values()))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_whole(self._folder / INDEX, json.dumps(index, indent=1))
        return self.result

    def _matrices_of(self, layer: int) -> Iterable[str]:
        for expert in range(self._shape.num_experts):
            yield from self._family.expert_names(layer, expert)

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        return {name: self._weights.read(name) for name in names}

    def _encode(self, layer: int, tensors: dict[str, torch.Tensor]) -> dict[str, Matrices]:
        """Adds a layer's experts to `tensors`. Returns the matrices of those that were encoded."""

        def encoded(expert: int) -> tuple[Matrices, torch.Tensor | None]:
            matrices = self._weights.expert(layer, expert)
            blocks = torch.empty(self._packed.tensor_shape, dtype=torch.uint8)
            referred = self._packed.encoding.encode(blocks, *matrices, first_neuron=0)
            return matrices, None if referred else blocks

        originals = {}
        with ThreadPoolExecutor(LOADING_THREADS) as threads:
            found = list(threads.map(encoded, range(self._shape.num_experts)))
        for expert, (matrices, blocks) in enumerate(found):
            size = sum(matrix.nbytes for matrix in matrices)
            self.result.experts += 1
            self.result.original_bytes += size
            self.result.expert_bytes += size if blocks is None else blocks.nbytes
            if blocks is None:
                self.result.raw_experts += 1
                names = self._family.expert_names(layer, expert)
                tensors |= dict(zip(names, matrices, strict=True))
            else:
                name = self._packed.name(self._family, layer, expert)
                tensors[name] = blocks
                originals[name] = matrices
        return originals

    def _write(
        self, file: str, tensors: dict[str, torch.Tensor], originals: dict[str, Matrices]
    ) -> dict[str, str]:
        """Writes and verifies a file. Returns the index's entries for it."""
        path = self._folder / file
        partial = self._folder / f".{file}.partial"
        sums = {checksum_key(name): sha256(tensors[name]) for name in originals}
        metadata = {"format": "pt", **self._packed.metadata, **sums}
        try:
            save_file(tensors, partial, metadata)
            with partial.open("rb") as written:
                os.fsync(written.fileno())
            self._verify(partial, tensors, originals)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            raise cannot_write(path, error) from None
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        return dict.fromkeys(tensors, file)

    def _verify(
        self, path: Path, tensors: dict[str, torch.Tensor], originals: dict[str, Matrices]
    ) -> None:
        """Compares a written file with the original weights.

        Raises:
            FiddlerError: they differ.
        """
        shard = Shard(path)

        def is_equal(name: str) -> bool:
            stored = torch.empty_like(tensors[name])
            shard.read(name, memoryview(stored.view(torch.uint8).numpy()).cast("B"))
            pairs = [(stored, tensors[name])]
            if name in originals:
                pairs = zip(self._packed.matrices(stored), originals[name], strict=True)
            return all(torch.equal(bits(one), bits(other)) for one, other in pairs)

        with ThreadPoolExecutor(LOADING_THREADS) as threads:
            for name, equal in zip(tensors, threads.map(is_equal, tensors), strict=True):
                if not equal:
                    raise FiddlerError(
                        f"{path}: tensor {name} differs from the original after writing; check the"
                        " disk and the memory of this machine"
                    )


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


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, so that NaN and signed zeros are compared too."""
    return tensor.contiguous().view(torch.uint8)
