"""Finds the files that a plan was made from."""

import hashlib
from pathlib import Path

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.machine_ranks import JOINED_BY, load_machines
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.routing import ASSUMED, Routing
from fiddler_opt.inputs.routing_profile import RoutingProfile
from fiddler_opt.solve.problem import Problem
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan
from fiddler_run.system.locate import shipped_file
from fiddler_run.weights.model_folder import model_config_file


def profile_sha256(machine: MachineProfile) -> str:
    """A hash that identifies a machine profile by its values, regardless of comments."""
    return hashlib.sha256(machine.model_dump_json().encode()).hexdigest()


def sources(
    plan: Plan, plan_path: Path, machine_path: str | None, routing_path: str | None
) -> tuple[Problem, Routing]:
    """Finds the problem and the routing that a plan was made from.

    Raises:
        FiddlerError: a profile is missing from the path in the plan, or it or the model has changed
            since.
    """
    made = plan.provenance
    names = made.machine.split(JOINED_BY)
    if machine_path and len(names) > 1:
        raise FiddlerError(
            f"--machine {machine_path}: the plan was made from {len(names)} machine profiles,"
            f" {made.machine}; put these files back and remove --machine"
        )
    machine = load_machines([machine_path] if machine_path else names, made.network or None)
    if profile_sha256(machine) != made.machine_sha256:
        advice = "name the original with --machine" if len(names) == 1 else "put the originals back"
        raise FiddlerError(
            f"{machine_path or made.machine}: not the profile that the plan was made from; {advice}"
        )
    model = ModelSpec.from_file(
        model_config_file(plan.model.name, plan_path.resolve().parent), plan.model.name
    )
    for name in type(plan.model).model_fields:
        planned = getattr(plan.model, name)
        found = getattr(model.shape, name)
        if planned != found:
            raise FiddlerError(
                f"{plan_path}: model.{name} is {planned}, but {model.config.origin} says {found};"
                " plan again"
            )
    origin = routing_path or made.routing
    if routing_path is None and origin == ASSUMED:
        routing = Routing.uniform(model)
    else:
        routing = Routing.from_profile(RoutingProfile.load(shipped_file(origin)), model, origin)
    return Problem.of(plan, model, machine), routing
