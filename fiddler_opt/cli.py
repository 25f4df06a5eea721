"""fiddler-opt: the table of commands. Results go to stdout, everything else to stderr."""

import argparse
import sys

from rich.console import Console

from fiddler_opt.commands import (
    calibrate,
    diff,
    doctor,
    export,
    pack,
    plan,
    profile,
    replay,
    show,
    whatif,
)
from fiddler_run.command import exit_status
from fiddler_run.flags import add_version

COMMANDS = {
    "profile": profile,
    "plan": plan,
    "show": show,
    "whatif": whatif,
    "diff": diff,
    "replay": replay,
    "calibrate": calibrate,
    "doctor": doctor,
    "pack": pack,
    "export": export,
}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fiddler-opt",
        description="Plan how to run a Mixture-of-Experts model on this machine.",
    )
    add_version(parser)
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.HELP, description=command.HELP)
        subparser.set_defaults(run=command.run)
        command.add_flags(subparser)
    flags = parser.parse_args(arguments)
    if "run" not in flags:
        parser.print_help(sys.stderr)
        sys.exit(2)
    return flags


def main(arguments: list[str] | None = None) -> int:
    def command() -> None:
        flags = parse_arguments(arguments)
        flags.run(flags, Console(stderr=True, highlight=False, soft_wrap=True, markup=False))

    return exit_status(command, "fiddler-opt")


if __name__ == "__main__":
    sys.exit(main())
