"""Reading and writing the project's YAML files. Rule: strict when read, whole or not at all when written.

Strict: unknown, missing and duplicate keys, wrong types, NaN and other versions are errors that name file and key.
"""

import os
import tempfile
from pathlib import Path
from typing import ClassVar, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from fiddler_run.errors import FiddlerError


class Section(BaseModel):
    """A mapping inside a file: immutable, no unknown keys, no conversions between types, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class YamlFile(Section):
    """A whole file. Subclasses declare `version: Literal[...]` and its keys in the order in which they are written."""

    header: ClassVar[str] = ""
    key_comments: ClassVar[dict[str, str]] = {}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads and checks a file.

        Raises:
            FiddlerError: the file cannot be read or breaks a rule; the message names the file and the key.
        """
        return cls.parse(read_text(path), origin=str(path))

    @classmethod
    def parse(cls, text: str, origin: str) -> Self:
        """The same for text that came from `origin` (a name for messages)."""
        try:
            data = yaml.load(text, Loader=_UniqueKeyLoader)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-45
            raise FiddlerError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(data, dict):
            raise FiddlerError(f"{origin}: expected a mapping of keys, found {type(data).__name__}")
        (known_version,) = cls.model_fields["version"].annotation.__args__
        if data.get("version") != known_version:
            raise FiddlerError(
                f"{origin}: version: this release reads version {known_version}, the file says {data.get('version')!r}; "
                "make the file again with this release"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise FiddlerError(f"{origin}: {_first_error(error)}") from None

    def dump(self) -> str:
        """The file's text: one line for each value that holds no other mapping or list. `parse(dump(x)) == x`."""
        lines = [f"# {line}" for line in self.header.splitlines()]
        for key, value in self.model_dump().items():
            if key in self.key_comments:
                lines.append(f"# {self.key_comments[key]}")
            style = None if isinstance(value, (dict, list)) else False  # None: one line for each innermost mapping or list
            lines.append(yaml.dump({key: value}, default_flow_style=style, sort_keys=False, width=float("inf")).rstrip("\n"))
        return "\n".join(lines) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes the file whole or not at all.

        Raises:
            FiddlerError: the place cannot be written.
        """
        write_whole(path, self.dump())


def read_text(path: str | Path) -> str:
    """The UTF-8 text of a file.

    Raises:
        FiddlerError: the file cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FiddlerError(f"{path}: cannot read: {_reason(error)}") from None


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Writes to a temporary file beside `path`, then renames it, so that `path` never holds half a file. Text becomes UTF-8.

    Raises:
        FiddlerError: the place cannot be written.
    """
    require_writable(path)
    target = Path(path).resolve()  # a link stays one, and what it points to is replaced
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OSError as error:
        raise FiddlerError(f"{path}: cannot write: {_reason(error)}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def require_writable(path: str | Path) -> None:
    """Finds out before long work whether `write_whole(path, ...)` can succeed; leaves nothing behind.

    Raises:
        FiddlerError: the place cannot be written.
    """
    target = Path(path).resolve()
    if target.is_dir():
        raise FiddlerError(f"{path}: cannot write: it is a folder; name a file")
    if target.exists() and not target.is_file():
        raise FiddlerError(f"{path}: cannot write: it is not a regular file")
    folder = next(parent for parent in target.parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FiddlerError(f"{path}: cannot write: {_reason(error)}") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; plain YAML would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a single value", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _first_error(error: ValidationError) -> str:
    errors = error.errors(include_url=False)
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])  # a misspelt key is also a missing one
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "value_error":  # raised by our own checks, which name the place themselves
        return str(first["ctx"]["error"])
    what = {"extra_forbidden": "unknown key", "missing": "missing"}.get(first["type"], first["msg"])
    return f"{where}: {what}"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
