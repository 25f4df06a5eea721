"""Flags shared by several commands."""

import argparse

from fiddler_opt.inputs.model import DEFAULT_MODEL
from fiddler_run.encodings.table import ENCODINGS


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the model and for the folder of profiles."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="checkpoint folder or Hugging Face id (default: %(default)s)",
    )
    parser.add_argument(
        "--profiles",
        default="profiles",
        metavar="DIR",
        help="folder of profiles (default: %(default)s)",
    )


def add_profiles(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the profiles that a new plan is made from."""
    parser.add_argument(
        "--machine",
        nargs="+",
        metavar="FILE",
        help=(
            "machine profile; several are joined, a machine each (default: local.machine.yaml in"
            " --profiles)"
        ),
    )
    parser.add_argument(
        "--routing",
        metavar="FILE",
        help="routing profile (default: the model's in --profiles, else uniform routing)",
    )


def add_network(parser: argparse.ArgumentParser) -> None:
    """Adds the flag for the network between the machines of several profiles."""
    parser.add_argument(
        "--network",
        metavar="LATENCY,RATE",
        help="round trip and rate between the machines of several profiles, such as 0.2ms,1GB/s",
    )


def add_encoding(parser: argparse.ArgumentParser) -> None:
    """Adds the flag for the encoding of blocks."""
    parser.add_argument(
        "--encoding",
        choices=["auto", *ENCODINGS],
        default="auto",
        help=(
            "how experts are stored; auto: the fastest of those that the machine profile has timed"
            " and that RAM can hold (default: %(default)s)"
        ),
    )


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the profiles that an existing plan was made from."""
    for name in ("machine", "routing"):
        parser.add_argument(
            f"--{name}",
            metavar="FILE",
            help=f"{name} profile that the plan was made from (default: the file the plan names)",
        )


def add_plot(parser: argparse.ArgumentParser) -> None:
    """Adds the flag for a plot besides the tables."""
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="also plot it to a .png, .svg or .pdf file (needs matplotlib)",
    )
