"""`fiddler-opt plan`: solves for the best placement and writes the plan."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from fiddler_opt.commands import flags as shared
from fiddler_opt.commands.files import (
    best_plan,
    load_machine,
    load_routing,
    load_spec,
    provenance,
    stored_models,
)
from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.workload import DEFAULTS, plan_workload, shortened
from fiddler_opt.insight.notes import plan_notes
from fiddler_opt.insight.plan_report import print_plan
from fiddler_opt.solve.baselines import BASELINES
from fiddler_opt.solve.target import least_memory, parse_rate
from fiddler_opt.units import format_bytes, parse_bytes, parse_sizes
from fiddler_run.errors import FiddlerError
from fiddler_run.flag_types import positive
from fiddler_run.plan.schema import Budget, Plan
from fiddler_run.system.files import require_writable, write_whole
from fiddler_run.weights.model_folder import name_in_plan

HELP = "solve for the best placement within a GPU memory budget"
WORKLOAD_HELP = {
    "prompt_tokens": "plan for prompts of N tokens",
    "output_tokens": "plan for N generated tokens",
    "num_beams": "plan for N beams",
    "batch_size": "plan for N sequences at once",
    "max_seq_len": "plan for up to N tokens, prompt and output together",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--gpu-mem",
        metavar="SIZES",
        help=(
            "GPU memory to use, such as 24GB; 0GB plans for the CPU alone; for several ranks, a"
            " size each, such as 24GB,16GB (default: all that was free on the profiled GPUs)"
        ),
    )
    budget.add_argument(
        "--target",
        metavar="RATE",
        help="find the smallest GPU budget that reaches this decode speed, e.g. 6tok/s",
    )
    parser.add_argument(
        "--host-mem",
        metavar="SIZE",
        help=(
            "limit on host memory for experts and embedding; the rest stays on disk (default: none)"
        ),
    )
    shared.add_profiles(parser)
    shared.add_network(parser)
    shared.add_encoding(parser)
    for key, words in WORKLOAD_HELP.items():
        parser.add_argument(
            f"--{key.replace('_', '-')}",
            type=positive,
            metavar="N",
            help=f"{words} (default: {DEFAULTS[key]})",
        )
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="plan to write (default: plans/MODEL-SIZE.yaml)"
    )
    parser.add_argument(
        "--robust",
        action="store_true",
        help="optimise for the worst of the routing profile's sets of prompts",
    )
    parser.add_argument(
        "--baseline",
        choices=BASELINES,
        help="write the plan of this simple rule instead, for comparison",
    )
    parser.add_argument(
        "--emit", metavar="FILE", help="also write the integer program, in LP format"
    )


def run(flags: argparse.Namespace, console: Console) -> None:
    from fiddler_opt.solve.comparison import compared
    from fiddler_opt.solve.compiler import by_rule, compile_plan, integer_program
    from fiddler_opt.solve.problem import Problem

    rate = None if flags.target is None else parse_rate(flags.target)
    sizes = None if flags.gpu_mem is None else parse_sizes(flags.gpu_mem, "--gpu-mem")
    host_bytes = None if flags.host_mem is None else parse_bytes(flags.host_mem, "--host-mem")
    model = load_spec(flags.model, console)
    workload = plan_workload({key: getattr(flags, key) for key in DEFAULTS}, model)
    profile, machine_name = load_machine(flags, flags.network)
    routing = load_routing(flags, model)
    if rate is not None and profile.num_ranks > 1:
        raise FiddlerError(
            f"--target is for one rank, but the machine profile has {profile.num_ranks}; give"
            " --gpu-mem a size for each"
        )
    if sizes is None and rate is None:
        sizes = free_gpu_memory(profile, console)
    machine = profile.first_ranks(len(sizes or [None]))
    output = Path(flags.output or default_output(flags, model, sizes, rate))
    for path in (output, flags.emit):
        if path is not None:
            require_writable(path)
    if flags.robust and not routing.sets:
        raise FiddlerError(
            "--robust needs a routing profile with sets of prompts; record one with `fiddler-opt"
            " profile --prompts`"
        )
    worst_of = tuple(routing.sets.values()) if flags.robust else ()
    made = provenance(machine_name, profile, routing.origin, flags.network)
    placer = by_rule(flags.baseline) if flags.baseline else None

    def solve(stored: ModelSpec, *gpu_bytes: int) -> Plan:
        budget = Budget(
            gpu_bytes=gpu_bytes[0], host_bytes=host_bytes, other_gpu_bytes=list(gpu_bytes[1:])
        )
        return compile_plan(stored, machine, routing, workload, budget, made, worst_of, placer)

    with console.status("solving"):
        plan = best(stored_models(flags, model, machine), machine, solve, sizes, rate)
        problem = Problem.of(plan, model, machine)
        plan = compared(plan, problem, routing)
    if flags.emit is not None:
        write_whole(flags.emit, integer_program(problem, routing, worst_of).text())
    named = plan.model.model_copy(update={"name": name_in_plan(flags.model, output)})
    plan = plan.model_copy(update={"model": named})
    plan.save(output)
    notes = plan_notes(plan, profile.in_encoding(plan.encoding), machine_name)
    shorter = shortened(workload) if flags.prompt_tokens is None else None
    print_plan(console, plan, [shorter, *notes] if shorter is not None else notes)
    print(output)


def best(
    models: list[ModelSpec],
    machine: MachineProfile,
    solve: Callable[..., Plan],
    sizes: list[int] | None,
    rate: float | None,
) -> Plan:
    """The best plan for the GPU bytes `sizes` of each rank, or the least memory for a decode rate.

    Args:
        models: the model in each encoding.
        solve: maps a model and the GPU bytes of each rank to a plan.
    """
    from fiddler_opt.solve.predict import workload_s

    if rate is None:
        return best_plan(models, lambda stored: solve(stored, *sizes), workload_s, machine)
    return best_plan(
        models,
        lambda stored: least_memory(partial(solve, stored), rate, machine.device.memory_bytes),
        lambda plan: (plan.budget.gpu_bytes, workload_s(plan)),
        machine,
    )


def default_output(
    flags: argparse.Namespace, model: ModelSpec, sizes: list[int] | None, rate: float | None
) -> str:
    """The file of a plan, named after the model and its GPU memory or target."""
    if flags.gpu_mem is not None:
        size = flags.gpu_mem.replace(",", "+")
    elif sizes is not None:
        size = "+".join(f"{free_bytes // 10**8 / 10:g}GB" for free_bytes in sizes)
    else:
        size = f"{rate:g}toks"
    return f"plans/{model.short_name}-{size}.yaml"


def free_gpu_memory(machine: MachineProfile, console: Console) -> list[int]:
    """The bytes that were free on the profiled GPU of each rank."""
    devices = [machine.device, *(rank.device for rank in machine.other_ranks)]
    found = [device.free_bytes if device.kind == "cuda" else 0 for device in devices]
    if not any(found):
        console.print(
            "no --gpu-mem, and the machine profile has no GPU: planning for the CPU alone"
        )
        return found
    sizes = " and ".join(map(format_bytes, found))
    names = " and ".join(device.name for device in devices)
    console.print(
        f"no --gpu-mem: planning for the {sizes} that, according to the machine profile, were free"
        f" on {names}"
    )
    return found
