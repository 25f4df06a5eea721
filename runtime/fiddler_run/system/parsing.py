"""Parses JSON and YAML from users. Every problem is a FiddlerError that names the file."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from fiddler_run.errors import FiddlerError
from fiddler_run.system.files import exists, read_text, reason

MAX_YAML_DEPTH = 20  # our own files nest 5 deep
LONG_NUMBER = re.compile(r"[-+]?(0x[0-9a-fA-F_]+|0b[01_]+|[0-9_]+(:[0-9_]+)*(\.[0-9_]*)?)")


def parse_json(text: str, origin: str, remedy: str) -> Any:
    """Parses a JSON text that came from `origin`.

    Raises:
        FiddlerError: the text is not valid JSON. The message ends with `remedy`.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise FiddlerError(f"{origin}: not JSON: nested too deeply; {remedy}") from None
    except ValueError as error:
        raise FiddlerError(f"{origin}: not JSON: {reason(error)}; {remedy}") from None


def read_json_object(path: str | Path, remedy: str = "download the checkpoint again") -> dict:
    """Reads the JSON object in a file of a checkpoint.

    Raises:
        FiddlerError: the file cannot be read or does not hold a JSON object.
    """
    if not exists(path):
        raise FiddlerError(f"{path}: missing; {remedy}")
    data = parse_json(read_text(path), f"{path}: cannot read", remedy)
    if not isinstance(data, dict):
        raise FiddlerError(f"{path}: expected a JSON object, found {type(data).__name__}; {remedy}")
    return data


def parse_yaml(text: str, origin: str) -> Any:
    """Parses a YAML text that came from `origin`.

    Accepts only what the project's own files use: no anchors, aliases or tags, no duplicate keys,
    no deep nesting.

    Raises:
        FiddlerError: the text is not such YAML.
    """
    try:
        _refuse_unusual_yaml(text)
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except (
        Exception
    ) as error:  # a scalar such as 2026-13-45 or 1e999 raises almost any type of error
        what = reason(error).replace('in "<unicode string>", line', "at line")
        raise FiddlerError(f"{origin}: not valid YAML: {what}") from None


def _refuse_constant(name: str) -> None:
    """Rejects NaN and Infinity, which Python reads although they are not JSON."""
    raise ValueError(f"{name} is not a number")


class _UniqueKeyLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """A safe loader that rejects duplicate keys. Plain YAML silently keeps the last one."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a single value", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _refuse_unusual_yaml(text: str) -> None:
    """Rejects YAML features that our files do not use.

    Anchors and aliases can expand a small file to a huge value.

    Raises:
        ValueError: the text uses anchors, aliases or tags, or nests deeply.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_UniqueKeyLoader):
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ValueError(f"{line}: anchors and aliases are not allowed")
        if (
            isinstance(event, yaml.ScalarEvent)
            and len(event.value) > 40
            and LONG_NUMBER.fullmatch(event.value)
        ):
            raise ValueError(f"{line}: a number of {len(event.value)} digits")
        if getattr(event, "tag", None) not in (None, "!"):
            raise ValueError(f"{line}: tags are not allowed")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
            event, yaml.CollectionEndEvent
        )
        if depth > MAX_YAML_DEPTH:
            raise ValueError(f"{line}: nested more than {MAX_YAML_DEPTH} deep")
