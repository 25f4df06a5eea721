"""Tables for the terminal."""

import re

from rich.console import Console
from rich.table import Table

from fiddler_opt.machine import MachineProfile
from fiddler_opt.routing import RoutingProfile
from fiddler_opt.units import format_bytes
from fiddler_run.errors import FiddlerError
from fiddler_run.plan import Plan
from fiddler_run.yaml_file import read_text


def print_machine(console: Console, machine: MachineProfile) -> None:
    """Rates of one expert's weights, by tokens; without a GPU the CPU's are all there is."""
    gpu = machine.device.kind == "cuda"
    console.print(f"{machine.cpu.name}: {machine.cpu.threads} of {machine.cpu.cores} cores used; device: {machine.device.name}")
    table = _table("tokens of an expert", "CPU", *(("GPU", "CPU + link", "sent over the link") if gpu else ()))
    for tokens in machine.absent_expert_us if gpu else machine.cpu_expert_us:
        row = [str(tokens), _rate(machine, machine.cpu_expert_us.get(tokens))]
        if gpu:
            row += [_rate(machine, times.get(tokens)) for times in (machine.device_expert_us, machine.absent_expert_us)]
            row.append(f"{machine.stream_share.get(tokens, 0):.0%}")
        table.add_row(*row)
    console.print(table)
    if machine.h2d_bytes_per_s:
        console.print(f"link: {format_bytes(machine.h2d_bytes_per_s)}/s from page-locked memory")


def print_routing(console: Console, routing: RoutingProfile) -> None:
    recorded, top = routing.recorded, max(1, routing.model.num_experts // 4)
    table = _table("layer", "busiest experts, their part of all choices")
    for layer, row in routing.activations.items():
        order = sorted(range(len(row)), key=lambda e: -row[e])[:top]
        table.add_row(str(layer), ", ".join(f"{e} ({row[e] / sum(row):.0%})" for e in order))
    even = 1 / routing.model.num_experts
    console.print(
        f"{recorded.num_prompts} prompts of {recorded.prompts}, {recorded.tokens} tokens; even routing would be {even:.0%} each"
    )
    console.print(table)


def print_file(console: Console, path: str) -> Plan | MachineProfile | RoutingProfile:
    """Prints any file that fiddler-opt writes, and returns what is in it.

    Raises:
        FiddlerError: it cannot be read, or is none of them.
    """
    text = read_text(path)
    kinds = {"resident_blocks": Plan, "cpu_expert_us": MachineProfile, "activations": RoutingProfile}
    kind = next((kind for key, kind in kinds.items() if re.search(rf"^{key}:", text, re.MULTILINE)), None)
    if kind is None:
        raise FiddlerError(f"{path}: neither a plan nor a profile; give a file that `fiddler-opt` wrote")
    shown = kind.parse(text, path)
    if isinstance(shown, Plan):
        print_plan(console, shown, [])
        print_placement(console, shown)
    elif isinstance(shown, MachineProfile):
        print_machine(console, shown)
        made = shown.provenance
        console.print(f"made on {made.created} by `{made.command}` ({made.software}; {shown.source})")
    else:
        print_routing(console, shown)
        console.print(f"made on {shown.recorded.created} by `{shown.recorded.command}`")
    return shown


def print_placement(console: Console, plan: Plan) -> None:
    table = _table("layer", *map(str, range(plan.model.num_experts)))
    for layer, row in plan.resident_blocks.items():
        table.add_row(str(layer), *(str(count) if count else "·" for count in row))
    console.print(f"blocks in GPU memory by expert, of {plan.blocks_per_expert} each:")
    console.print(table)
    made = plan.provenance
    console.print(f"made on {made.created} by `{made.command}`, from {made.machine} and {made.routing}")


def print_plan(console: Console, plan: Plan, notes: list[str]) -> None:
    gpu, predicted = plan.gpu_memory_bytes, plan.predicted
    memory = _table("GPU memory", "bytes", "")
    for purpose, size in gpu.parts().items():
        memory.add_row(purpose.replace("_", " "), f"{size:,}", format_bytes(size))
    memory.add_row("free", f"{gpu.total - gpu.used:,}", format_bytes(gpu.total - gpu.used))
    memory.add_row("total", f"{gpu.total:,}", format_bytes(gpu.total), style="bold")
    console.print(memory)

    blocks = plan.num_resident_blocks + plan.num_absent_blocks
    whole = plan.num_resident_blocks / plan.blocks_per_expert
    console.print(
        f"experts: {plan.num_resident_blocks} of {blocks} blocks on the GPU (as much as {whole:.1f} experts), "
        f"{format_bytes(plan.host_memory_bytes.experts)} in host memory"
    )
    console.print(
        f"predicted for {plan.workload.prompt_tokens} prompt + {plan.workload.output_tokens} output tokens: "
        f"{predicted.decode_tokens_per_s:.2f} tokens/s, first token after {predicted.ttft_s:.2f} s, "
        f"GPU hit rate {predicted.gpu_hit_rate:.1%}"
    )
    console.print(
        f"solver: {plan.provenance.status} in {plan.provenance.solve_s:.1f} s, within {predicted.gap:.3%} of the best possible; "
        f"by this profile no placement in this memory decodes faster than {predicted.bound_tokens_per_s:.2f} tokens/s"
    )
    for note in notes:
        console.print(f"note: {note}", style="yellow")


def plan_notes(plan: Plan, machine: MachineProfile, machine_file: str) -> list[str]:
    """What a reader of the predictions should know about their ground."""
    notes = []
    if plan.provenance.routing.startswith("uniform"):
        notes.append("no routing profile for this model: uniform routing assumed; record one with `fiddler-opt profile --prompts`")
    if machine.source != "measured":
        notes.append(f"{machine_file} comes from data sheets, nothing was measured: run `fiddler-opt profile` on your machine")
    shape = machine.shape
    if (shape.hidden_size, shape.intermediate_size) != (plan.model.hidden_size, plan.model.intermediate_size):
        notes.append(
            f"{machine_file} was timed on experts of {shape.hidden_size} x {shape.intermediate_size}; times are scaled by bytes"
        )
    if shape.dtype != plan.model.dtype:
        notes.append(f"{machine_file} was timed on {shape.dtype}, the model is {plan.model.dtype}; times are scaled by bytes")
    if machine.device.kind == "cuda" and not plan.gpu_memory_bytes.total:
        notes.append("attention was timed on the GPU, which this plan leaves out: expect less than predicted")
    if machine.device.kind == "host" and plan.gpu_memory_bytes.total:
        notes.append("the machine profile knows no GPU: the GPU part will be held in host memory, which gains nothing")
    return notes


def _table(*columns: str) -> Table:
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _rate(machine: MachineProfile, microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{machine.shape.expert_bytes / microseconds / 1e3:.1f} GB/s"
