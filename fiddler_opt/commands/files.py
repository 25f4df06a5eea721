"""Loads the files that flags name, and describes how a command's output was made."""

import argparse
import shlex
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

from rich.console import Console

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.machine_ranks import JOINED_BY, load_machines
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.routing import Routing
from fiddler_opt.inputs.routing_profile import RoutingProfile
from fiddler_opt.insight.notes import ram_shortages
from fiddler_opt.insight.sources import profile_sha256
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan
from fiddler_run.system.files import is_file
from fiddler_run.system.locate import shipped_file


def load_spec(name: str, console: Console) -> ModelSpec:
    """Loads the model named `name`. Prints a note if part of its description was assumed."""
    with console.status("reading the model's sizes"):
        model = ModelSpec.load(name)
    if model.note is not None:
        console.print(f"note: {model.note}", style="yellow")
    return model


def load_machine(
    flags: argparse.Namespace, network: str | None = None
) -> tuple[MachineProfile, str]:
    """Loads the machine profile, or joins several. Returns it with the files' names.

    Args:
        network: between the machines, as given by --network.
    """
    names = [str(shipped_file(name)) for name in flags.machine or [machine_file(flags)]]
    return load_machines(names, network), JOINED_BY.join(names)


def load_routing(flags: argparse.Namespace, model: ModelSpec) -> Routing:
    """Loads the model's routing profile.

    Without one, routing is assumed to be uniform.
    """
    path = routing_file(flags, model) if flags.routing is None else shipped_file(flags.routing)
    if flags.routing is None and not is_file(path):
        return Routing.uniform(model)
    return Routing.from_profile(RoutingProfile.load(path), model, str(path))


def stored_models(
    flags: argparse.Namespace, model: ModelSpec, machine: MachineProfile
) -> list[ModelSpec]:
    """The model in each encoding that --encoding allows.

    Raises:
        FiddlerError: the encoding cannot store the model, or was not timed.
    """
    timed = machine.stored(model)
    if flags.encoding == "auto":
        return timed
    try:
        model.in_encoding(flags.encoding)
    except FiddlerError as error:
        raise FiddlerError(f"--encoding: {error}") from None
    chosen = [each for each in timed if each.encoding == flags.encoding]
    if not chosen:
        raise FiddlerError(
            f"--encoding {flags.encoding}: the machine profile has no times for it, because it was"
            " made where it has no kernels; choose another, or profile again"
        )
    return chosen


def best_plan(
    models: list[ModelSpec],
    make: Callable[[ModelSpec], Plan],
    cost: Callable[[Plan], object],
    machine: MachineProfile,
) -> Plan:
    """The plan with the lowest `cost` over the encodings that have a plan.

    Plans that the machine's RAM can hold come first.

    Raises:
        FiddlerError: none has; the reason is the last one's.
    """
    plans = []
    refusals = []
    for model in models:
        try:
            plans.append(make(model))
        except FiddlerError as error:
            refusals.append(error)
    if not plans:
        raise refusals[-1]
    return min(plans, key=lambda plan: (bool(ram_shortages(plan, machine)), cost(plan)))


def machine_file(flags: argparse.Namespace) -> Path:
    """The profile of this machine."""
    return Path(flags.profiles) / "local.machine.yaml"


def routing_file(flags: argparse.Namespace, model: ModelSpec) -> Path:
    return Path(flags.profiles) / f"{model.short_name}.routing.yaml"


def provenance(
    machine_name: str, machine: MachineProfile, routing: str, network: str | None = None
) -> dict[str, str]:
    """A plan's provenance, except for the keys that describe the solver's run."""
    return {
        "command": command_line(),
        "machine": machine_name,
        "network": network or "",
        "machine_sha256": profile_sha256(machine),
        "machine_source": machine.source,
        "routing": routing,
        "created": date.today().isoformat(),
    }


def command_line() -> str:
    return shlex.join(["fiddler-opt", *sys.argv[1:]])


def tables() -> Console:
    """A console on stdout, for commands that print tables."""
    return Console(highlight=False, soft_wrap=True, markup=False)
