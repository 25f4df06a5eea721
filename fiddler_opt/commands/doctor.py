"""`fiddler-opt doctor`: prints the limits of this machine and how to lift them."""

import argparse

from rich.console import Console

from fiddler_opt.commands import flags as shared
from fiddler_opt.commands.files import load_spec, machine_file, tables
from fiddler_opt.inputs.machine import MachineProfile
from fiddler_run.errors import FiddlerError
from fiddler_run.system.files import is_file

HELP = "print the limits of this machine and how to lift them"


def add_flags(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)


def run(flags: argparse.Namespace, console: Console) -> None:
    from fiddler_opt.insight.doctor import examine
    from fiddler_opt.insight.finding import print_findings, stops

    path = machine_file(flags)
    model = load_spec(flags.model, console)
    machine = MachineProfile.load(path) if is_file(path) else None
    with console.status("examining this machine"):
        findings = examine(model, machine)
    print_findings(tables(), findings)
    if stops(findings):
        raise FiddlerError(
            f"{model.shape.name} cannot run here; the lines marked `stops` name the reasons"
        )
