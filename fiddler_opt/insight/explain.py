"""Explains a plan: the parts of its times, and the marginal value of a block of each expert."""

from collections import Counter
from dataclasses import dataclass

from rich.console import Console

from fiddler_opt.insight.table import table
from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.placement import LayerBlocks, Placement
from fiddler_run.plan.parts import PARTS
from fiddler_run.plan.schema import Plan

NUM_SHOWN = 4  # marginal experts in each direction


@dataclass(frozen=True)
class MarginalValue:
    """The value of one block of one expert in one rank.

    `chosen` is the fraction of decode steps that call the expert. `gain_us` and `cost_us` are the
    microseconds of a decode step that one more resident block saves and one fewer costs, where the
    rank exchanges it with its own host memory. None if there is no block to add or to remove.
    """

    rank: int
    layer: int
    expert: int
    chosen: float
    resident: int
    gain_us: float | None
    cost_us: float | None


def marginal_values(cost: CostModel, placement: Placement) -> list[MarginalValue]:
    """The marginal values of every expert, by layer and rank."""
    return [
        _marginal_value(cost, layer, placed, rank, expert)
        for layer in range(len(cost.called))
        for placed in [placement.layer(layer, cost.blocks_per_expert)]
        for rank in range(len(placed))
        for expert in range(len(cost.called[layer]))
    ]


def _marginal_value(
    cost: CostModel, layer: int, placed: list[LayerBlocks], rank: int, expert: int
) -> MarginalValue:
    def decode_us(more: int) -> float:
        """Microseconds with `more` resident blocks of the expert and as many fewer in RAM."""
        own = placed[rank]
        changed = own._replace(
            resident=_added(own.resident, expert, more), host=_added(own.host, expert, -more)
        )
        ranks = [*placed[:rank], changed, *placed[rank + 1 :]]
        return 1e6 * sum(cost.layer_parts(cost.decode.name, layer, ranks).values())

    resident = placed[rank].resident[expert]
    gain_us = decode_us(0) - decode_us(1) if placed[rank].host[expert] else None
    cost_us = decode_us(-1) - decode_us(0) if resident else None
    chosen = cost.called[layer][expert]
    return MarginalValue(rank, layer, expert, chosen, resident, gain_us, cost_us)


def _added(row: list[int], expert: int, more: int) -> list[int]:
    return [*row[:expert], row[expert] + more, *row[expert + 1 :]]


def print_times(console: Console, plan: Plan) -> None:
    """Prints the parts of the predicted times."""
    predicted = plan.predicted
    step_ms = sum(predicted.decode_ms.values())
    ttft_ms = sum(predicted.ttft_ms.values())
    prompt = f"prompt of {plan.workload.prompt_tokens}"
    times = table("where the time goes", "decode step", "", prompt, "")
    for part, words in PARTS.items():
        decode = predicted.decode_ms.get(part, 0.0)
        prefill = predicted.ttft_ms.get(part, 0.0)
        if decode or prefill:
            decode_share = f"{decode / step_ms:.0%}" if step_ms else "-"
            prefill_share = f"{prefill / ttft_ms:.0%}" if ttft_ms else "-"
            row = (f"{decode:.2f} ms", decode_share, f"{prefill:.1f} ms", prefill_share)
            times.add_row(words, *row)
    times.add_row("total", f"{step_ms:.2f} ms", "", f"{ttft_ms:.1f} ms", "", style="bold")
    console.print(times)
    console.print(
        f"of overlapping parts, only the longest counts; {predicted.decode_tokens_per_s:.2f}"
        " tokens/s"
    )
    console.print(binding_words(plan))


def binding_words(plan: Plan) -> str:
    """The longest part of a decode step, and whether more memory would help, in words."""
    predicted = plan.predicted
    known = {name: ms for name, ms in predicted.decode_ms.items() if name in PARTS}
    longest = "a decode step takes next to no time"
    if known:
        longest = f"most of a decode step goes to {PARTS[max(known, key=known.get)]}"
    if plan.rank.device == "cuda" and not any(rank.gpu_memory_bytes.total for rank in plan.ranks):
        return f"{longest}; the plan uses no GPU memory"
    gain = predicted.next_gb_tokens_per_s
    if predicted.binding == "nothing" and not gain:
        return f"{longest}; more memory would not help"
    where = " in rank 0" if len(plan.ranks) > 1 else ""
    more = f"another GB of GPU memory{where} would add {gain:.3f} tokens/s"
    if predicted.binding == "nothing":
        return f"{longest}; memory is left over; in a solved plan, {more}"
    return f"{longest}; {predicted.binding} is used up, and {more}"


def print_marginal(console: Console, found: list[MarginalValue], blocks_per_expert: int) -> None:
    """Prints the experts that would gain the next block and those that would lose one first."""
    growing = sorted(
        (each for each in found if each.gain_us is not None), key=lambda each: -each.gain_us
    )
    shrinking = sorted(
        (each for each in found if each.cost_us is not None), key=lambda each: each.cost_us
    )
    several = any(each.rank for each in found)
    marginal = table(
        "marginal experts",
        *(["rank"] if several else []),
        "layer",
        "expert",
        "chosen by",
        "on the GPU",
        "gain of +1 block",
        "cost of -1 block",
    )
    for name, experts in (("next in", growing), ("first out", shrinking)):
        for each in experts[:NUM_SHOWN]:
            values = ["-" if us is None else f"{us:.2f} us" for us in (each.gain_us, each.cost_us)]
            blocks = f"{each.resident} of {blocks_per_expert}"
            rank = [str(each.rank)] if several else []
            marginal.add_row(
                name,
                *rank,
                str(each.layer),
                str(each.expert),
                f"{each.chosen:.0%}",
                blocks,
                *values,
            )
    console.print(marginal)
    on_gpus = Counter()  # blocks by layer and expert
    for each in found:
        on_gpus[each.layer, each.expert] += each.resident
    whole = sum(count == blocks_per_expert for count in on_gpus.values())
    none = sum(count == 0 for count in on_gpus.values())
    console.print(
        f"{whole} experts are entirely on the GPU{'s' if several else ''},"
        f" {len(on_gpus) - whole - none} partly, {none} not at all"
    )
