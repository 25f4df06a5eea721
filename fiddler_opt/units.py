"""Parses and formats quantities.

A size always has a unit. GB is 10^9 bytes, GiB is 2^30.
"""

import re
from collections.abc import Callable

from fiddler_run.errors import FiddlerError

MAX_BYTES = 2**60  # or bytes per second; far beyond any machine
MAX_COUNT = 2**31 - 1
UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}


def parse_bytes(text: str, where: str) -> int:
    """Parses a size such as `24GB`, `1.5 GiB` or `0GB` to bytes. `where` names the flag in errors.

    Raises:
        FiddlerError: the number or the unit is missing, the unit is unknown, or the size exceeds
            MAX_BYTES.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None:
        raise FiddlerError(f"{where} {text}: not a size; write for example 24GB or 24GiB")
    number, unit = match.groups()
    if unit not in UNITS:
        problem = f"{unit} is not a unit of size" if unit else "a size needs a unit"
        raise FiddlerError(
            f"{where} {text}: {problem}; write for example {number}GB (10^9 bytes) or {number}GiB"
            " (2^30 bytes)"
        )
    size = float(number) * UNITS[unit]
    if size > MAX_BYTES:
        raise FiddlerError(
            f"{where} {_short(text)}: more than any machine has; write for example 24GB"
        )
    return int(size)


def parse_bytes_per_s(text: str, where: str) -> int:
    """Parses a rate such as `25GB/s` to bytes per second.

    Raises:
        FiddlerError: the number or the unit is missing, it is not per second, or it is zero.
    """
    size, per, second = text.partition("/")
    if (per, second.strip()) != ("/", "s"):
        raise FiddlerError(f"{where} {text}: not a rate; write for example 25GB/s")
    return _more_than_zero(parse_bytes(size, where), text, where)


def parse_sizes(text: str, where: str) -> list[int]:
    """Parses sizes such as `24GB,16GB` to bytes.

    Raises:
        FiddlerError: as `parse_bytes`.
    """
    return [parse_bytes(size, where) for size in text.split(",")]


def parse_network(text: str, where: str) -> tuple[float, int]:
    """Parses `0.2ms,1GB/s`: a network's round trip, in microseconds, and bytes per second.

    Raises:
        FiddlerError: the text is not a time above zero and a rate.
    """
    latency, comma, rate = text.partition(",")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(us|ms|s)\s*", latency)
    if match is None or not comma or not 1e-3 <= float(match[1]) <= 1e6:
        raise FiddlerError(
            f"{where} {_short(text)}: not a round trip and a rate; write for example 0.2ms,1GB/s"
        )
    microseconds = float(match[1]) * {"us": 1, "ms": 10**3, "s": 10**6}[match[2]]
    return microseconds, parse_bytes_per_s(rate, where)


def parse_count(text: str, where: str) -> int:
    """Parses a whole number above zero.

    Raises:
        FiddlerError: the text is not such a number, or exceeds MAX_COUNT.
    """
    if not re.fullmatch(r"\s*[0-9]+\s*", text):
        raise FiddlerError(f"{where} {text}: not a whole number")
    if len(text.strip().lstrip("0")) > len(str(MAX_COUNT)) or int(text) > MAX_COUNT:
        raise FiddlerError(f"{where} {_short(text)}: more than {MAX_COUNT}")
    return _more_than_zero(int(text), text, where)


def _short(text: str) -> str:
    return text if len(text) <= 30 else f"{text[:30]}..."


def _more_than_zero(value: int, text: str, where: str) -> int:
    if value == 0:
        raise FiddlerError(f"{where} {text}: must be more than zero")
    return value


def parse_values(text: str, where: str, parse: Callable[[str, str], int]) -> list[int]:
    """Parses one value `8GB`, an ascending list `8GB,16GB`, or a range `8GB..48GB`.

    `parse(text, where)` parses one value.

    Raises:
        FiddlerError: `parse` refuses a value, or a range is not ascending.
    """
    ends = text.split("..")
    if len(ends) == 1:
        return sorted({parse(item, where) for item in text.split(",")})
    if len(ends) > 2 or "," in text:
        raise FiddlerError(f"{where} {text}: give either a list, A,B,C, or a range, A..B")
    low, high = (parse(end, where) for end in ends)
    if low >= high:
        raise FiddlerError(f"{where} {text}: a range goes from a smaller to a larger value")
    return round_values(low, high)


def round_values(low: int, high: int) -> list[int]:
    """Both ends and the multiples of a round step between them, about nine values in all.

    A step is 1, 2, 4, 5 or 8 times a power of ten. If a coarse power of two divides both ends, it
    is counted in that: 2048..32768 takes steps of 4096. Steps that divide both ends are preferred.
    """
    both = low | high
    binary = both & -both
    unit = binary if binary >= 128 and high <= 1000 * binary else 1
    while unit > 1 and high - low < 8 * unit:
        unit //= 2
    steps = [
        unit * digit * 10**power for power in range(len(str(high))) for digit in (1, 2, 4, 5, 8)
    ]
    choices = {
        step: sorted({low, high, *range(-(-low // step) * step, high, step)})
        for step in steps
        if step * 20 > high - low
    }
    few = {step: values for step, values in choices.items() if len(values) <= 13}

    def merit(step: int) -> tuple[bool, bool, int]:
        aligned = low % step == 0 and high % step == 0
        return len(few[step]) >= 6, aligned, -abs(len(few[step]) - 9)

    return few[max(few, key=merit)]


def format_bytes(size: float) -> str:
    """Formats bytes in the largest decimal unit that leaves at least 1: `5.25 GB`."""
    for unit in ("TB", "GB", "MB", "KB"):
        if abs(size) >= UNITS[unit]:
            return f"{size / UNITS[unit]:.2f} {unit}"
    return f"{size:.0f} B"


def format_bytes_per_s(bytes_per_s: float) -> str:
    return f"{format_bytes(bytes_per_s)}/s"
