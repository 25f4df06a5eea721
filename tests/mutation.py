"""Random damage to files, for tests of the code that reads them."""

import json
import random
from collections.abc import Callable

import yaml

NASTY_VALUES = [
    *(0, 1, -1, 2, 7, 2**31, 2**53 + 1, 2**63, 10**9, 10**18, 10**30, 10**400, -(10**400)),
    *(0.0, -0.0, 0.5, 1.0, 5e-324, 1e-300, 1e-12, 1e12, 1e300, 1.7e308),
    *(float("inf"), float("-inf"), float("nan")),
    *(True, False, None, "", "x", "1", "\0", "\ud83d", "é" * 300, "cuda", "cpu"),
    *([], {}, [[]], [0], {"a": 1}, {1: 2}, [None], "[" * 3000),
]
NASTY_TEXTS = [
    *(
        "&a [1]",
        "*a",
        "!!set {a}",
        "!!int ''",
        "!!float ''",
        "!!bool x",
        "!!timestamp x",
        "!!python/name:os.system",
    ),
    *(
        "[" * 1000,
        "{" * 1000,
        "- " * 500,
        "9" * 5000,
        "0x" + "f" * 5000,
        "1:2:" * 2000,
        "1e999",
        ".nan",
        ".inf",
    ),
    *(
        "\ufeff",
        "\t",
        "\0",
        "\x85",
        "\u2028",
        "\r",
        "\n---\n",
        "\n...\n",
        "? [a]: b",
        "<<: *a",
        "\\UFFFFFFFF",
    ),
    *('"\\ud83d"', "%YAML 9.9\n", "#", ": ", "'", '"', "@", "`", "2026-13-45", "~"),
]


def places(data: object) -> list[tuple[dict | list, object]]:
    """Each (container, key or index) inside `data`."""
    items = (
        list(data.items())
        if isinstance(data, dict)
        else list(enumerate(data))
        if isinstance(data, list)
        else []
    )
    return [(data, key) for key, _ in items] + [
        place for _, value in items for place in places(value)
    ]


def mutate_value(data: object, rng: random.Random) -> None:
    """Changes one entry in place: replaces, scales, moves, renames or removes it."""
    found = places(data)
    if not found:
        return
    box, key = rng.choice(found)
    other, other_key = rng.choice(found)
    kind = rng.choice([0, 1, 2, 3, 3, 3, 4, 5])
    if kind == 0:
        del box[key]
    elif kind == 1:
        mine = json_copy(box[key])
        box[key] = json_copy(other[other_key])
        other[other_key] = mine
    elif kind == 2 and isinstance(box, dict):
        box[rng.choice([other_key, "x", 0, 3, 1.5, 10**20, f"{key}_"])] = box.pop(key)
    elif kind == 3 and isinstance(box[key], (int, float)):
        box[key] = scaled(box[key], rng.choice([-25, -9, -3, -1, 1, 3, 9, 25]))
    elif kind == 4 and isinstance(other, dict):
        other[key] = json_copy(box[key])
    else:
        box[key] = rng.choice(NASTY_VALUES)


def scaled(value: float, power: int) -> float:
    if isinstance(value, float):
        return value * 10.0**power
    return value * 10**power if power > 0 else value // 10**-power


def json_copy(value: object) -> object:
    """A deep copy without shared parts, so that mutations create no cycles."""
    if isinstance(value, dict):
        return {key: json_copy(each) for key, each in value.items()}
    return [json_copy(each) for each in value] if isinstance(value, list) else value


def mutate_text(text: str, rng: random.Random) -> str:
    """Changes one place: cuts, repeats or replaces characters, or inserts a nasty text."""
    at = rng.randrange(len(text) + 1)
    length = rng.choice([1, 1, 2, 8, 64, 512])
    kind = rng.randrange(5)
    if kind == 0:
        return text[:at] + text[at + length :]
    if kind == 1:
        return text[:at] + text[at : at + length] * 2 + text[at + length :]
    if kind == 2:
        return text[:at] + rng.choice(NASTY_TEXTS) + text[at + rng.choice([0, length]) :]
    if kind == 3:
        digits = [place for place, letter in enumerate(text) if letter.isdigit()] or [0]
        place = rng.choice(digits)
        return text[:place] + rng.choice(["0", "9", "-", "99999999", "e", "."]) + text[place + 1 :]
    return (
        text[:at] + chr(rng.choice([0, 9, 27, 127, 255, 0x2028, 0xFEFF, 0x1F600])) + text[at + 1 :]
    )


def mutated(data: object, dump: Callable[[object], str], rng: random.Random) -> bytes:
    """Dumps `data` with random damage, sometimes none; returns the file's bytes."""
    data = json_copy(data)
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        mutate_value(data, rng)
    text = dump(data)
    for _ in range(rng.choice([0, 0, 1, 3])):
        text = mutate_text(text, rng)
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    if rng.random() < 0.1 and content:
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def as_yaml(data: object) -> str:
    return yaml.dump(data, Dumper=NoAliases, sort_keys=False)


class NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def as_json(data: object) -> str:
    return json.dumps(
        {str(key): value for key, value in data.items()} if isinstance(data, dict) else data
    )
