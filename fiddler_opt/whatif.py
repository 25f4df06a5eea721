"""What-if: tokens/s and time to first token over one quantity, without the hardware. All else stays as profiled and as asked.

What another link or other RAM does to a machine's profile is scaling.py's to say; every point is then a whole plan, solved anew.
"""

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from fiddler_opt.machine import MachineProfile
from fiddler_opt.model import ModelSpec
from fiddler_opt.scaling import memory_rate, ram_rate, with_gpu_memory, with_rates
from fiddler_opt.sweep_flags import OF_WORKLOAD, Quantity, WhatIf
from fiddler_opt.units import format_bytes, format_bytes_per_s
from fiddler_run.errors import FiddlerError
from fiddler_run.files import require_writable
from fiddler_run.plan import Plan, Workload

Solve = Callable[[MachineProfile, Workload, int], Plan]  # the best plan on a machine, for a workload, in bytes of GPU memory


@dataclass(frozen=True)
class Point:
    """One value, and all that a plan for it is made from."""

    value: int
    label: str
    machine: MachineProfile
    workload: Workload
    gpu_total_bytes: int


@dataclass(frozen=True)
class Row:
    """A point's plan, or, where there is none, why not."""

    point: Point
    plan: Plan | None
    problem: str = ""


def points(asked: WhatIf, machine: MachineProfile, workload: Workload) -> list[Point]:
    """
    Raises:
        FiddlerError: GPU memory is asked for on a machine without a GPU, or a link where none copies experts.
    """
    made, on_gpu = [], machine.device.kind == "cuda"
    for value in asked.values:
        given = {**asked.fixed, asked.swept: value}
        gpu_bytes = given.get("gpu_mem", machine.device.memory_bytes if on_gpu else 0)
        if gpu_bytes and not on_gpu:
            raise FiddlerError("--gpu-mem: the machine profile has no GPU; vary --ram, or name another with --machine")
        supposed = machine
        if "link" in given or "ram" in given:
            supposed = with_rates(machine, given.get("link"), given.get("ram"))
        if asked.swept in OF_WORKLOAD:
            workload = workload.model_copy(update={asked.swept: value})
        made.append(Point(value, asked.quantity.show(value), with_gpu_memory(supposed, gpu_bytes), workload, gpu_bytes))
    return made


def sweep(points: list[Point], model: ModelSpec, solve: Solve) -> list[Row]:
    """Solves each point; those for which there is no plan say why."""
    rows = []
    for point in points:
        try:
            _require_context(point.workload, model)
            rows.append(Row(point, solve(point.machine, point.workload, point.gpu_total_bytes)))
        except FiddlerError as error:
            rows.append(Row(point, None, str(error)))
    return rows


def _require_context(workload: Workload, model: ModelSpec) -> None:
    tokens, context = workload.prompt_tokens + workload.output_tokens, workload.max_seq_len
    if context > model.max_position_embeddings:
        raise FiddlerError(f"the model's context ends at {model.max_position_embeddings} tokens")
    if tokens > context:
        raise FiddlerError(f"prompt and output take {tokens} tokens, the context has {context}; raise --context")


def run_whatif(
    asked: WhatIf,
    model: ModelSpec,
    machine: MachineProfile,
    workload: Workload,
    solve: Solve,
    plot_file: str | None,
    tables: Console,
) -> None:
    """Solves, prints the table to `tables`, and draws the curves if a file is named.

    Raises:
        FiddlerError: the machine lacks what is varied, there is a plan for no value, or the picture cannot be drawn.
    """
    if plot_file is not None:
        require_writable(plot_file)
    rows = sweep(points(asked, machine, workload), model, solve)
    setting = describe(asked, rows[0].point)
    tables.print(f"{model.short_name} on {machine.device.name}, {machine.cpu.name}; {setting}")
    print_rows(tables, asked.quantity, rows)
    tables.print(f"assumed: {assumption(asked, machine)}")
    if not any(row.plan for row in rows):
        raise FiddlerError(f"there is a plan for no value of {asked.quantity.flag}: {short(rows[-1].problem)}")
    if plot_file is not None:
        from fiddler_opt.plots import plot_curves

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
            told = row.plan.predicted
            table.add_row(row.point.label, f"{told.decode_tokens_per_s:.2f}", f"{told.ttft_s:.2f} s", f"{told.gpu_hit_rate:.1%}")
    tables.print(table)


def short(problem: str) -> str:
    """An error's fact, without the flag before it, the details and the way out: `5.48 GB are needed before any expert`."""
    return problem.split("; ")[0].split(" (")[0].split(": ")[-1]


def describe(asked: WhatIf, point: Point) -> str:
    """What stays the same from point to point."""
    work, given = point.workload, asked.fixed
    parts = {
        "gpu_mem": f"{format_bytes(point.gpu_total_bytes)} GPU memory",
        "link": f"link {format_bytes_per_s(given['link'])}" if "link" in given else "",
        "ram": f"RAM {format_bytes_per_s(given['ram'])}" if "ram" in given else "",
        "prompt_tokens": f"{work.prompt_tokens} prompt tokens",
        "output_tokens": f"{work.output_tokens} output tokens",
        "max_seq_len": f"context {work.max_seq_len}",
        "num_beams": f"{work.num_beams} beams" if work.num_beams > 1 else "",
        "batch_size": f"{work.batch_size} sequences" if work.batch_size > 1 else "",
    }
    return ", ".join(words for key, words in parts.items() if words and key != asked.swept)


def assumption(asked: WhatIf, machine: MachineProfile) -> str:
    """What the predictions rest on besides the profile, in a line."""
    rate, cpu = memory_rate(machine), format_bytes_per_s(ram_rate(machine))
    feeds = f"at most {format_bytes_per_s(rate)}, as profiled" if rate else "without a limit, for the profile saw none"
    reads = f"{cpu} by the CPU alone and {format_bytes_per_s(rate)} with the link" if rate else f"{cpu} by the CPU"
    assumed = {
        "gpu_mem": "a GPU as fast as the profiled one, whatever its memory",
        "link": f"the RAM feeds CPU and link together {feeds}; computing takes as long as profiled",
        "ram": f"what was read of the profiled RAM, {reads}, scales with it; computing takes as long as profiled",
        "max_seq_len": "a longer cache takes memory from the experts; attention takes as long as profiled",
    }
    supposed = [asked.swept, *(key for key in ("link", "ram") if key in asked.fixed)]
    return "; ".join(assumed[key] for key in supposed if key in assumed) or "times by numbers of tokens as profiled"


def profiled(swept: str, machine: MachineProfile) -> float | None:
    """The profiled machine's own value; None where it has none."""
    return {"gpu_mem": machine.device.memory_bytes, "link": machine.h2d_bytes_per_s, "ram": ram_rate(machine)}.get(swept)
