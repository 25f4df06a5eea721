"""Reading and writing the project's YAML files. Rule: strict when read, whole or not at all when written.

Strict: unknown, missing and duplicate keys, wrong types, NaN and other versions are errors that name file and key.
"""

import os
import tempfile
from pathlib import Path
from typing import ClassVar, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, model_validator
from pydantic_core import ErrorDetails

from fiddler_run.errors import FiddlerError


class Section(BaseModel):
    """A mapping inside a file: immutable, no unknown keys, no conversions between types, no NaN, no broken rule."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def problems(self) -> list[str]:
        """The rules between its values that are broken, each naming its key and number; types have been checked before."""
        return []

    @model_validator(mode="after")
    def _keep_rules(self, info: ValidationInfo) -> Self:
        """The first broken rule is an error; where the context is a list, all are added to that instead."""
        problems = self.problems()
        if info.context is not None:
            info.context.extend(problems)
        elif problems:
            raise ValueError(problems[0])
        return self


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
        content, problems = cls.examine(text, origin)
        if problems:
            raise FiddlerError(problems[0])
        return content

    @classmethod
    def examine(cls, text: str, origin: str) -> tuple[Self | None, list[str]]:
        """The content of a file's text, and everything that is wrong with it, each naming file and key.

        There is no content where a key or a type is wrong; where only rules between values are broken, there is.
        """
        try:
            data = yaml.load(text, Loader=_UniqueKeyLoader)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-45
            return None, [f"{origin}: not valid YAML: {' '.join(str(error).split())}"]
        if not isinstance(data, dict):
            return None, [f"{origin}: expected a mapping of keys, found {type(data).__name__}"]
        (known_version,) = cls.model_fields["version"].annotation.__args__
        if data.get("version") != known_version:
            return None, [
                f"{origin}: version: this release reads version {known_version}, the file says {data.get('version')!r}; "
                "make the file again with this release"
            ]
        content, wrong, broken = None, [], []
        try:
            content = cls.model_validate(data, context=broken)
        except ValidationError as error:
            wrong = _problems(error)
        return content, [f"{origin}: {problem}" for problem in [*wrong, *broken]]

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


def _problems(error: ValidationError) -> list[str]:
    """Unknown keys first: a misspelt key is also a missing one."""
    errors = error.errors(include_url=False)
    return [_problem(each) for each in sorted(errors, key=lambda each: each["type"] != "extra_forbidden")]


def _problem(error: ErrorDetails) -> str:
    if error["type"] == "value_error":  # raised by our own checks, which name the place themselves
        return str(error["ctx"]["error"])
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    what = {"extra_forbidden": "unknown key", "missing": "missing"}.get(error["type"], error["msg"])
    return f"{where}: {what}"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
