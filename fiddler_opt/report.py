"""Tables for the terminal."""

import re
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from fiddler_opt.baselines import BASELINES
from fiddler_opt.machine import Link, MachineProfile
from fiddler_opt.routing import PromptSet, RoutingProfile
from fiddler_opt.units import format_bytes
from fiddler_run.errors import FiddlerError
from fiddler_run.files import parse_yaml, read_text
from fiddler_run.plan import Plan
from fiddler_run.yaml_file import KINDS, kind_of

NOTED_DRIFT = 0.1  # of a machine: what less of it does to a prediction is not worth a line


def print_machine(console: Console, machine: MachineProfile) -> None:
    """Rates of one expert's weights, by tokens; without a GPU the CPU's are all there is."""
    cpu, gpu = machine.cpu, machine.device.kind == "cuda"
    console.print(
        f"{cpu.name}: {cpu.threads} threads on {cpu.physical_cores} cores{', pinned' if cpu.pinned else ''}, {cpu.kernel}"
    )
    console.print(f"device: {machine.device.name}, {format_bytes(machine.device.memory_bytes)}")
    rates = table("tokens", "CPU", *(("link", "both", "share of the link", "GPU") if gpu else ()), "spread")
    rates.title, rates.title_justify = "GB/s of an expert's weights, by the tokens that call it", "left"
    for tokens, by_share in machine.absent_expert_us.items():
        columns = [by_share.get(0.0)]
        if gpu:
            columns += [by_share.get(1.0), machine.best_absent_us[tokens]]
        row = [_rate(machine, us) for us in columns]
        if gpu:
            row += [f"{machine.stream_share[tokens]:.0%}", _rate(machine, machine.device_expert_us.get(tokens))]
        spread = machine.spread.get("absent_expert_us", {}).get(tokens)
        rates.add_row(str(tokens), *row, "-" if spread is None else f"{spread:.0%}")
    console.print(rates)
    if machine.link:
        console.print(f"link: {_link(machine.link)}")
        if not machine.streams:
            console.print(
                "experts could not be page-locked: plans leave those that are not in GPU memory to the CPU; "
                "`fiddler-opt doctor` says what limits it",
                style="yellow",
            )
    layer = ", ".join(
        f"{name} {times[1] / 1e3:.2f} ms"
        for name, times in (
            ("attention, router, dispatch", machine.dense_layer_us),
            ("of it not hidden behind experts", machine.dense_device_us),
        )
    )
    console.print(
        f"a layer for one token, besides its experts: {layer}; besides the layers {machine.head_us[1] / 1e3:.2f} ms a token"
    )
    if machine.cpu.threads_us:
        fastest = ", ".join(
            f"{threads}{pinned} {machine.shape.expert_bytes / us / 1e3:.1f}"
            for pinned, by_threads in (("", cpu.threads_us), (" pinned", cpu.pinned_threads_us))
            for threads, us in by_threads.items()
        )
        console.print(f"an expert for one token by threads, GB/s: {fastest}")
    if machine.memory.timed_bytes:
        sizes = format_bytes(machine.memory.timed_bytes), format_bytes(machine.memory.available_bytes)
        steady = f"; from minute to minute {machine.typical_drift:.0%} apart" if machine.drift else ""
        console.print(f"timed in {sizes[0]} of {sizes[1]} free memory{steady}")
    if machine.disk_bytes_per_s:
        console.print(f"the checkpoint's disk: {format_bytes(machine.disk_bytes_per_s)}/s")


def _link(link: Link) -> str:
    lanes = f"PCIe {link.generation} x{link.width}, " if link.generation and link.width else ""
    rates = {
        "to the GPU": link.h2d_bytes_per_s,
        "from pageable memory": link.h2d_pageable_bytes_per_s,
        "back": link.d2h_bytes_per_s,
    }
    told = ", ".join(f"{format_bytes(rate)}/s {name}" for name, rate in rates.items() if rate)
    return f"{lanes}{told}" + (f", round trip {link.round_trip_us:.0f} us" if link.round_trip_us else "")


def print_routing(console: Console, routing: RoutingProfile) -> None:
    model, top = routing.model, max(1, routing.model.num_experts // 4)
    sets = table("prompts", "number", "prompt tokens", "generated", "experts chosen again")
    for name, part in routing.sets.items():
        sets.add_row(
            name, str(part.prompts), str(part.prefill.tokens), str(part.decode.tokens), _reuse(part, model.num_experts_per_tok)
        )
    console.print(sets)
    busiest = table("layer", "busiest experts in prefill, part of choices", "in decode")
    phases = [merged_activations(routing, phase) for phase in ("prefill", "decode")]
    for layer in range(model.num_layers):
        row = []
        for activations in phases:
            counts = activations[layer]
            order = sorted(range(len(counts)), key=lambda e: -counts[e])[:top]
            row.append(", ".join(f"{e} ({counts[e] / sum(counts):.0%})" for e in order) if sum(counts) else "-")
        busiest.add_row(str(layer), *row)
    console.print(busiest)
    console.print(
        f"even routing would be {1 / model.num_experts:.0%} each, chosen again {model.num_experts_per_tok / model.num_experts:.0%}"
    )


def merged_activations(routing: RoutingProfile, phase: str) -> list[list[int]]:
    """Choices of each expert by layer, over all sets, in `prefill` or `decode`."""
    parts = [getattr(part, phase).activations for part in routing.sets.values()]
    return [
        [sum(counts) for counts in zip(*(part[layer] for part in parts), strict=True)] for layer in range(routing.model.num_layers)
    ]


def _reuse(part: PromptSet, top_k: int) -> str:
    """Of the choices of tokens that follow another, how many that one had made too: by phase."""
    phases = {"prefill": part.prefill, "decode": part.decode}
    shares = {
        name: sum(map(sum, counts.reuse.values())) / (counts.followers * top_k * len(counts.reuse))
        for name, counts in phases.items()
        if counts.followers
    }
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items()) or "-"


def print_file(console: Console, path: str) -> Plan | MachineProfile | RoutingProfile:
    """Prints any file that fiddler-opt writes, and returns what is in it.

    Raises:
        FiddlerError: it cannot be read, or is none of them.
    """
    text = read_text(path)
    shown = _file_class(text, path).parse(text, path)
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


def _file_class(text: str, path: str) -> type[Plan | MachineProfile | RoutingProfile]:
    """What a file is, by the key that only files of its kind have."""
    found = [kind for kind, key in KINDS.items() if re.search(rf"^{key}:", text, re.MULTILINE)]
    if len(found) != 1:  # written in another style, or not ours
        data = parse_yaml(text, path)
        found = [kind_of(data) if isinstance(data, dict) else None]
    classes = {each.kind: each for each in (Plan, MachineProfile, RoutingProfile)}
    if found[0] not in classes:
        raise FiddlerError(f"{path}: neither a plan nor a profile; give a file that `fiddler-opt` wrote")
    return classes[found[0]]


def print_placement(console: Console, plan: Plan) -> None:
    console.print(f"blocks in GPU memory by expert, of {plan.blocks_per_expert} each:")
    for experts in _columns_that_fit(console.width, plan):
        placed = table("layer", *map(str, experts))
        for layer, row in plan.resident_blocks.items():
            placed.add_row(str(layer), *(str(row[expert] or "·") for expert in experts))
        console.print(placed)
    made = plan.provenance
    console.print(f"made on {made.created} by `{made.command}`, from {made.machine} and {made.routing}")


def _columns_that_fit(width: int, plan: Plan) -> Iterator[range]:
    """The experts, in as many tables as they take at that width."""
    experts, borders = plan.model.num_experts, 3  # a space on each side, and a line
    column = len(str(max(experts - 1, plan.blocks_per_expert))) + borders
    first = max(len("layer"), len(str(plan.model.num_layers))) + borders + 1
    count = max(1, (width - first) // column)
    for start in range(0, experts, count):
        yield range(start, min(start + count, experts))


def print_memory(console: Console, plan: Plan) -> None:
    gpu, host = plan.gpu_memory_bytes, plan.host_memory_bytes
    memory = table("GPU memory", "bytes", "")
    for purpose, size in gpu.parts().items():
        memory.add_row(purpose.replace("_", " "), f"{size:,}", format_bytes(size))
    memory.add_row("free", f"{gpu.total - gpu.used:,}", format_bytes(gpu.total - gpu.used))
    memory.add_row("total", f"{gpu.total:,}", format_bytes(gpu.total), style="bold")
    console.print(memory)

    blocks = plan.num_resident_blocks + plan.num_absent_blocks + plan.num_disk_blocks
    whole = plan.num_resident_blocks / plan.blocks_per_expert
    elsewhere = f"{format_bytes(host.experts)} in host memory"
    if host.embedding:
        elsewhere += f" (and {format_bytes(host.embedding)}, the embedding table)"
    if plan.disk_bytes:
        elsewhere += f", {format_bytes(plan.disk_bytes)} on disk"
    console.print(
        f"experts: {plan.num_resident_blocks} of {blocks} blocks on the GPU (as much as {whole:.1f} experts), {elsewhere}"
    )


def print_alternatives(console: Console, plan: Plan) -> None:
    """What rules of thumb would give in the same memory, by the same cost model."""
    predicted = plan.predicted
    others = table("by rules of thumb instead", "tokens/s", "first token")
    for name, other in predicted.alternatives.items():
        words = f"{name}: {BASELINES[name].words}" if name in BASELINES else name
        others.add_row(words, f"{other.decode_tokens_per_s:.2f}", f"{other.ttft_s:.2f} s")
    others.add_row("this plan", f"{predicted.decode_tokens_per_s:.2f}", f"{predicted.ttft_s:.2f} s", style="bold")
    console.print(others)


def print_plan(console: Console, plan: Plan, notes: list[str]) -> None:
    predicted = plan.predicted
    print_memory(console, plan)
    print_alternatives(console, plan)
    console.print(
        f"predicted for {plan.workload.prompt_tokens} prompt + {plan.workload.output_tokens} output tokens: "
        f"{predicted.decode_tokens_per_s:.2f} tokens/s, first token after {predicted.ttft_s:.2f} s, "
        f"GPU hit rate {predicted.gpu_hit_rate:.1%}"
    )
    console.print(
        f"solver: {plan.provenance.status} in {plan.provenance.solve_s:.1f} s, within {predicted.gap:.3%} of the best possible; "
        f"by this profile no placement in this memory decodes faster than {predicted.bound_tokens_per_s:.2f} tokens/s; "
        f"another GB of GPU memory would add {predicted.next_gb_tokens_per_s:.2f}"
    )
    if predicted.regret:
        told = ", ".join(f"{name} {part:.1%}" for name, part in predicted.regret.items())
        console.print(f"slower than a plan made for one set of prompts alone: {told}")
    for note in notes:
        console.print(f"note: {note}", style="yellow")


def plan_notes(plan: Plan, machine: MachineProfile, machine_file: str) -> list[str]:
    """What a reader of the predictions should know about their ground."""
    notes = []
    if plan.provenance.routing.startswith("uniform"):
        notes.append("no routing profile for this model: uniform routing assumed; record one with `fiddler-opt profile --prompts`")
    if machine.source != "measured":
        notes.append(f"{machine_file} comes from data sheets, nothing was measured: run `fiddler-opt profile` on your machine")
    if machine.typical_drift > NOTED_DRIFT:
        notes.append(
            f"{machine_file}: the same experts in host memory took {machine.typical_drift:.0%} longer in one minute than in "
            "another; what is predicted may be off by as much"
        )
    if machine.link and not machine.streams and plan.gpu_memory_bytes.total:
        notes.append(f"by {machine_file} experts cannot be page-locked: nothing is copied to the GPU, and prompts take longer")
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


def table(*columns: str) -> Table:
    """The first column's words on the left, the others' numbers on the right."""
    made = Table()
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    return made


def _rate(machine: MachineProfile, microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{machine.shape.expert_bytes / microseconds / 1e3:.1f}"
