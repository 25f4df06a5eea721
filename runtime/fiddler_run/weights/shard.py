"""Reads a safetensors file. Imports no torch."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fiddler_run.errors import FiddlerError
from fiddler_run.system.files import cannot_read, is_file, reason

INDEX = "model.safetensors.index.json"
READ_BYTES = 2**25  # per read
AGAIN = "download or pack the checkpoint again"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `dtype` is safetensors' name; `start` is its first byte in the file."""

    dtype: str
    shape: list[int]
    start: int
    num_bytes: int


class Shard:
    """A safetensors file: 8 bytes of header length, the header in JSON, then the data.

    `tensors` holds its tensors by name, `metadata` the strings of its header.

    Raises:
        FiddlerError: the file is missing, damaged, truncated or unreadable.
    """

    def __init__(self, path: Path):
        if not is_file(path):
            raise FiddlerError(f"{path}: missing, though {INDEX} names it; {AGAIN}")
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise cannot_read(path, error) from None
        try:
            # by a name that can always be opened: safetensors rejects names that are not UTF-8
            by_number = f"/proc/self/fd/{self._file.fileno()}"
            with safe_open(by_number, framework="numpy"):
                pass  # this checks the header against the file
            length = int.from_bytes(self._file.read(8), "little")
            header = json.loads(self._file.read(length))
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            self._file.close()
            raise FiddlerError(
                f"{path}: damaged or truncated ({reason(error)}); download or pack it again"
            ) from None
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.path = path
        self.tensors = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            self.tensors[name] = StoredTensor(
                entry["dtype"], entry["shape"], 8 + length + start, stop - start
            )

    def read(self, name: str, target: memoryview, first_byte: int = 0) -> None:
        """Reads a tensor from `first_byte` on into `target`, which must not exceed the rest.

        Raises:
            FiddlerError: the file cannot be read, or has become shorter.
        """
        start = self.tensors[name].start + first_byte
        done = 0
        while done < len(target):
            try:
                count = os.preadv(
                    self._file.fileno(), [target[done : done + READ_BYTES]], start + done
                )
            except OSError as error:
                raise cannot_read(self.path, error) from None
            if count == 0:
                raise FiddlerError(
                    f"{self.path}: truncated while it was read; download or pack it again"
                )
            done += count
