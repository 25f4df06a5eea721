"""Prints what an export rounds, and what that costs."""

from rich.console import Console

from fiddler_opt.insight.export import Export, Source, whole_layers
from fiddler_opt.insight.table import table
from fiddler_opt.solve.compiler import solve
from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.placement import Placement
from fiddler_opt.units import format_bytes
from fiddler_run.encodings.table import plain_encoding


def print_export(console: Console, source: Source, export: Export, name: str) -> None:
    """Prints a row for the plan and the exported placement, and one between them.

    If the plan stores experts in another encoding than the checkpoint's, the row between is the
    best plan without it: what is below it is the cost of the coarser grain.
    """
    plan = source.plan
    shape = plan.model
    experts = shape.num_layers * shape.num_experts
    plain = plain_encoding(shape.dtype)
    resident = plan.rank.num_resident_blocks
    shown = table("", "experts in GPU memory", "tokens/s", "first token", "GPU hit rate")
    predicted = plan.predicted
    shown.add_row(
        f"the plan, {plan.encoding}",
        format_bytes(plan.rank.gpu_memory_bytes.experts),
        f"{predicted.decode_tokens_per_s:.2f}",
        f"{predicted.ttft_s:.2f} s",
        f"{predicted.gpu_hit_rate:.1%}",
    )
    if plan.encoding != plain:
        solution = solve(source.problem, source.routing)
        cost = source.problem.cost(source.routing, solution.policy)
        size = solution.placement.num_resident * source.problem.model.block_bytes
        shown.add_row(f"the best plan, {plain}", *_cells(cost, solution.placement, size))
    shown.add_row(f"{name}, {plain}", *_exported(source, export))
    console.print(shown)
    console.print(
        f"rounded: {resident} of {experts * plan.blocks_per_expert} expert blocks (as much as"
        f" {resident / plan.blocks_per_expert:.1f} of {experts} experts) -> {export.rounded}"
    )
    console.print(
        f"written for {export.written_for}; speeds are predicted with this project's kernels"
    )


def _exported(source: Source, export: Export) -> list[str]:
    if export.policy is None:
        return _copying_layers(source, export)
    cost = source.problem.cost(source.routing, export.policy)
    return _cells(cost, export.placement, export.gpu_expert_bytes)


def _copying_layers(source: Source, export: Export) -> list[str]:
    """The cells of a program that copies all experts of a layer before the GPU computes those
    called, in each step and once for a prompt.
    """
    cost = source.problem.cost(source.routing)
    whole = Placement.of(whole_layers(source, range(source.plan.model.num_layers)))
    copied = sum(not any(row) for row in export.resident) * source.layer_bytes
    link = source.problem.machine.link
    copy_s = copied / (link.h2d_pageable_bytes_per_s or link.h2d_bytes_per_s)
    rate = cost.decode_tokens_per_s(cost.decode_step_s(whole) + copy_s)
    return [
        format_bytes(export.gpu_expert_bytes),
        f"{rate:.2f}",
        f"{cost.ttft_s(whole) + copy_s:.2f} s",
        f"{cost.hit_rate(export.placement):.1%}",
    ]


def _cells(cost: CostModel, placement: Placement, size: int) -> list[str]:
    rate = cost.decode_tokens_per_s(cost.decode_step_s(placement))
    return [
        format_bytes(size),
        f"{rate:.2f}",
        f"{cost.ttft_s(placement):.2f} s",
        f"{cost.hit_rate(placement):.1%}",
    ]
