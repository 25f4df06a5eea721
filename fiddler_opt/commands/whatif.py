"""`fiddler-opt whatif`: predicts speed over a range of one quantity."""

import argparse

from rich.console import Console

from fiddler_opt.commands import flags as shared
from fiddler_opt.commands.files import (
    best_plan,
    load_machine,
    load_routing,
    load_spec,
    provenance,
    stored_models,
    tables,
)
from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.workload import plan_workload
from fiddler_opt.insight.plots import require_matplotlib
from fiddler_opt.insight.sweep_flags import add_whatif_flags, parse_whatif
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Budget, Plan, Workload

HELP = "predict speed over a range of hardware or workloads"


def add_flags(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    shared.add_profiles(parser)
    shared.add_encoding(parser)
    add_whatif_flags(parser)


def run(flags: argparse.Namespace, console: Console) -> None:
    from fiddler_opt.insight.whatif import run_whatif
    from fiddler_opt.solve.compiler import compile_plan
    from fiddler_opt.solve.predict import workload_s

    asked = parse_whatif(flags)
    if flags.plot is not None:
        require_matplotlib()
    model = load_spec(flags.model, console)
    workload = plan_workload(asked.workload_values(), model)
    if flags.machine and len(flags.machine) > 1:
        raise FiddlerError("--machine: give one profile, and vary --ranks for more such machines")
    profile, machine_name = load_machine(flags)
    machine = profile.first_ranks(1)
    routing = load_routing(flags, model)
    made = provenance(machine_name, profile, routing.origin)
    models = stored_models(flags, model, machine)

    def solve(machine: MachineProfile, workload: Workload, gpu_bytes: int) -> Plan:
        budget = Budget(gpu_bytes=gpu_bytes, other_gpu_bytes=[gpu_bytes] * (machine.num_ranks - 1))
        return best_plan(
            models,
            lambda each: compile_plan(each, machine, routing, workload, budget, made),
            workload_s,
            machine,
        )

    with console.status("solving"):
        run_whatif(asked, model, machine, workload, solve, flags.plot, tables())
