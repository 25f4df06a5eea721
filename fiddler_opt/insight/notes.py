"""Notes on how reliable a plan's predictions are."""

from collections.abc import Iterator

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.routing import ASSUMED
from fiddler_opt.units import format_bytes
from fiddler_run.plan.schema import Plan

MIN_NOTED_DRIFT = 0.1  # a smaller drift changes predictions too little to mention


def plan_notes(plan: Plan, machine: MachineProfile, machine_file: str) -> list[str]:
    """The assumptions and limits of a plan's predictions, one line each.

    Args:
        machine: may have more ranks than the plan.
    """
    return [
        *_origin_notes(plan, machine, machine_file),
        *_shape_notes(plan, machine, machine_file),
        *_device_notes(plan, machine, machine_file),
        *_memory_notes(plan, machine, machine_file),
        *_rank_notes(plan, machine),
    ]


def _origin_notes(plan: Plan, machine: MachineProfile, machine_file: str) -> Iterator[str]:
    if plan.provenance.routing == ASSUMED:
        yield (
            "no routing profile for this model: uniform routing assumed; record one with"
            " `fiddler-opt profile --prompts`"
        )
    if machine.source != "measured":
        yield (
            f"{machine_file} was computed from data sheets, not measured; run `fiddler-opt"
            " profile` on your machine"
        )
    if machine.typical_drift > MIN_NOTED_DRIFT:
        yield (
            f"{machine_file}: the same host experts took {machine.typical_drift:.0%} longer in"
            " one minute than in another; predictions may be off by as much"
        )


def _shape_notes(plan: Plan, machine: MachineProfile, machine_file: str) -> Iterator[str]:
    shape = machine.shape
    timed = (shape.hidden_size, shape.intermediate_size)
    if timed != (plan.model.hidden_size, plan.model.intermediate_size):
        yield (
            f"{machine_file} was timed on experts of {shape.hidden_size} x"
            f" {shape.intermediate_size}, the model's are {plan.model.hidden_size} x"
            f" {plan.model.intermediate_size}: times are scaled by bytes and may be far off; run"
            " `fiddler-opt profile --model` with this model"
        )
    if shape.dtype != plan.model.dtype:
        yield (
            f"{machine_file} was timed on {shape.dtype}, the model is {plan.model.dtype}; times are"
            " scaled by bytes"
        )


def _device_notes(plan: Plan, machine: MachineProfile, machine_file: str) -> Iterator[str]:
    for number, rank in enumerate(plan.ranks):
        profile = machine.rank_profile(number)
        of_rank = f"rank {number}: " if len(plan.ranks) > 1 else ""
        gpu_bytes = rank.gpu_memory_bytes.total
        if profile.link and not profile.streams and gpu_bytes:
            yield (
                f"{of_rank}according to {machine_file}, host memory cannot be page-locked: nothing"
                " is streamed to the GPU, and prompts take longer"
            )
        if profile.device.kind == "cuda" and not gpu_bytes and number == 0:
            yield (
                "attention was timed on the GPU, which this plan does not use: expect lower"
                " speed than predicted"
            )
        if profile.device.kind == "cpu" and gpu_bytes:
            yield (
                f"{of_rank}the machine profile has no GPU: the GPU part will be kept in host"
                " memory, which gains nothing"
            )


def _memory_notes(plan: Plan, machine: MachineProfile, machine_file: str) -> Iterator[str]:
    for number, needed_bytes, available_bytes in ram_shortages(plan, machine):
        on_machine = f" on the machine of rank {number}" if number else ""
        yield (
            f"loading this plan takes {format_bytes(needed_bytes)} of RAM{on_machine}, but"
            f" according to {machine_file}, {format_bytes(available_bytes)} were free; close other"
            " programs, add memory, or plan with more --gpu-mem or with --host-mem"
        )


def ram_shortages(plan: Plan, machine: MachineProfile) -> list[tuple[int, int, int]]:
    """For each machine with too little RAM, its first rank, the bytes needed and those free."""
    found = []
    for number in range(len(plan.ranks)):
        if number == min(plan.ranks_beside(number)):
            needed_bytes = plan.loading_ram_bytes_beside(number)
            available_bytes = machine.rank_profile(number).memory.available_bytes
            if needed_bytes > available_bytes:
                found.append((number, needed_bytes, available_bytes))
    return found


def _rank_notes(plan: Plan, machine: MachineProfile) -> Iterator[str]:
    used = len(plan.ranks)
    if machine.num_ranks > used:
        more = ",".join(["24GB"] * machine.num_ranks)
        yield (
            f"the machine profile has {machine.num_ranks} ranks, this plan uses {used}; for all of"
            f" them, give --gpu-mem a size each, such as {more}"
        )
    if used > 1:
        rates = [each.decode_tokens_per_s for each in plan.predicted.alternatives.values()]
        if max(rates, default=0.0) > plan.predicted.decode_tokens_per_s:
            yield (
                f"rank 0 alone would be faster, at {max(rates):.2f} tokens/s: the exchange between"
                " the ranks takes longer than it saves; give a single size to --gpu-mem"
            )
