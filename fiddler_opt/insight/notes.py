"""Notes on how reliable a plan's predictions are."""

from collections.abc import Iterator

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.units import format_bytes
from fiddler_run.plan.schema import Plan

MIN_NOTED_DRIFT = 0.1  # a smaller drift changes predictions too little to mention


def plan_notes(plan: Plan, machine: MachineProfile, machine_file: str) -> list[str]:
    """The assumptions and limits of a plan's predictions, one line each."""
    return [
        *_origin_notes(plan, machine, machine_file),
        *_shape_notes(plan, machine, machine_file),
        *_device_notes(plan, machine, machine_file),
        *_memory_notes(plan, machine, machine_file),
    ]


def _origin_notes(plan: Plan, machine: MachineProfile, machine_file: str) -> Iterator[str]:
    if plan.provenance.routing.startswith("uniform"):
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
    gpu_bytes = plan.rank.gpu_memory_bytes.total
    if machine.link and not machine.streams and gpu_bytes:
        yield (
            f"according to {machine_file}, host memory cannot be page-locked: nothing is streamed"
            " to the GPU, and prompts take longer"
        )
    if machine.device.kind == "cuda" and not gpu_bytes:
        yield (
            "attention was timed on the GPU, which this plan does not use: expect lower"
            " speed than predicted"
        )
    if machine.device.kind == "cpu" and gpu_bytes:
        yield (
            "the machine profile has no GPU: the GPU part will be kept in host memory, which"
            " gains nothing"
        )


def _memory_notes(plan: Plan, machine: MachineProfile, machine_file: str) -> Iterator[str]:
    available_bytes = machine.memory.available_bytes
    if plan.loading_ram_bytes > available_bytes:
        yield (
            f"loading this plan takes {format_bytes(plan.loading_ram_bytes)} of RAM, but according"
            f" to {machine_file}, {format_bytes(available_bytes)} were free; close other programs,"
            " add memory, or plan with more --gpu-mem or with --host-mem"
        )
