"""`fiddler-opt export`: writes the nearest plan that another program can run."""

import argparse

from rich.console import Console

from fiddler_opt.commands import flags as shared
from fiddler_opt.insight.expert_modules import expert_layers, num_decoder_layers
from fiddler_opt.insight.export import TARGETS, Source, frequencies
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan
from fiddler_run.system.files import require_writable, write_whole
from fiddler_run.system.locate import shipped_file

HELP = "write the nearest plan that another program can run"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN", help="a plan")
    parser.add_argument(
        "--to",
        choices=TARGETS,
        required=True,
        help="llama.cpp and ktransformers: flags; accelerate: a device_map in JSON",
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="write the result to a file and print its name"
    )
    parser.add_argument(
        "--counts",
        metavar="FILE",
        help=(
            "with --to ktransformers: also write how often experts are called, a .pt file by which"
            " it chooses the experts for the GPU (default: the first ones of each layer)"
        ),
    )
    shared.add_sources(parser)


def run(flags: argparse.Namespace, console: Console) -> None:
    from fiddler_opt.insight.export_report import print_export
    from fiddler_opt.insight.sources import sources

    if flags.counts is not None:
        if flags.to != "ktransformers":
            raise FiddlerError(f"--counts is for --to ktransformers, not {flags.to}; remove it")
        if not flags.counts.endswith(".pt"):
            raise FiddlerError(f"--counts {flags.counts}: ktransformers needs a name in .pt")
    for path in (flags.output, flags.counts):
        if path is not None:
            require_writable(path)
    path = shipped_file(flags.plan)
    plan = Plan.load(path)
    problem, routing = sources(plan, path, flags.machine, flags.routing)
    try:
        source = Source.of(plan, problem, routing, flags.counts)
    except FiddlerError as error:
        raise FiddlerError(f"{path}: {error}") from None
    with console.status("placing"):
        export = TARGETS[flags.to](source)
    if flags.counts is not None:
        with console.status("importing torch"):
            from fiddler_opt.measure.expert_counts import save_expert_counts

        layers = expert_layers(problem)
        save_expert_counts(frequencies(routing), layers, num_decoder_layers(problem), flags.counts)
    print_export(console, source, export, flags.to)
    if flags.output is not None:
        write_whole(flags.output, export.text + "\n")
    print(export.text if flags.output is None else flags.output)
