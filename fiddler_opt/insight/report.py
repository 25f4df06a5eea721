"""Prints any file written by fiddler-opt in the terminal."""

import re
from pathlib import Path

from rich.console import Console

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.routing_profile import RoutingProfile
from fiddler_opt.insight.machine_report import print_machine
from fiddler_opt.insight.plan_report import print_placement, print_plan
from fiddler_opt.insight.routing_report import print_routing
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan
from fiddler_run.plan.yaml_file import KINDS, kind_of
from fiddler_run.system.files import read_text
from fiddler_run.system.parsing import parse_yaml


def print_file(console: Console, path: str | Path) -> Plan | MachineProfile | RoutingProfile:
    """Prints a plan or a profile and returns its content.

    Raises:
        FiddlerError: the file cannot be read, or is neither a plan nor a profile.
    """
    text = read_text(path)
    shown = _file_class(text, path).parse(text, path)
    if isinstance(shown, Plan):
        print_plan(console, shown, [])
        print_placement(console, shown)
    elif isinstance(shown, MachineProfile):
        print_machine(console, shown)
        made = shown.provenance
        console.print(
            f"made on {made.created} by `{made.command}` ({made.software}; {shown.source})"
        )
    else:
        print_routing(console, shown)
        console.print(f"made on {shown.recorded.created} by `{shown.recorded.command}`")
    return shown


def _file_class(text: str, path: str | Path) -> type[Plan | MachineProfile | RoutingProfile]:
    """The class of a file, identified by a key that only this kind of file has."""
    found = [
        kind
        for kind, keys in KINDS.items()
        if any(re.search(rf"^{key}:", text, re.MULTILINE) for key in keys)
    ]
    if len(found) != 1:  # written in another style, or not one of our files
        data = parse_yaml(text, path)
        found = [kind_of(data) if isinstance(data, dict) else None]
    classes = {each.kind: each for each in (Plan, MachineProfile, RoutingProfile)}
    if found[0] not in classes:
        raise FiddlerError(
            f"{path}: neither a plan nor a profile; give a file that `fiddler-opt` wrote"
        )
    return classes[found[0]]
