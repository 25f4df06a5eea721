"""What-if: predicted speed over one quantity, without the hardware.

Everything else stays as profiled and as given. `scaling` makes the profile of a machine with
another link or other RAM. Each point is a complete plan.
"""

from rich.console import Console
from rich.table import Table

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.insight.scaling import memory_rate, ram_rate
from fiddler_opt.insight.sweep import Point, Row, Solve, points, sweep
from fiddler_opt.insight.sweep_flags import Quantity, WhatIf
from fiddler_opt.units import format_bytes, format_bytes_per_s
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Workload
from fiddler_run.system.files import require_writable


def run_whatif(
    asked: WhatIf,
    model: ModelSpec,
    machine: MachineProfile,
    workload: Workload,
    solve: Solve,
    plot_file: str | None,
    tables: Console,
) -> None:
    """Solves each point, prints the table to `tables`, and plots the curves if a file is given.

    Raises:
        FiddlerError: the machine lacks the swept quantity, no value has a plan, or the plot cannot
            be written.
    """
    if plot_file is not None:
        require_writable(plot_file)
    rows = sweep(points(asked, machine, workload), model, solve)
    setting = describe(asked, rows[0].point)
    tables.print(f"{model.short_name} on {machine.device.name}, {machine.cpu.name}; {setting}")
    print_rows(tables, asked.quantity, rows)
    tables.print(f"assumed: {assumption(asked, machine)}")
    if not any(row.plan for row in rows):
        raise FiddlerError(
            f"no value of {asked.quantity.flag} has a plan: {short(rows[-1].problem)}"
        )
    if plot_file is not None:
        from fiddler_opt.insight.plots import plot_curves

        title = f"{model.short_name} on {machine.device.name}, {machine.cpu.name}\n{setting}"
        plot_curves(rows, asked.quantity, profiled(asked.swept, machine), title, plot_file)


def print_rows(tables: Console, quantity: Quantity, rows: list[Row]) -> None:
    table = Table(quantity.title, "tokens/s", "first token", "GPU hit rate")
    for column in table.columns:
        column.justify = "right"
    if any(row.problem for row in rows):
        table.add_column("no plan")
    for row in rows:
        if row.plan is None:
            table.add_row(row.point.label, "-", "-", "-", short(row.problem))
        else:
            predicted = row.plan.predicted
            table.add_row(
                row.point.label,
                f"{predicted.decode_tokens_per_s:.2f}",
                f"{predicted.ttft_s:.2f} s",
                f"{predicted.gpu_hit_rate:.1%}",
            )
    tables.print(table)


def short(problem: str) -> str:
    """The fact in an error, without flag, details and advice, such as `5.48 GB is needed`."""
    return problem.split("; ")[0].split(" (")[0].split(": ")[-1]


def describe(asked: WhatIf, point: Point) -> str:
    """The quantities that all points share, in words."""
    work = point.workload
    given = asked.fixed
    parts = {
        "gpu_mem": f"{format_bytes(point.gpu_total_bytes)} GPU memory",
        "link": f"link {format_bytes_per_s(given['link'])}" if "link" in given else "",
        "ram": f"RAM {format_bytes_per_s(given['ram'])}" if "ram" in given else "",
        "ranks": f"{given['ranks']} ranks" if given.get("ranks", 1) > 1 else "",
        "prompt_tokens": f"{work.prompt_tokens} prompt tokens",
        "output_tokens": f"{work.output_tokens} output tokens",
        "max_seq_len": f"context {work.max_seq_len}",
        "num_beams": f"{work.num_beams} beams" if work.num_beams > 1 else "",
        "batch_size": f"{work.batch_size} sequences" if work.batch_size > 1 else "",
    }
    return ", ".join(words for key, words in parts.items() if words and key != asked.swept)


def assumption(asked: WhatIf, machine: MachineProfile) -> str:
    """The assumptions behind the predictions besides the profile, in one line."""
    rate = memory_rate(machine)
    cpu = format_bytes_per_s(ram_rate(machine))
    feeds = (
        f"at most {format_bytes_per_s(rate)}, as profiled,"
        if rate
        else "without a limit, because the profile saw none,"
    )
    reads = (
        f"{cpu} by the CPU alone and {format_bytes_per_s(rate)} with the link"
        if rate
        else f"{cpu} by the CPU"
    )
    assumed = {
        "gpu_mem": "a GPU as fast as the profiled one, regardless of its memory",
        "link": f"CPU and link together read {feeds} from RAM; computing takes as long as profiled",
        "ram": (
            f"reads from the profiled RAM, {reads}, scale with it; computing takes as long as"
            " profiled"
        ),
        "ranks": (
            "each rank has its own GPU, link and RAM, as fast as the profiled ones; they exchange"
            f" states over {asked.network}"
        ),
        "max_seq_len": (
            "a longer cache takes memory from the experts; attention takes as long as profiled"
        ),
    }
    supposed = [asked.swept, *(key for key in ("link", "ram", "ranks") if key in asked.fixed)]
    return (
        "; ".join(assumed[key] for key in supposed if key in assumed)
        or "times by numbers of tokens as profiled"
    )


def profiled(swept: str, machine: MachineProfile) -> float | None:
    """The profiled machine's own value. None if it has none."""
    return {
        "gpu_mem": machine.device.memory_bytes,
        "link": machine.h2d_bytes_per_s,
        "ram": ram_rate(machine),
    }.get(swept)
