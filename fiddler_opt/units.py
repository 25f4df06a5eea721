"""Sizes as people write them. Rule: a size always carries its unit; GB is 10^9 bytes, GiB is 2^30."""

import re

from fiddler_run.errors import FiddlerError

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
    """Bytes of a size such as `24GB`, `1.5 GiB` or `0GB`; `where` names the flag in messages.

    Raises:
        FiddlerError: no number, no unit, or an unknown unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None:
        raise FiddlerError(f"{where} {text}: not a size; write for example 24GB or 24GiB")
    number, unit = match.groups()
    if unit not in UNITS:
        problem = f"{unit} is not a unit of size" if unit else "a size needs a unit"
        raise FiddlerError(f"{where} {text}: {problem}; write for example {number}GB (10^9 bytes) or {number}GiB (2^30 bytes)")
    return int(float(number) * UNITS[unit])


def format_bytes(size: float) -> str:
    """Bytes in the largest decimal unit that leaves at least 1: `5.25 GB`."""
    for unit in ("TB", "GB", "MB", "KB"):
        if abs(size) >= UNITS[unit]:
            return f"{size / UNITS[unit]:.2f} {unit}"
    return f"{size:.0f} B"
