"""The base of the project's YAML files. Reading is strict; writing is atomic.

Unknown, missing and duplicate keys, wrong types, values out of bounds and other versions are errors
that name file and key.
"""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails

from fiddler_run.errors import FiddlerError
from fiddler_run.system.files import exists, read_text, write_whole
from fiddler_run.system.parsing import parse_yaml

# These bounds are far beyond any machine or model. They keep arithmetic on a file's values from
# overflowing or exhausting memory.
LayerCount = Annotated[int, Field(gt=0, le=1_000)]
ExpertCount = Annotated[int, Field(gt=0, le=4_096)]
Width = Annotated[int, Field(gt=0, le=2**20)]  # of a vector: hidden_size, intermediate_size
Count = Annotated[int, Field(gt=0, le=2**31 - 1)]
CountOrZero = Annotated[int, Field(ge=0, le=2**31 - 1)]
Bytes = Annotated[int, Field(gt=0, le=2**60)]
BytesOrZero = Annotated[int, Field(ge=0, le=2**60)]
Rate = Annotated[float, Field(ge=1e-6, le=1e18)]  # tokens or bytes per second
Seconds = Annotated[float, Field(ge=1e-9, le=1e9)]
SecondsOrZero = Annotated[float, Field(ge=0, le=1e9)]
Ratio = Annotated[float, Field(ge=0, le=1e6)]
Microseconds = Annotated[float, Field(ge=1e-3, le=1e15)]
Milliseconds = Annotated[float, Field(ge=0, le=1e12)]

# The kinds of files, each with the keys that only it has. The second key is from versions before 3.
KINDS = {
    "plan": ("ranks", "resident_blocks"),
    "machine profile": ("host_expert_us", "absent_expert_us"),
    "routing profile": ("recorded",),
    "model file": ("sizes",),
}


class Section(BaseModel):
    """A mapping inside a file. Immutable and strict: no unknown keys, no type conversion, no
    NaN.

    A file lists the keys in `optional` only if their values differ from the default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    optional: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _omit_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict:
        values = serialize(self)
        for key in self.optional:
            if getattr(self, key) == type(self).model_fields[key].get_default():
                values.pop(key, None)
        return values

    def problems(self) -> list[str]:
        """Messages for broken rules between values, each naming the key and its value.

        Types are already checked.
        """
        return []

    @model_validator(mode="after")
    def _keep_rules(self, info: ValidationInfo) -> Self:
        """Raises ValueError with the first of `problems()`, once all types are right.

        If the validation context is a list, appends all of them to it instead.
        """
        problems = self.problems()
        if info.context is not None:
            info.context.extend(problems)
        elif problems:
            raise ValueError(problems[0])
        return self


class YamlFile(Section):
    """A whole file. Subclasses declare `version: Literal[...]` and the keys in file order."""

    kind: ClassVar[str]  # one of KINDS
    made_by: ClassVar[str]  # the command that writes such files
    header: ClassVar[str] = ""
    key_comments: ClassVar[dict[str, str]] = {}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads and checks a file.

        Raises:
            FiddlerError: the file cannot be read or breaks a rule. The message names file and key.
        """
        return cls.parse(cls.read(path), origin=str(path))

    @classmethod
    def read(cls, path: str | Path) -> str:
        """Reads the text of a file.

        Raises:
            FiddlerError: the file cannot be read.
        """
        if not exists(path):
            raise FiddlerError(f"{path}: no such file; make it with `{cls.made_by}`")
        return read_text(path)

    @classmethod
    def parse(cls, text: str, origin: str) -> Self:
        """Parses a text that came from `origin`. Raises as `load`."""
        content, problems = cls.examine(text, origin)
        if problems:
            raise FiddlerError(problems[0])
        return content

    @classmethod
    def examine(cls, text: str, origin: str) -> tuple[Self | None, list[str]]:
        """The content of a file's text, and all problems, each naming file and key.

        The content is None if a key or a type is wrong. It is present if only rules between values
        are broken.
        """
        try:
            data = parse_yaml(text, origin)
        except FiddlerError as error:
            return None, [str(error)]
        if not isinstance(data, dict):
            return None, [
                f"{origin}: not a {cls.kind}: expected a mapping of keys, found"
                f" {type(data).__name__}"
            ]
        other = kind_of(data)
        if other not in (None, cls.kind):
            return None, [f"{origin}: a {other}, not a {cls.kind}"]
        (known_version,) = cls.model_fields["version"].annotation.__args__
        if data.get("version") != known_version:
            return None, [
                f"{origin}: version: this release reads version {known_version}, but the file says"
                f" {str(data.get('version'))[:30]}; remake it with `{cls.made_by}`"
            ]
        content = None
        wrong = []
        broken = []
        try:
            content = cls.model_validate(data, context=broken)
        except ValidationError as error:
            wrong = _problems(error)
        return content, [
            " ".join(f"{origin}: {problem}".splitlines()) for problem in [*wrong, *broken]
        ]

    def dump(self) -> str:
        """The file's text, with one line for each innermost mapping or list.

        `parse(dump(x)) == x`.
        """
        lines = [f"# {line}" for line in self.header.splitlines()]
        for key, value in self.model_dump().items():
            # None: one line for each innermost mapping or list.
            style = None if isinstance(value, (dict, list)) else False
            text = yaml.dump(
                {key: value}, default_flow_style=style, sort_keys=False, width=float("inf")
            )
            for line in text.rstrip("\n").split("\n"):
                match = re.match(r"[ -]*(\w+):", line)
                if match and match[1] in self.key_comments:
                    indent = line[: len(line) - len(line.lstrip())]
                    lines.append(f"{indent}# {self.key_comments[match[1]]}")
                lines.append(line)
        return "\n".join(lines) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes the file atomically.

        Raises:
            FiddlerError: the file cannot be written.
        """
        write_whole(path, self.dump())


def kind_of(data: dict) -> str | None:
    """The key of KINDS that a file's content matches. None if none or several match."""
    found = [kind for kind, keys in KINDS.items() if any(key in data for key in keys)]
    return found[0] if len(found) == 1 else None


def _problems(error: ValidationError) -> list[str]:
    """Lists unknown keys first, because a misspelt key is also a missing one."""
    errors = error.errors(include_url=False)
    return [
        _problem(each)
        for each in sorted(errors, key=lambda each: each["type"] != "extra_forbidden")
    ]


def _problem(error: ErrorDetails) -> str:
    if error["type"] == "value_error":  # raised by our own checks, which name the key themselves
        return str(error["ctx"]["error"])
    where = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]
    ).lstrip(".")
    what = {"extra_forbidden": "unknown key", "missing": "missing"}.get(error["type"], error["msg"])
    return f"{where}: {what}"
