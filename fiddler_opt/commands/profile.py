"""`fiddler-opt profile`: times this machine and records a model's routing."""

import argparse
from pathlib import Path

from rich.console import Console

from fiddler_opt.commands import flags as shared
from fiddler_opt.commands.files import (
    command_line,
    load_spec,
    machine_file,
    provenance,
    routing_file,
)
from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import model_file
from fiddler_opt.inputs.model_file import file_name
from fiddler_opt.inputs.routing import ASSUMED
from fiddler_opt.insight.machine_report import print_machine
from fiddler_opt.insight.routing_report import print_routing
from fiddler_opt.measure.unfinished import forget_unfinished
from fiddler_run.errors import FiddlerError
from fiddler_run.flag_types import positive
from fiddler_run.plan.schema import Plan
from fiddler_run.system.files import cannot_read, is_folder, require_writable
from fiddler_run.system.locate import shipped_file
from fiddler_run.weights.model_folder import local_folder

HELP = "time this machine and record how a model routes tokens"


def add_flags(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    parser.add_argument(
        "--prompts",
        nargs="+",
        metavar="FILE",
        help=(
            "sets of prompts to record routing on: text files with one prompt per line, .jsonl or"
            " .json files, folders of Hugging Face datasets (default: everything in the folder"
            " `prompts` next to the model)"
        ),
    )
    parser.add_argument(
        "--output-tokens",
        type=positive,
        default=32,
        metavar="N",
        help="tokens to generate after each prompt, to record decode (default: %(default)s)",
    )
    parser.add_argument(
        "--plan",
        metavar="FILE",
        help="plan to run the prompts with (default: one for the CPU alone)",
    )
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="also write which experts each token chose, as an .npz for numpy",
    )
    parser.add_argument(
        "--only",
        choices=["model", "machine", "routing"],
        help=(
            "only one part: `model` writes the sizes of any model in seconds, `routing` needs"
            " --plan or an existing machine profile"
        ),
    )
    parser.add_argument(
        "--quick", action="store_true", help="take fewer and shorter measurements, in less memory"
    )
    parser.add_argument(
        "--ranks",
        type=positive,
        default=1,
        metavar="N",
        help=(
            "time N processes at once, each with a GPU of its own and its part of the cores, for"
            " plans that use several GPUs (default: %(default)s)"
        ),
    )
    parser.add_argument("--force", action="store_true", help="measure even if the machine is busy")


def run(flags: argparse.Namespace, console: Console) -> None:
    """Checks every input before the minutes of timing, then runs the requested parts."""
    if flags.only == "model":
        write_model_file(flags, console)
    else:
        profile(flags, console)


def write_model_file(flags: argparse.Namespace, console: Console) -> None:
    """Writes the model's sizes, with which `plan` needs neither transformers nor torch."""
    prompts_files(flags)
    model = load_spec(flags.model, console)
    path = Path(flags.profiles) / file_name(model.shape.name)
    require_writable(path)
    model_file(model, command_line()).save(path)
    print(path)


def profile(flags: argparse.Namespace, console: Console) -> None:
    """Times the machine, records the routing, or both."""
    from fiddler_opt.measure.profiling import (
        cpu_plan,
        profile_machine,
        profile_routing,
        routing_job,
    )

    model = load_spec(flags.model, console)
    machine_path = machine_file(flags)
    routing_path = routing_file(flags, model)
    prompts = prompts_files(flags)
    runs_by = Plan.load(shipped_file(flags.plan)) if flags.plan else None
    machine = None
    if flags.only == "routing" and runs_by is None:
        machine = MachineProfile.load(machine_path)
    for path in (machine_path, routing_path, flags.trace):
        if path is not None:
            require_writable(path)
    context = model.max_position_embeddings
    if runs_by is not None:
        context = min(context, runs_by.workload.max_seq_len)
    job = None
    if prompts:
        job = routing_job(model, flags.model, prompts, flags.output_tokens, context)

    if flags.only != "routing":
        folder = local_folder(flags.model, Path())
        machine = profile_machine(
            model,
            machine_path,
            flags.quick,
            flags.force,
            folder,
            command_line(),
            console,
            keep_parts=job is not None,
            num_ranks=flags.ranks,
        )
        print_machine(console, machine)
        print(machine_path, flush=True)
    if job is not None:
        if runs_by is None:
            made = provenance(str(machine_path), machine, ASSUMED)
            runs_by = cpu_plan(model, machine, context, made)
        trace = flags.trace and Path(flags.trace)
        routing = profile_routing(
            job, flags.model, runs_by, routing_path, trace, command_line(), console
        )
        forget_unfinished(machine_path)
        print_routing(console, routing)
        print(routing_path)
    elif flags.only is None:
        console.print(
            "note: no --prompts, so routing was not recorded; plans will assume uniform routing",
            style="yellow",
        )


def prompts_files(flags: argparse.Namespace) -> list[Path]:
    """The sets of prompts to record routing on. Empty if routing is not recorded.

    Raises:
        FiddlerError: --only contradicts the other flags.
    """
    if flags.only in ("model", "routing") and (flags.quick or flags.ranks > 1):
        raise FiddlerError(
            f"--only {flags.only} does not time the machine; remove --quick and --ranks"
        )
    if flags.only in ("model", "machine"):
        if flags.prompts or flags.plan or flags.trace:
            raise FiddlerError(
                f"--only {flags.only} does not record routing; remove --prompts, --plan and --trace"
            )
        return []
    if flags.prompts:
        return [Path(name) for name in flags.prompts]
    folder = (local_folder(flags.model, Path()) or Path(flags.model)) / "prompts"
    if is_folder(folder):
        try:
            beside_model = sorted(
                path for path in folder.iterdir() if not path.name.startswith(".")
            )
        except OSError as error:
            raise cannot_read(folder, error) from None
        if beside_model:
            return beside_model
    if flags.only == "routing" or flags.plan or flags.trace:
        raise FiddlerError(
            "recording routing needs --prompts FILE: the model's folder has no folder `prompts`"
        )
    return []
