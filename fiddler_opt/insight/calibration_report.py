"""Prints a calibration in the terminal."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from fiddler_opt.insight.bench_result import Result
from fiddler_opt.insight.calibrate import MIN_GAIN, Calibration
from fiddler_opt.insight.table import table
from fiddler_run.plan.parts import PARTS
from fiddler_run.plan.schema import Plan


def print_calibration(
    console: Console, plan: Plan, result: Result, found: Calibration, output: Path
) -> None:
    """Prints the corrections, the speeds by the corrected profile, and whether to plan again."""
    corrections = table("microseconds", "mean tokens", "profile", "measured", "measured / profile")
    for each in found.corrections:
        cells = (
            f"{each.tokens:.4g}",
            f"{each.profile_us:.1f}",
            f"{each.measured_us:.1f}",
            f"{each.factor:.2f}",
        )
        corrections.add_row(PARTS[each.part], *cells)
    console.print(corrections)
    console.print(_speeds(plan, result, found))
    workload = plan.workload
    planned = (workload.prompt_tokens, workload.num_beams, workload.batch_size)
    if (result.measured.prompt_tokens, result.num_beams, result.batch_size) != planned:
        console.print("note: the measured workload is not the plan's", style="yellow")
    if found.another_wins:
        console.print(
            f"another plan would take {1 - found.best_s / found.now_s:.1%} less time: plan again"
            f" with --machine {output}"
        )
    else:
        console.print(f"no other plan would be {MIN_GAIN:.0%} faster: keep this one")


def _speeds(plan: Plan, result: Result, found: Calibration) -> Table:
    cost = found.cost
    rate = cost.decode_tokens_per_s(cost.decode_step_s(found.placement))
    decode = (plan.predicted.decode_tokens_per_s, result.measured.decode_tokens_per_s, rate)
    first = (plan.predicted.ttft_s, result.measured.ttft_s, cost.ttft_s(found.placement))
    speeds = table("", "the plan predicted", "measured", "according to the new profile")
    speeds.add_row("decode", *(f"{each:.2f} tokens/s" for each in decode))
    speeds.add_row("first token", *(f"{each:.3f} s" for each in first))
    return speeds
