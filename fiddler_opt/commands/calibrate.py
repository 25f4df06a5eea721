"""`fiddler-opt calibrate`: corrects a machine profile from a measured run."""

import argparse
from pathlib import Path

from rich.console import Console

from fiddler_opt.commands import flags as shared
from fiddler_opt.commands.files import command_line
from fiddler_opt.inputs.machine_ranks import JOINED_BY
from fiddler_run.encodings.table import plain_encoding
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan
from fiddler_run.system.files import require_writable
from fiddler_run.system.locate import shipped_file

HELP = "correct a machine profile from a measured run"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN", help="the plan that was run")
    parser.add_argument(
        "result",
        metavar="RESULT",
        help="the file that `fiddler-run --plan PLAN --bench --json RESULT` wrote",
    )
    shared.add_sources(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="profile to write (default: the old one's name with -calibrated, in profiles/)",
    )


def run(flags: argparse.Namespace, console: Console) -> None:
    from fiddler_opt.insight.bench_result import Result
    from fiddler_opt.insight.calibrate import calibrate
    from fiddler_opt.insight.calibration_report import print_calibration
    from fiddler_opt.insight.sources import sources

    path = shipped_file(flags.plan)
    plan = Plan.load(path)
    if len(plan.ranks) > 1:
        raise FiddlerError(
            f"{path}: a plan of {len(plan.ranks)} ranks; calibrate each machine with a plan of one"
        )
    result = Result.load(flags.result, plan)
    problem, routing = sources(plan, path, flags.machine, flags.routing)
    named = flags.machine or plan.provenance.machine.split(JOINED_BY)[0]
    old = Path(named).name.removesuffix(".machine.yaml")
    output = Path(flags.output or f"profiles/{old}-calibrated.machine.yaml")
    require_writable(output)
    with console.status("solving"):
        found = calibrate(plan, problem, routing, result, command_line())
    found.machine.in_encoding(plain_encoding(plan.model.dtype)).save(output)
    print_calibration(console, plan, result, found, output)
    print(output)
