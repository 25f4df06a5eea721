"""Why a plan is as it is: where each byte and each millisecond goes, what binds, and what a block of an expert is worth."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fiddler_opt.cost import PARTS, CostModel, Placement
from fiddler_opt.machine import MachineProfile
from fiddler_opt.model import ModelSpec
from fiddler_opt.problem import Budget, Problem
from fiddler_opt.report import print_alternatives, print_memory, table
from fiddler_opt.routing import Routing, RoutingProfile
from fiddler_run.errors import FiddlerError
from fiddler_run.locate import model_config_file, shipped_file
from fiddler_run.plan import Plan

WORDS = {
    "head": "output head and the rest of a step",
    "embedding": "embedding rows from host memory",
    "dense": "attention, routers, dispatch",
    "resident": "experts: GPU",
    "absent": "experts: CPU and link",
    "disk": "experts: disk",
    "queueing": "Python, experts done already",
}
SHOWN = 4  # experts on each side of the border


@dataclass(frozen=True)
class Worth:
    """One expert: `chosen` by that part of a decode step's tokens; microseconds of a decode step that one more resident block
    would save, and one less would cost; None where there is none to give or take."""

    layer: int
    expert: int
    chosen: float
    resident: int
    saves_us: float | None
    costs_us: float | None


def sources(plan: Plan, plan_path: Path, machine_path: str | None, routing_path: str | None) -> tuple[Problem, Routing]:
    """What the plan was made from, found again.

    Raises:
        FiddlerError: a profile is not where the plan says, or has changed since.
    """
    made = plan.provenance
    machine = MachineProfile.load(shipped_file(machine_path or made.machine))
    if hashlib.sha256(machine.dump().encode()).hexdigest() != made.machine_sha256:
        raise FiddlerError(f"{machine_path or made.machine}: not the profile that the plan was made from; name that with --machine")
    model = ModelSpec.from_file(model_config_file(plan.model.name, plan_path.resolve().parent), plan.model.name)
    origin = routing_path or made.routing
    if origin.startswith("uniform"):
        routing = Routing.uniform(model)
    else:
        routing = Routing.from_profile(RoutingProfile.load(shipped_file(origin)), model, origin)
    budget = Budget(plan.gpu_memory_bytes.total, plan.host_memory_bytes.experts if plan.disk_bytes else None)
    return Problem(model, machine, plan.workload, budget, plan.prefill_chunk_tokens), routing


def placement_of(plan: Plan) -> Placement:
    resident = [plan.resident_blocks[layer] for layer in range(plan.model.num_layers)]
    on_disk = [plan.disk_blocks.get(layer, [0] * plan.model.num_experts) for layer in range(plan.model.num_layers)]
    return Placement(resident, on_disk, host_embedding=plan.host_memory_bytes.embedding > 0)


def worths(cost: CostModel, placement: Placement) -> list[Worth]:
    """Of every expert, by layer."""
    found = []
    for layer, (row, on_disk) in enumerate(zip(placement.resident, placement.on_disk, strict=True)):

        def decode_us(expert: int, more: int, layer=layer, row=row, on_disk=on_disk) -> float:
            changed = [*row[:expert], row[expert] + more, *row[expert + 1 :]]
            return 1e6 * sum(cost.layer_parts(cost.decode.name, layer, changed, on_disk).values())

        for expert, (count, disk, chosen) in enumerate(zip(row, on_disk, cost.called[layer], strict=True)):
            now = decode_us(expert, 0)
            saves = now - decode_us(expert, 1) if count + disk < cost.blocks_per_expert else None
            costs = decode_us(expert, -1) - now if count else None
            found.append(Worth(layer, expert, chosen, count, saves, costs))
    return found


def print_explanation(console: Console, plan: Plan) -> None:
    """What the plan file itself tells."""
    predicted, workload = plan.predicted, plan.workload
    print_memory(console, plan)
    step_ms, ttft_ms = sum(predicted.decode_ms.values()), sum(predicted.ttft_ms.values())
    times = table("where the time goes", "decode step", "", f"prompt of {workload.prompt_tokens}", "")
    for part in PARTS:
        decode, prefill = predicted.decode_ms.get(part, 0.0), predicted.ttft_ms.get(part, 0.0)
        if decode or prefill:
            shares = [f"{part / whole:.0%}" if whole else "-" for part, whole in ((decode, step_ms), (prefill, ttft_ms))]
            row = [f"{decode:.2f} ms", shares[0], f"{prefill:.1f} ms", shares[1]]
            times.add_row(WORDS[part], *row)
    times.add_row("all", f"{step_ms:.2f} ms", "", f"{ttft_ms:.1f} ms", "", style="bold")
    console.print(times)
    console.print(f"where parts go on at once, the time counts for the longest; {predicted.decode_tokens_per_s:.2f} tokens/s")
    console.print(what_binds(plan))
    print_alternatives(console, plan)


def what_binds(plan: Plan) -> str:
    predicted = plan.predicted
    known = {name: ms for name, ms in predicted.decode_ms.items() if name in WORDS}
    binds = "a decode step takes no time to speak of"
    if known:
        longest = max(known, key=known.get)
        binds = f"most of a decode step goes into {WORDS[longest].removeprefix('experts: ')}"
    if predicted.binding == "nothing":
        return f"{binds}; more memory would not help"
    more = f"another GB of GPU memory would add {predicted.next_gb_tokens_per_s:.3f} tokens/s"
    return f"{binds}; {predicted.binding} is used up: {more}"


def print_worths(console: Console, found: list[Worth], blocks_per_expert: int) -> None:
    """The experts at the border: those that would be next to get a block, and those that would be the first to lose one."""
    wanting = sorted((each for each in found if each.saves_us is not None), key=lambda each: -each.saves_us)[:SHOWN]
    holding = sorted((each for each in found if each.costs_us is not None), key=lambda each: each.costs_us)[:SHOWN]
    border = table("at the border", "layer", "expert", "chosen by", "on the GPU", "one more saves", "one less costs")
    for name, experts in (("gets next", wanting), ("loses first", holding)):
        for each in experts:
            worth = ["-" if us is None else f"{us:.2f} us" for us in (each.saves_us, each.costs_us)]
            blocks = f"{each.resident} of {blocks_per_expert}"
            border.add_row(name, str(each.layer), str(each.expert), f"{each.chosen:.0%}", blocks, *worth)
    console.print(border)
    whole = sum(each.resident == blocks_per_expert for each in found)
    none = sum(each.resident == 0 for each in found)
    console.print(f"{whole} experts lie on the GPU whole, {none} not at all, {len(found) - whole - none} in part")
