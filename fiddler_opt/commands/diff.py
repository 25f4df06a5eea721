"""`fiddler-opt diff`: prints the differences between two plans."""

import argparse

from rich.console import Console

from fiddler_opt.commands.files import tables
from fiddler_opt.insight.compare import compare
from fiddler_opt.insight.compare_report import print_comparison
from fiddler_run.plan.schema import Plan
from fiddler_run.system.locate import shipped_file

HELP = "print the differences between two plans"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="FIRST", help="a plan")
    parser.add_argument("second", metavar="SECOND", help="the plan to compare it with")


def run(flags: argparse.Namespace, console: Console) -> None:
    first = Plan.load(shipped_file(flags.first))
    second = Plan.load(shipped_file(flags.second))
    print_comparison(tables(), compare(first, second))
