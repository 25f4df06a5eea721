"""`fiddler-opt show`: prints a plan or a profile, or explains a plan."""

import argparse
from pathlib import Path

from rich.console import Console

from fiddler_opt.commands import flags as shared
from fiddler_opt.commands.files import tables
from fiddler_opt.insight.explain import marginal_values, print_marginal, print_times
from fiddler_opt.insight.lookup import break_even
from fiddler_opt.insight.plots import plot, require_matplotlib
from fiddler_opt.insight.report import print_file
from fiddler_opt.insight.sources import sources
from fiddler_opt.solve.comparison import policy_of
from fiddler_opt.solve.placement import placement_of
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan
from fiddler_run.system.files import require_writable
from fiddler_run.system.locate import shipped_file

HELP = "print a plan or a profile as tables, or explain a plan"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a plan, a machine profile or a routing profile")
    parser.add_argument(
        "--why",
        action="store_true",
        help="for a plan: where the time goes, what limits it, and the value of one more block",
    )
    shared.add_sources(parser)
    shared.add_plot(parser)


def run(flags: argparse.Namespace, console: Console) -> None:
    if (flags.machine or flags.routing) and not flags.why:
        raise FiddlerError("--machine and --routing need --why; add it or remove them")
    if flags.plot is not None:
        require_matplotlib()
        require_writable(flags.plot)
    path = shipped_file(flags.file)
    shown = print_file(tables(), path)
    if flags.why:
        if not isinstance(shown, Plan):
            raise FiddlerError(f"{path}: a {shown.kind}, but --why explains plans; remove it")
        explain(flags, console, shown, path)
    if flags.plot is not None:
        plot(shown, flags.plot)
        console.print(f"plot written to {flags.plot}")


def explain(flags: argparse.Namespace, console: Console, plan: Plan, path: Path) -> None:
    """Explains a plan. Without its source profiles, leaves out all that a cost model says."""
    print_times(tables(), plan)
    try:
        problem, routing = sources(plan, path, flags.machine, flags.routing)
    except FiddlerError as error:
        if flags.machine or flags.routing:
            raise
        console.print(f"note: marginal experts are left out: {error}", style="yellow")
        return
    placement = placement_of(plan)
    policy = policy_of(plan)
    if plan.workload.sequences == 1:
        tables().print(break_even(problem, routing, placement, policy).words)
    found = marginal_values(problem.cost(routing, policy), placement)
    print_marginal(tables(), found, plan.blocks_per_expert)
