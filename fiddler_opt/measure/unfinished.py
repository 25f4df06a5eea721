"""Checkpoints of a long-running command, so that a second call resumes.

They are stored in a file next to the one that the command will write.
"""

from collections.abc import Callable
from pathlib import Path

import yaml

from fiddler_run.errors import FiddlerError
from fiddler_run.system.files import (
    MAX_TEXT_BYTES,
    cannot_write,
    decode_text,
    exists,
    partial_files,
    read_bytes,
    write_whole,
)
from fiddler_run.system.parsing import parse_yaml


def unfinished_path(target: Path) -> Path:
    """The file that holds the parts of `target` until `target` is written."""
    return target.with_name(f".{target.name}.unfinished")


def forget_unfinished(target: Path) -> None:
    """Removes the parts of `target`, which has been written, and temporary files of both.

    Raises:
        FiddlerError: a file cannot be removed.
    """
    parts = unfinished_path(target)
    for path in [parts, *partial_files(parts), *partial_files(target)]:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(path, error) from None


class Unfinished:
    """Finished parts by name, made of plain numbers, strings, lists and dicts. Saved after each
    part.
    """

    def __init__(self, target: Path, made_with: dict):
        """Reads the parts that were finished before.

        Args:
            made_with: everything that the parts depend on. Parts made with other values are
                discarded.

        Raises:
            FiddlerError: there are parts, but they cannot be read.
        """
        self._path = unfinished_path(target)
        self._made_with = made_with
        self.parts = self._load()

    def _load(self) -> dict:
        if not exists(self._path):
            return {}
        content = read_bytes(self._path, MAX_TEXT_BYTES)
        try:
            found = parse_yaml(decode_text(content, str(self._path)), str(self._path))
        except FiddlerError:  # not ours, or damaged: the parts are made again
            return {}
        if not isinstance(found, dict) or found.get("made_with") != self._made_with:
            return {}
        parts = found.get("parts")
        return parts if isinstance(parts, dict) else {}

    def part(self, name: str, make: Callable[[], object]) -> object:
        """The part `name`, read from the file or made and saved now."""
        if name not in self.parts:
            self.parts[name] = make()
            content = {"made_with": self._made_with, "parts": self.parts}
            write_whole(self._path, yaml.dump(content, Dumper=_PlainDumper, sort_keys=False))
        return self.parts[name]


class _PlainDumper(yaml.SafeDumper):
    """Writes an object that occurs twice in full, because the reader accepts no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True
