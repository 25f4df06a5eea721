"""The files that flags name, loaded, and how a command's output was made."""

import argparse
import shlex
import sys
from datetime import date
from pathlib import Path

from rich.console import Console

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.routing import Routing
from fiddler_opt.inputs.routing_profile import RoutingProfile
from fiddler_opt.insight.sources import profile_sha256
from fiddler_run.errors import FiddlerError
from fiddler_run.system.files import is_file
from fiddler_run.system.locate import shipped_file


def load_spec(name: str, console: Console) -> ModelSpec:
    """The model of that name; prints what was assumed about it."""
    model = ModelSpec.load(name)
    if model.note is not None:
        console.print(f"note: {model.note}", style="yellow")
    return model


def load_machine(flags: argparse.Namespace) -> tuple[MachineProfile, Path]:
    """The machine profile and its file."""
    path = machine_file(flags)
    if not is_file(path):
        raise FiddlerError(
            f"{path}: no such machine profile; run `fiddler-opt profile` first, or name one with"
            " --machine"
        )
    return MachineProfile.load(path), path


def load_routing(flags: argparse.Namespace, model: ModelSpec) -> Routing:
    """The routing of the model's profile; uniform if none is named and there is none."""
    path = routing_file(flags, model) if flags.routing is None else shipped_file(flags.routing)
    if flags.routing is None and not is_file(path):
        return Routing.uniform(model)
    return Routing.from_profile(RoutingProfile.load(path), model, str(path))


def machine_file(flags: argparse.Namespace) -> Path:
    named = getattr(flags, "machine", None)
    return shipped_file(named) if named else Path(flags.profiles) / "local.machine.yaml"


def routing_file(flags: argparse.Namespace, model: ModelSpec) -> Path:
    return Path(flags.profiles) / f"{model.short_name}.routing.yaml"


def provenance(machine_path: Path, machine: MachineProfile, routing: str) -> dict[str, str]:
    """A plan's provenance, but for the solver's keys."""
    return {
        "command": command_line(),
        "machine": str(machine_path),
        "machine_sha256": profile_sha256(machine),
        "machine_source": machine.source,
        "routing": routing,
        "created": date.today().isoformat(),
    }


def command_line() -> str:
    return shlex.join(["fiddler-opt", *sys.argv[1:]])


def tables() -> Console:
    """The console on stdout, for commands whose result is tables."""
    return Console(highlight=False, soft_wrap=True, markup=False)
