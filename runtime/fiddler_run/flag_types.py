"""The types of numbers on the command line."""

import argparse

from fiddler_run.generation.defaults import MIN_TEMPERATURE


def port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**16:
        raise argparse.ArgumentTypeError("must be from 0 to 65535; 0 chooses a free one")
    return value


def positive(text: str) -> int:
    value = int(text)
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError("must be from 1 to 2147483647")
    return value


def temperature(text: str) -> float:
    value = float(text)
    if value != 0 and not MIN_TEMPERATURE <= value <= 1e4:
        raise argparse.ArgumentTypeError("must be 0, or from 0.0001 to 10000")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError("must be from 0 to 2^63 - 1")
    return value


def probability(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return value


def address(text: str) -> tuple[str, int]:
    """A host and a port, as in `10.0.0.1:29500`."""
    host, _, number = text.rpartition(":")
    if not host:
        raise argparse.ArgumentTypeError(f"{text}: write an address and a port: 10.0.0.1:29500")
    return host.strip("[]"), port(number)
