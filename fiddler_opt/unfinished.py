"""Unfinished work: what long work has finished so far, in a file beside the one it will write, for a second call to go on from."""

from collections.abc import Callable
from pathlib import Path

import yaml

from fiddler_run.yaml_file import write_whole


def unfinished_path(target: Path) -> Path:
    """Where the parts of `target` are kept until it is written."""
    return target.with_name(f".{target.name}.unfinished")


def forget_unfinished(target: Path) -> None:
    """Removes the parts of what has been written, and what writers that were killed left of it."""
    for path in [*target.parent.glob(f".{target.name}.*"), *target.parent.glob(f"..{target.name}.*")]:
        path.unlink(missing_ok=True)


class Unfinished:
    """Finished parts by name, of plain numbers, strings, lists and dicts; saved after each.

    `made_with` says what the parts depend on: those made with anything else are of no use and forgotten.
    """

    def __init__(self, target: Path, made_with: dict):
        self._path, self._made_with = unfinished_path(target), made_with
        self.parts = self._load()

    def _load(self) -> dict:
        try:
            found = yaml.safe_load(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):  # none, or not ours
            return {}
        return found["parts"] if isinstance(found, dict) and found.get("made_with") == self._made_with else {}

    def part(self, name: str, make: Callable[[], object]) -> object:
        """The part of that name: as found, or made now and kept."""
        if name not in self.parts:
            self.parts[name] = make()
            write_whole(self._path, yaml.safe_dump({"made_with": self._made_with, "parts": self.parts}, sort_keys=False))
        return self.parts[name]
