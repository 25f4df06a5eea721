"""The flags of `whatif`: one per quantity, with one value, several, or a range.

Exactly one quantity has several values.
"""

import argparse
from dataclasses import dataclass

from fiddler_opt.inputs.workload import DEFAULTS
from fiddler_opt.units import (
    UNITS,
    format_bytes,
    format_bytes_per_s,
    parse_bytes,
    parse_bytes_per_s,
    parse_count,
    parse_values,
)
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import MAX_RANKS


@dataclass(frozen=True)
class Quantity:
    """A quantity that can be varied. `unit` is B, B/s, a word, or empty."""

    flags: tuple[str, ...]
    title: str
    unit: str
    default: str

    @property
    def flag(self) -> str:
        return self.flags[0]

    def parse(self, text: str) -> list[int]:
        """Parses the values of the flag.

        Raises:
            FiddlerError: a value cannot be parsed.
        """
        one = {"B": parse_bytes, "B/s": parse_bytes_per_s}.get(self.unit, parse_count)
        return parse_values(text, self.flag, one)

    def show(self, value: int) -> str:
        return {"B": format_bytes, "B/s": format_bytes_per_s}.get(self.unit, str)(value)

    def axis(self, largest: int) -> tuple[int, str]:
        """The divisor of an axis's values, such as 10**9 for GB, and the label of the axis.

        `largest`, the largest value, decides the unit.
        """
        if not self.unit.startswith("B"):
            return 1, f"{self.title}, {self.unit}" if self.unit else self.title
        prefixed = next(name for name in ("TB", "GB", "MB", "KB", "B") if largest >= UNITS[name])
        return UNITS[prefixed], f"{self.title}, {self.unit.replace('B', prefixed)}"


def _of_workload(key: str, flags: tuple[str, ...], title: str, unit: str = "") -> Quantity:
    return Quantity(flags, title, unit, str(DEFAULTS[key]))


QUANTITIES = {
    "gpu_mem": Quantity(("--gpu-mem",), "GPU memory", "B", "the profiled GPU's"),
    "link": Quantity(("--link",), "link bandwidth", "B/s", "as profiled"),
    "ram": Quantity(("--ram",), "RAM bandwidth for the CPU", "B/s", "as profiled"),
    "ranks": Quantity(("--ranks",), "ranks", "", "1"),
    "max_seq_len": _of_workload("max_seq_len", ("--context", "--max-seq-len"), "context", "tokens"),
    "num_beams": _of_workload("num_beams", ("--beams", "--num-beams"), "beams"),
    "batch_size": _of_workload("batch_size", ("--batch-size",), "sequences at once"),
    "prompt_tokens": _of_workload("prompt_tokens", ("--prompt-tokens",), "prompt", "tokens"),
    "output_tokens": _of_workload("output_tokens", ("--output-tokens",), "output", "tokens"),
}


DEFAULT_NETWORK = "0.03ms,20GB/s"


@dataclass(frozen=True)
class WhatIf:
    """The values of `swept`, a key of QUANTITIES, and one value for each other given quantity.

    `network`: between ranks, if there are several.
    """

    swept: str
    values: list[int]
    fixed: dict[str, int]
    network: str = DEFAULT_NETWORK

    @property
    def quantity(self) -> Quantity:
        return QUANTITIES[self.swept]

    def workload_values(self) -> dict[str, int | None]:
        """The workload's values, None where not given.

        For the swept one, the value that is easiest to fit.
        """
        fits = max(self.values) if self.swept == "max_seq_len" else min(self.values)
        return {key: fits if key == self.swept else self.fixed.get(key) for key in DEFAULTS}


NOTES = {
    "ranks": (
        "; each brings its own GPU, link and memory bandwidth, as separate machines do, and the"
        " --gpu-mem given"
    )
}


def add_whatif_flags(parser: argparse.ArgumentParser) -> None:
    for key, quantity in QUANTITIES.items():
        parser.add_argument(
            *quantity.flags,
            dest=key,
            metavar="VALUES",
            help=(
                f"{quantity.title}: one value, a list A,B,C, or a range A..B (default:"
                f" {quantity.default}){NOTES.get(key, '')}"
            ),
        )
    parser.add_argument(
        "--network",
        metavar="LATENCY,RATE",
        help=f"with --ranks: round trip and rate between them (default: {DEFAULT_NETWORK})",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="plot the curves to a .png, .svg or .pdf file (needs matplotlib)",
    )


def parse_whatif(flags: argparse.Namespace) -> WhatIf:
    """Parses the flags.

    Raises:
        FiddlerError: a value cannot be parsed, or not exactly one quantity has several.
    """
    given = {
        key: quantity.parse(text)
        for key, quantity in QUANTITIES.items()
        if (text := getattr(flags, key)) is not None
    }
    swept = [key for key, values in given.items() if len(values) > 1]
    if len(swept) > 1:
        both = " and ".join(QUANTITIES[key].flag for key in swept)
        raise FiddlerError(f"{both} have several values each; vary one at a time")
    if not swept:
        some = ", ".join(quantity.flag for quantity in QUANTITIES.values())
        raise FiddlerError(
            f"nothing to vary; give one of {some} several values, such as --gpu-mem 8GB..48GB or"
            " --beams 1,2,4"
        )
    fixed = {key: values[0] for key, values in given.items() if key != swept[0]}
    if max(given.get("ranks", [1])) > MAX_RANKS:
        raise FiddlerError(f"--ranks {flags.ranks}: there can be {MAX_RANKS} at most")
    if flags.network is not None and "ranks" not in given:
        raise FiddlerError("--network is between ranks; add --ranks, or remove it")
    return WhatIf(swept[0], given[swept[0]], fixed, flags.network or DEFAULT_NETWORK)
