"""Prints a plan in the terminal."""

from collections.abc import Iterator

from rich.console import Console

from fiddler_opt.insight.table import table
from fiddler_opt.solve.baselines import BASELINES
from fiddler_opt.solve.compiler import NOT_SOLVED
from fiddler_opt.units import format_bytes
from fiddler_run.encodings.table import plain_encoding
from fiddler_run.plan.parts import PURPOSES
from fiddler_run.plan.schema import Plan

MIN_NOTED_REGRET = 0.0005  # less is printed as 0.0%


def print_plan(console: Console, plan: Plan, notes: list[str]) -> None:
    """Prints a plan's memory, its predictions and its notes."""
    predicted = plan.predicted
    if any(rank.gpu_memory_bytes.total for rank in plan.ranks):
        print_gpu_memory(console, plan)
    print_host_memory(console, plan)
    if plan.encoding != plain_encoding(plan.model.dtype):
        bits = 8 * plan.block_bytes / plan.block_format.block_weights
        console.print(f"experts are stored as {plan.encoding}: {bits:.1f} bits per weight, exact")
    print_alternatives(console, plan)
    console.print(
        f"predicted for {plan.workload.prompt_tokens} prompt + {plan.workload.output_tokens} output"
        f" tokens: {predicted.decode_tokens_per_s:.2f} tokens/s, first token after"
        f" {predicted.ttft_s:.2f} s, GPU hit rate {predicted.gpu_hit_rate:.1%}"
    )
    print_optimality(console, plan)
    if any(part >= MIN_NOTED_REGRET for part in predicted.regret.values()):
        sets = ", ".join(f"{name} {part:.1%}" for name, part in predicted.regret.items())
        console.print(f"slower than a plan made for one set of prompts alone: {sets}")
    for note in notes:
        console.print(f"note: {note}", style="yellow")


def print_optimality(console: Console, plan: Plan) -> None:
    """Prints how the placement was found, how close it is to the best, and what a GB would add."""
    predicted = plan.predicted
    status = plan.provenance.status
    if status.startswith(NOT_SOLVED):
        console.print(f"placed by the rule {status.removeprefix(NOT_SOLVED)}, without the solver")
    else:
        console.print(
            f"solver: {status} in {plan.provenance.solve_s:.1f} s, within {predicted.gap:.3%} of"
            " the best possible time"
        )
    more = ""
    if plan.rank.device == "cuda" and plan.rank.gpu_memory_bytes.total:
        where = " in rank 0" if len(plan.ranks) > 1 else ""
        more = (
            f"; another GB of GPU memory{where} would add"
            f" {predicted.next_gb_tokens_per_s:.2f} tokens/s"
        )
    console.print(
        f"bound: no placement in this memory decodes faster than {predicted.bound_tokens_per_s:.2f}"
        f" tokens/s, according to this profile{more}"
    )


def print_gpu_memory(console: Console, plan: Plan) -> None:
    """Prints GPU memory by purpose. With several ranks, a column for each."""
    memories = [rank.gpu_memory_bytes for rank in plan.ranks]
    if len(memories) == 1:
        memory = table("GPU memory", "bytes", "")
    else:
        memory = table("GPU memory", *(f"rank {number}" for number in range(len(memories))))

    def figures(sizes: list[int]) -> list[str]:
        texts = [format_bytes(size) for size in sizes]
        return texts if len(memories) > 1 else [f"{size:,}" for size in sizes] + texts

    for purpose in memories[0].parts():
        sizes = [each.parts()[purpose] for each in memories]
        memory.add_row(PURPOSES.get(purpose, purpose), *figures(sizes))
    memory.add_row("free", *figures([each.total - each.used for each in memories]))
    memory.add_row("total", *figures([each.total for each in memories]), style="bold")
    console.print(memory)


def print_host_memory(console: Console, plan: Plan) -> None:
    """Prints how many experts are on the GPUs and where the others are, for each rank."""
    blocks = sum(rank.num_resident_blocks + rank.num_disk_blocks for rank in plan.ranks)
    blocks += plan.num_host_blocks
    for number, rank in enumerate(plan.ranks):
        host = rank.host_memory_bytes
        elsewhere = f"{format_bytes(host.experts)} in host memory"
        if host.embedding:
            elsewhere += f" (and {format_bytes(host.embedding)}, the embedding table)"
        if rank.disk_bytes:
            elsewhere += f", {format_bytes(rank.disk_bytes)} on disk"
        of_rank = ""
        if len(plan.ranks) > 1:
            of_rank = f"rank {number}, machine {rank.machine}: "
        console.print(
            f"{of_rank}{rank.num_resident_blocks} of {blocks} expert blocks"
            f" ({rank.num_resident_blocks / blocks:.1%}) on the GPU, the equivalent of"
            f" {rank.num_resident_blocks / plan.blocks_per_expert:.1f} of"
            f" {blocks // plan.blocks_per_expert} experts; {elsewhere}"
        )


def print_alternatives(console: Console, plan: Plan) -> None:
    """Prints the predictions of simpler rules in the same memory, unless all are equal."""
    predicted = plan.predicted
    rows = {}
    for name, other in predicted.alternatives.items():
        words = f"{name}: {BASELINES[name].words}" if name in BASELINES else name
        rows[words] = (f"{other.decode_tokens_per_s:.2f}", f"{other.ttft_s:.2f} s")
    own = (f"{predicted.decode_tokens_per_s:.2f}", f"{predicted.ttft_s:.2f} s")
    if {*rows.values()} <= {own}:
        return
    alone = " rank 0 alone" if len(plan.ranks) > 1 else ""
    others = table(f"compared with{alone}", "tokens/s", "first token")
    for words, figures in rows.items():
        others.add_row(words, *figures)
    others.add_row("this plan", *own, style="bold")
    console.print(others)


def print_placement(console: Console, plan: Plan) -> None:
    """Prints the resident blocks of every expert and how the plan was made."""
    of_ranks = " of all ranks" if len(plan.ranks) > 1 else ""
    console.print(
        f"blocks in GPU memory{of_ranks} by expert, out of {plan.blocks_per_expert} each:"
    )
    for experts in _columns_that_fit(console.width, plan):
        placed = table("layer", *map(str, experts))
        for layer, row in enumerate(plan.resident_rows()):
            placed.add_row(str(layer), *(str(row[expert] or "·") for expert in experts))
        console.print(placed)
    made = plan.provenance
    console.print(
        f"made on {made.created} by `{made.command}`, from {made.machine} and {made.routing}"
    )


def _columns_that_fit(width: int, plan: Plan) -> Iterator[range]:
    """The experts of each table, as many as fit the width."""
    experts = plan.model.num_experts
    borders = 3  # a space on each side and a line
    column = len(str(max(experts - 1, plan.blocks_per_expert))) + borders
    first = max(len("layer"), len(str(plan.model.num_layers))) + borders + 1
    count = max(1, (width - first) // column)
    for start in range(0, experts, count):
        yield range(start, min(start + count, experts))
