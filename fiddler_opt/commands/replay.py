"""`fiddler-opt replay`: replays recorded routing against cache policies."""

import argparse
from pathlib import Path

from rich.console import Console

from fiddler_opt.commands import flags as shared
from fiddler_opt.commands.files import tables
from fiddler_opt.units import parse_count, parse_values
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan
from fiddler_run.system.files import require_writable
from fiddler_run.system.locate import shipped_file

HELP = "replay recorded routing against cache policies for a plan's resident blocks"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN", help="a plan")
    parser.add_argument(
        "trace",
        metavar="TRACE",
        nargs="?",
        help="the file that `fiddler-opt profile --prompts ... --trace TRACE` wrote",
    )
    parser.add_argument(
        "--synthetic",
        metavar="SKEW,REPEAT",
        help=(
            "instead of a trace: random routing in which popularity falls as rank ** -SKEW, and a"
            " fraction REPEAT of tokens choose an expert of the token before, e.g. 0.5,0.6"
        ),
    )
    parser.add_argument(
        "--tail",
        metavar="EXPERTS",
        default="1,2",
        help=(
            "sizes of dynamic tails, in experts a layer: a number, a list or a range (default:"
            " %(default)s)"
        ),
    )
    shared.add_sources(parser)
    shared.add_plot(parser)


def run(flags: argparse.Namespace, console: Console) -> None:
    from fiddler_opt.insight.plots import require_matplotlib
    from fiddler_opt.insight.replay import replay, require_replayable
    from fiddler_opt.insight.replay_report import plot_replay, print_replay
    from fiddler_opt.insight.sources import sources
    from fiddler_opt.insight.synthetic import Synthetic
    from fiddler_opt.measure.trace import RoutingTrace

    if (flags.trace is None) == (flags.synthetic is None):
        raise FiddlerError("give either a TRACE or --synthetic SKEW,REPEAT")
    slots = parse_values(flags.tail, "--tail", parse_count)
    if flags.plot is not None:
        require_matplotlib()
        require_writable(flags.plot)
    path = shipped_file(flags.plan)
    plan = Plan.load(path)
    require_replayable(plan, path)
    problem, routing = sources(plan, path, flags.machine, flags.routing)
    with console.status("replaying"):
        if flags.synthetic is None:
            trace = RoutingTrace.load(flags.trace)
            origin = Path(flags.trace).name
        else:
            trace = Synthetic.parse(flags.synthetic, "--synthetic").trace(plan)
            origin = f"synthetic routing {flags.synthetic}"
        found = replay(plan, problem, routing, trace, slots)
    title = (
        f"{problem.model.short_name}, {origin}: {int(trace.decode.sum())} decoded tokens,"
        f" {plan.rank.num_resident_blocks} resident blocks of {plan.blocks_per_expert} an expert"
    )
    if plan.rank.device != "cuda":
        console.print(
            "note: the plan is for a machine without a GPU, where the CPU computes all blocks: no"
            " policy changes the speed",
            style="yellow",
        )
    tables().print(title)
    print_replay(tables(), found)
    if flags.plot is not None:
        plot_replay(found, title, flags.plot)
        console.print(f"plot written to {flags.plot}")
