"""A sweep: the best plan for each of several values of one quantity."""

from collections.abc import Callable
from dataclasses import dataclass

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.machine_ranks import network_of, repeated
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.workload import DEFAULTS
from fiddler_opt.insight.scaling import with_gpu_memory, with_rates
from fiddler_opt.insight.sweep_flags import WhatIf
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan, Workload

# The best plan on a machine for a workload and a number of bytes of GPU memory in each rank.
Solve = Callable[[MachineProfile, Workload, int], Plan]


@dataclass(frozen=True)
class Point:
    """One value of the swept quantity and the inputs of its plan."""

    value: int
    label: str
    machine: MachineProfile
    workload: Workload
    gpu_total_bytes: int


@dataclass(frozen=True)
class Row:
    """The plan of a point, or the reason why there is none."""

    point: Point
    plan: Plan | None
    problem: str = ""


def points(asked: WhatIf, machine: MachineProfile, workload: Workload) -> list[Point]:
    """The points of a sweep.

    Raises:
        FiddlerError: the sweep varies GPU memory on a machine without a GPU, or a link over which
            no experts are copied.
    """
    made = []
    on_gpu = machine.device.kind == "cuda"
    for value in asked.values:
        given = {**asked.fixed, asked.swept: value}
        gpu_bytes = given.get("gpu_mem", machine.device.memory_bytes if on_gpu else 0)
        if gpu_bytes and not on_gpu:
            raise FiddlerError(
                "--gpu-mem: the machine profile has no GPU; vary --ram, or name another with"
                " --machine"
            )
        supposed = machine
        if "link" in given or "ram" in given:
            supposed = with_rates(machine, given.get("link"), given.get("ram"))
        if asked.swept in DEFAULTS:
            workload = workload.model_copy(update={asked.swept: value})
        made.append(
            Point(
                value,
                asked.quantity.show(value),
                repeated(
                    with_gpu_memory(supposed, gpu_bytes),
                    given.get("ranks", 1),
                    network_of(asked.network),
                ),
                workload,
                gpu_bytes,
            )
        )
    return made


def sweep(points: list[Point], model: ModelSpec, solve: Solve) -> list[Row]:
    """Solves each point. The error of a point without a plan is kept in its row."""
    rows = []
    for point in points:
        try:
            _require_context(point.workload, model)
            rows.append(Row(point, solve(point.machine, point.workload, point.gpu_total_bytes)))
        except FiddlerError as error:
            rows.append(Row(point, None, str(error)))
    return rows


def _require_context(workload: Workload, model: ModelSpec) -> None:
    tokens = workload.prompt_tokens + workload.output_tokens
    context = workload.max_seq_len
    if context > model.max_position_embeddings:
        raise FiddlerError(f"the model's context ends at {model.max_position_embeddings} tokens")
    if tokens > context:
        raise FiddlerError(
            f"prompt and output take {tokens} tokens, the context has {context}; raise --context"
        )
