"""fiddler-opt: flags in, stages called, result printed. Files' paths go to stdout, everything else to stderr."""

import argparse
import hashlib
import shlex
import sys
from datetime import date
from pathlib import Path

from rich.console import Console

from fiddler_opt.baselines import BASELINES
from fiddler_opt.compare import compare, print_comparison
from fiddler_opt.explain import placement_of, print_explanation, print_worths, sources, worths
from fiddler_opt.machine import MachineProfile
from fiddler_opt.model import DEFAULT_MODEL, ModelSpec
from fiddler_opt.problem import Budget
from fiddler_opt.report import plan_notes, print_file, print_machine, print_plan, print_routing
from fiddler_opt.routing import Routing, RoutingProfile
from fiddler_opt.sweep_flags import add_whatif_flags, parse_whatif
from fiddler_opt.target import least_memory, parse_rate
from fiddler_opt.units import parse_bytes
from fiddler_run.cli import positive
from fiddler_run.command import exit_status
from fiddler_run.errors import FiddlerError
from fiddler_run.files import cannot_read, is_file, is_folder, require_writable
from fiddler_run.locate import name_in_plan, shipped_file
from fiddler_run.plan import Plan, Workload

WORKLOAD = {"prompt_tokens": 512, "output_tokens": 128, "num_beams": 1, "batch_size": 1, "max_seq_len": 4096}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fiddler-opt", description="Plan how to run a Mixture-of-Experts model on this machine.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    profile = commands.add_parser("profile", help="time this machine, and record how a model routes tokens")
    profile.set_defaults(command=run_profile)
    _add_profile_flags(profile)

    plan = commands.add_parser("plan", help="solve for the best placement within a GPU memory budget")
    plan.set_defaults(command=run_plan)
    _add_plan_flags(plan)

    show = commands.add_parser("show", help="print a profile or a plan as tables")
    show.set_defaults(command=run_show)
    show.add_argument("file", help="a plan, a machine profile or a routing profile")
    show.add_argument("--plot", metavar="FILE", help="draw it as well, into a .png, .svg or .pdf (needs the extra `plots`)")

    whatif = commands.add_parser("whatif", help="predict over a range of GPU memory, link or RAM speed, context or beams")
    whatif.set_defaults(command=run_whatif_command)
    _add_common(whatif)
    _add_profiles_used(whatif)
    add_whatif_flags(whatif)

    explain = commands.add_parser("explain", help="say where a plan's bytes and milliseconds go, and why")
    explain.set_defaults(command=run_explain)
    explain.add_argument("plan", metavar="PLAN")
    _add_sources(explain)

    check = commands.add_parser("check", help="say everything that keeps a plan from running here")
    check.set_defaults(command=run_check)
    check.add_argument("plan", metavar="PLAN")
    check.add_argument("--model", help="checkpoint folder or Hugging Face id (default: the one that the plan names)")

    diff = commands.add_parser("diff", help="say what differs between two plans, and what it gains")
    diff.set_defaults(command=run_diff)
    diff.add_argument("first", metavar="PLAN")
    diff.add_argument("second", metavar="PLAN")

    calibrate = commands.add_parser("calibrate", help="correct a machine profile by what a plan's run measured")
    calibrate.set_defaults(command=run_calibrate)
    calibrate.add_argument("plan", metavar="PLAN")
    calibrate.add_argument("result", metavar="RESULT", help="what `fiddler-run --plan PLAN --bench --json RESULT` wrote")
    _add_sources(calibrate)
    calibrate.add_argument(
        "-o", "--output", metavar="FILE", help="profile to write (default: profiles/OLD-calibrated.machine.yaml)"
    )

    doctor = commands.add_parser("doctor", help="say what limits this machine, and what to do about it")
    doctor.set_defaults(command=run_doctor)
    _add_common(doctor)
    return parser.parse_args(arguments)


def _add_profile_flags(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument(
        "--prompts",
        nargs="+",
        metavar="FILE",
        help="sets of prompts to record routing on: text files with one a line, .jsonl or .json files, folders of Hugging Face "
        "datasets (default: all that the folder `prompts` in the model's holds)",
    )
    parser.add_argument(
        "--output-tokens",
        type=positive,
        default=32,
        metavar="N",
        help="tokens to generate after each prompt, to record decode (default: %(default)s)",
    )
    parser.add_argument("--plan", metavar="FILE", help="run the prompts by this plan (default: on the CPU alone)")
    parser.add_argument("--trace", metavar="FILE", help="write which experts each token chose as well, an .npz for numpy")
    parser.add_argument(
        "--only",
        choices=["machine", "routing"],
        help="do one half; routing then needs --plan, or a machine profile that was made before",
    )
    parser.add_argument("--quick", action="store_true", help="time fewer figures, for less long, in less memory")
    parser.add_argument("--force", action="store_true", help="time this machine also while other programs use it")


def _add_plan_flags(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--gpu-mem", metavar="SIZE", help="GPU memory to use, such as 24GB; 0GB plans for the CPU alone")
    budget.add_argument("--target", metavar="RATE", help="instead: as little GPU memory as decodes so fast, such as 6tok/s")
    parser.add_argument(
        "--host-mem", metavar="SIZE", help="host memory for experts; what exceeds it lies on disk (default: as much as they need)"
    )
    _add_profiles_used(parser)
    for key, default in WORKLOAD.items():
        words = key.replace("_", " ").replace("max seq len", "longest prompt + output, in tokens,")
        parser.add_argument(
            f"--{key.replace('_', '-')}", type=positive, metavar="N", help=f"{words} to plan for (default: {default})"
        )
    parser.add_argument("-o", "--output", metavar="FILE", help="plan to write (default: plans/MODEL-SIZE.yaml)")
    parser.add_argument(
        "--robust", action="store_true", help="plan for that set of prompts of the routing profile for which the plan is worst"
    )
    parser.add_argument("--baseline", choices=BASELINES, help="write the plan of a rule of thumb instead, to compare with")
    parser.add_argument("--emit", metavar="FILE", help="write the integer program as well, in the LP format")


def _add_profiles_used(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--machine", metavar="FILE", help="machine profile (default: local.machine.yaml in --profiles)")
    parser.add_argument(
        "--routing", metavar="FILE", help="routing profile (default: the model's in --profiles, else uniform routing)"
    )


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--machine", metavar="FILE", help="machine profile it was made from (default: where the plan says)")
    parser.add_argument("--routing", metavar="FILE", help="routing profile it was made from (default: where the plan says)")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=DEFAULT_MODEL, help="checkpoint folder or Hugging Face id (default: %(default)s)")
    parser.add_argument("--profiles", default="profiles", metavar="DIR", help="folder of profiles (default: %(default)s)")


def main(arguments: list[str] | None = None) -> int:
    def command():
        flags = parse_arguments(arguments)
        flags.command(flags, Console(stderr=True, highlight=False, soft_wrap=True, markup=False))

    return exit_status(command, "fiddler-opt")


def run_profile(flags: argparse.Namespace, console: Console) -> None:
    from fiddler_opt.profiling import cpu_plan, profile_machine, profile_routing, routing_job

    model = load_spec(flags.model, console)
    machine_path, routing_path, prompts = machine_file(flags), routing_file(flags, model), prompts_files(flags)
    runs_by = Plan.load(shipped_file(flags.plan)) if flags.plan else None
    # All that could be wrong is found before the minutes of timing.
    machine = MachineProfile.load(machine_path) if flags.only == "routing" and runs_by is None else None
    for path in (machine_path, routing_path, flags.trace):
        if path is not None:
            require_writable(path)
    context = min([model.max_position_embeddings, *([runs_by.workload.max_seq_len] if runs_by else [])])
    job = routing_job(model, flags.model, prompts, flags.output_tokens, context) if prompts else None

    if flags.only != "routing":
        folder = Path(flags.model) if is_folder(flags.model) else None
        machine = profile_machine(model, machine_path, flags.quick, flags.force, folder, command_line(), console)
        print_machine(console, machine)
        print(machine_path, flush=True)
    if job is not None:
        plan = runs_by or cpu_plan(model, machine, context, provenance(str(machine_path), machine, "uniform (assumed)"))
        trace = flags.trace and Path(flags.trace)
        routing = profile_routing(job, flags.model, plan, routing_path, trace, command_line(), console)
        print_routing(console, routing)
        print(routing_path)
    elif flags.only is None:
        console.print("note: no --prompts: routing was not recorded, plans will assume it is uniform", style="yellow")


def run_whatif_command(flags: argparse.Namespace, console: Console) -> None:
    from fiddler_opt.compiler import compile_plan
    from fiddler_opt.whatif import run_whatif

    asked, model = parse_whatif(flags), load_spec(flags.model, console)
    workload = plan_workload(asked.workload_flags(), model)
    machine, path = load_machine(flags)
    routing = load_routing(flags, model)
    made = provenance(str(path), machine, routing.origin)

    def solve(machine: MachineProfile, workload: Workload, gpu_bytes: int) -> Plan:
        return compile_plan(model, machine, routing, workload, Budget(gpu_bytes), made)

    with console.status("solving"):
        run_whatif(asked, model, machine, workload, solve, flags.plot, tables())


def run_explain(flags: argparse.Namespace, console: Console) -> None:
    path = shipped_file(flags.plan)
    plan, out = Plan.load(path), tables()
    print_explanation(out, plan)
    try:
        problem, routing = sources(plan, path, flags.machine, flags.routing)
    except FiddlerError as error:
        if flags.machine or flags.routing:
            raise
        console.print(f"note: what each expert is worth is left out: {error}", style="yellow")
        return
    print_worths(out, worths(problem.cost(routing), placement_of(plan)), plan.blocks_per_expert)


def run_calibrate(flags: argparse.Namespace, console: Console) -> None:
    from fiddler_opt.calibrate import Result, calibrate, print_calibration

    path = shipped_file(flags.plan)
    plan = Plan.load(path)
    result = Result.load(flags.result, plan)
    problem, routing = sources(plan, path, flags.machine, flags.routing)
    old = Path(flags.machine or plan.provenance.machine).name.removesuffix(".machine.yaml")
    output = Path(flags.output or f"profiles/{old}-calibrated.machine.yaml")
    require_writable(output)
    with console.status("solving"):
        found = calibrate(plan, problem, routing, result, command_line())
    found.machine.save(output)
    print_calibration(console, plan, result, found, output)
    print(output)


def run_check(flags: argparse.Namespace, console: Console) -> None:
    from fiddler_run.check import check_plan
    from fiddler_run.model_check import NOT_HERE

    path = shipped_file(flags.plan)
    with console.status("checking"):
        problems, notes = check_plan(path, flags.model)
    for problem in problems:
        tables().print(problem)
    for note in notes:
        console.print(f"note: {note}", style="yellow")
    if problems:
        raise FiddlerError(
            f"{path}: cannot run here: {len(problems)} {'problem' if len(problems) == 1 else 'problems'}, listed above"
        )
    only_config = any(NOT_HERE in note for note in notes)
    model = "its model's config.json" if only_config else "its model"
    tables().print(f"{path} fits {model} and this machine")


def run_diff(flags: argparse.Namespace, console: Console) -> None:
    print_comparison(tables(), compare(*(Plan.load(shipped_file(path)) for path in (flags.first, flags.second))))


def run_doctor(flags: argparse.Namespace, console: Console) -> None:
    from fiddler_opt.doctor import examine, print_findings, stops

    path = machine_file(flags)
    model = load_spec(flags.model, console)
    machine = MachineProfile.load(path) if is_file(path) else None
    with console.status("looking at this machine"):
        findings = examine(model, machine)
    print_findings(tables(), findings)
    if stops(findings):
        raise FiddlerError(f"{model.shape.name} cannot run here; what stops it is listed first")


def run_plan(flags: argparse.Namespace, console: Console) -> None:
    from fiddler_opt.compiler import compile_plan

    total = None if flags.gpu_mem is None else parse_bytes(flags.gpu_mem, "--gpu-mem")
    rate = None if flags.target is None else parse_rate(flags.target)
    host_bytes = None if flags.host_mem is None else parse_bytes(flags.host_mem, "--host-mem")
    model = load_spec(flags.model, console)
    size = flags.gpu_mem or f"{rate:g}toks"
    output = Path(flags.output or f"plans/{model.short_name}-{size}.yaml")
    workload = plan_workload(flags, model)
    machine, machine_path = load_machine(flags)
    routing = load_routing(flags, model)
    for path in (output, flags.emit):
        if path is not None:
            require_writable(path)

    def solve(gpu_bytes: int) -> Plan:
        made = provenance(str(machine_path), machine, routing.origin)
        budget = Budget(gpu_bytes, host_bytes)
        return compile_plan(model, machine, routing, workload, budget, made, flags.robust, flags.baseline, flags.emit)

    with console.status("solving"):
        plan = solve(total) if rate is None else least_memory(solve, rate, machine.device.memory_bytes)
    named = plan.model.model_copy(update={"name": name_in_plan(flags.model, output)})
    plan = plan.model_copy(update={"model": named})
    plan.save(output)
    print_plan(console, plan, plan_notes(plan, machine, str(machine_path)))
    print(output)


def tables() -> Console:
    """On stdout: for commands whose tables are what was asked for."""
    return Console(highlight=False, soft_wrap=True, markup=False)


def run_show(flags: argparse.Namespace, console: Console) -> None:
    if flags.plot is not None:
        require_writable(flags.plot)
    shown = print_file(tables(), str(shipped_file(flags.file)))
    if flags.plot is not None:
        from fiddler_opt.plots import plot

        plot(shown, flags.plot)
        console.print(f"drawn: {flags.plot}")


def load_spec(name: str, console: Console) -> ModelSpec:
    """The model of that name; says what was assumed of it."""
    model = ModelSpec.load(name)
    if model.note is not None:
        console.print(f"note: {model.note}", style="yellow")
    return model


def plan_workload(flags: argparse.Namespace, model: ModelSpec) -> Workload:
    """The flags' workload. What is not given adapts to the model's context; what is given must fit."""
    given = {key: getattr(flags, key) for key in WORKLOAD if getattr(flags, key) is not None}
    context = min(given.get("max_seq_len", WORKLOAD["max_seq_len"]), model.max_position_embeddings)
    if given.get("max_seq_len", 0) > model.max_position_embeddings:
        raise FiddlerError(f"--max-seq-len {given['max_seq_len']} is more than the model's {model.max_position_embeddings}")
    prompt = given.get("prompt_tokens", max(1, min(WORKLOAD["prompt_tokens"], context // 2)))
    output = given.get("output_tokens", max(1, min(WORKLOAD["output_tokens"], context // 2)))
    if prompt + output > context:
        raise FiddlerError(
            f"--prompt-tokens {prompt} and --output-tokens {output} exceed --max-seq-len {context}; lower them or raise it"
        )
    beams, batch = (given.get(key, WORKLOAD[key]) for key in ("num_beams", "batch_size"))
    return Workload(prompt_tokens=prompt, output_tokens=output, num_beams=beams, batch_size=batch, max_seq_len=context)


def load_machine(flags: argparse.Namespace) -> tuple[MachineProfile, Path]:
    path = machine_file(flags)
    if not is_file(path):
        raise FiddlerError(f"{path}: no such machine profile; run `fiddler-opt profile` first, or name one with --machine")
    return MachineProfile.load(path), path


def load_routing(flags: argparse.Namespace, model: ModelSpec) -> Routing:
    path = routing_file(flags, model) if flags.routing is None else shipped_file(flags.routing)
    if flags.routing is None and not is_file(path):
        return Routing.uniform(model)
    return Routing.from_profile(RoutingProfile.load(path), model, str(path))


def machine_file(flags: argparse.Namespace) -> Path:
    named = getattr(flags, "machine", None)
    return shipped_file(named) if named else Path(flags.profiles) / "local.machine.yaml"


def routing_file(flags: argparse.Namespace, model: ModelSpec) -> Path:
    return Path(flags.profiles) / f"{model.short_name}.routing.yaml"


def prompts_files(flags: argparse.Namespace) -> list[Path]:
    """The sets of prompts to record routing on; none if it is not to be recorded.

    Raises:
        FiddlerError: --only asks for what the other flags exclude.
    """
    if flags.only == "machine":
        if flags.prompts or flags.plan or flags.trace:
            raise FiddlerError("--only machine records no routing; leave --prompts, --plan and --trace out")
        return []
    if flags.prompts:
        return [Path(name) for name in flags.prompts]
    folder = Path(flags.model) / "prompts"
    if is_folder(folder):
        try:
            beside_model = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        except OSError as error:
            raise cannot_read(folder, error) from None
        if beside_model:
            return beside_model
    if flags.only == "routing" or flags.plan or flags.trace:
        raise FiddlerError("recording routing needs --prompts FILE: the model's folder has no folder `prompts`")
    return []


def provenance(machine_path: str, machine: MachineProfile, routing: str) -> dict[str, str]:
    return {
        "command": command_line(),
        "machine": machine_path,
        "machine_sha256": hashlib.sha256(machine.dump().encode()).hexdigest(),
        "machine_source": machine.source,
        "routing": routing,
        "created": date.today().isoformat(),
    }


def command_line() -> str:
    return shlex.join(["fiddler-opt", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
