"""Exports a plan: the nearest placement that another program can run, as its flags or file.

These programs keep whole experts, or whole layers of experts, in GPU memory, with the weights as in
the checkpoint. Each writer rounds the budget for experts down to that grain. Which layers are whole
makes no difference: each calls the same number of experts for a token.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from fiddler_opt.inputs.routing import ASSUMED, Routing
from fiddler_opt.insight.expert_modules import device_map, expert_layers
from fiddler_opt.solve.placement import Placement, Rows
from fiddler_opt.solve.problem import Problem
from fiddler_opt.solve.times import Policy
from fiddler_opt.units import format_bytes
from fiddler_run.encodings.table import plain_encoding
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan
from fiddler_run.plan.shape import DTYPE_BYTES


@dataclass(frozen=True)
class Source:
    """What a plan offers to other programs.

    `problem` is the plan's, with experts as in the checkpoint. `counts_file` is where the frequency
    of each expert will be written, if at all.
    """

    plan: Plan
    problem: Problem
    routing: Routing
    counts_file: str | None = None

    @classmethod
    def of(
        cls, plan: Plan, problem: Problem, routing: Routing, counts_file: str | None = None
    ) -> Self:
        """Raises FiddlerError if no other program can run such a plan."""
        if len(plan.ranks) > 1:
            raise FiddlerError(f"a plan of {len(plan.ranks)} ranks; export a plan of one")
        if plan.rank.device != "cuda" or not plan.budget.gpu_bytes:
            raise FiddlerError(
                "a plan without a GPU, so there is nothing to place; plan with --gpu-mem for a"
                " machine that has one"
            )
        plain = plain_encoding(plan.model.dtype)
        model = problem.model.in_encoding(plain)
        machine = problem.machine.in_encoding(plain)
        return cls(plan, replace(problem, model=model, machine=machine), routing, counts_file)

    @property
    def expert_bytes(self) -> int:
        """Bytes of an expert in the checkpoint."""
        shape = self.plan.model
        return shape.expert_elements * DTYPE_BYTES[shape.dtype]

    @property
    def layer_bytes(self) -> int:
        return self.plan.model.num_experts * self.expert_bytes

    def free_bytes(self, embedding: bool) -> int:
        """GPU bytes for experts within the plan's budget.

        Args:
            embedding: the program keeps the embedding table in GPU memory.
        """
        memory = self.problem.memory()
        used = memory.used - memory.staging  # only our runtime has a staging ring
        used += self.problem.host_embedding_bytes if embedding else 0
        return max(0, memory.total - used)


@dataclass(frozen=True)
class Export:
    """A placement, and what makes another program use it.

    `text` is for the program, `rounded` says what it keeps in GPU memory, in words. `policy`: how
    the program serves host blocks. None: it copies all experts of a layer from pageable memory.
    """

    text: str
    rounded: str
    written_for: str
    resident: Rows
    gpu_expert_bytes: int
    policy: Policy | None

    @property
    def placement(self) -> Placement:
        return Placement.of(self.resident)


def to_llama_cpp(source: Source) -> Export:
    """Flags of llama-server and llama-cli. `--n-cpu-moe N` counts all layers, from the first."""
    shape = source.plan.model
    workload = source.plan.workload
    count = min(shape.num_layers, source.free_bytes(embedding=False) // source.layer_bytes)
    layers = expert_layers(source.problem)
    on_cpu = layers[-1] + 1 if count == 0 else layers[shape.num_layers - count]
    if count == shape.num_layers:
        on_cpu = 0
    parallel = f" -np {workload.sequences}" if workload.sequences > 1 else ""
    context = workload.max_seq_len * workload.sequences
    first = shape.num_layers - count
    return Export(
        text=f"-ngl 99 -c {context}{parallel} --n-cpu-moe {on_cpu}",
        rounded=layers_words(source, count),
        written_for="llama.cpp, commit 0c1e570, and a GGUF file in the checkpoint's dtype",
        resident=whole_layers(source, range(first, shape.num_layers)),
        gpu_expert_bytes=count * source.layer_bytes,
        policy="cpu",
    )


def to_accelerate(source: Source) -> Export:
    """A device_map for `from_pretrained()`.

    What is on "cpu" is copied to the GPU whenever it is called, a layer's experts at once. They
    need room there.

    Raises:
        FiddlerError: there is no room.
    """
    shape = source.plan.model
    free = source.free_bytes(embedding=True)
    count = shape.num_layers
    if free < shape.num_layers * source.layer_bytes:
        if free < source.layer_bytes:
            raise FiddlerError(
                "accelerate copies all experts of a layer to the GPU at once,"
                f" {format_bytes(source.layer_bytes)}, but the plan's budget leaves"
                f" {format_bytes(free)}; plan with more --gpu-mem"
            )
        count = free // source.layer_bytes - 1
    devices = device_map(source.problem, range(count))
    return Export(
        text=json.dumps(devices, indent=1),
        rounded=layers_words(source, count),
        written_for="accelerate 1.15.0 and transformers 5",
        resident=whole_layers(source, range(count)),
        gpu_expert_bytes=count * source.layer_bytes,
        policy=None,
    )


def to_ktransformers(source: Source) -> Export:
    """Flags of `python -m sglang.launch_server` with KTransformers.

    It takes a fraction of all experts. Without counts, each layer keeps its first experts, and the
    first layers one more than the others. With counts, it keeps the most often called.

    Raises:
        FiddlerError: its CPU kernels cannot compute the dtype, or the counts are not known.
    """
    plan = source.plan
    shape = plan.model
    if source.counts_file and source.routing.origin == ASSUMED:
        raise FiddlerError(
            "--counts: the plan assumes uniform routing; record a routing profile with"
            " `fiddler-opt profile --prompts`, and plan again"
        )
    if shape.dtype != "bfloat16":
        raise FiddlerError(
            f"ktransformers computes unquantised experts in bfloat16, but {shape.name} is"
            f" {shape.dtype}; choose another --to"
        )
    experts = shape.num_layers * shape.num_experts
    count = min(experts, source.free_bytes(embedding=True) // source.expert_bytes)
    blocks = source.problem.model.blocks_per_expert
    resident = [[0] * shape.num_experts for _ in range(shape.num_layers)]
    if source.counts_file:
        for layer, expert in by_frequency(source.routing)[:count]:
            resident[layer][expert] = blocks
        placement = f"frequency --init-expert-location {source.counts_file}"
    else:
        each, more = divmod(count, shape.num_layers)
        for layer, row in enumerate(resident):
            kept = each + (layer < more)
            row[:kept] = [blocks] * kept
        placement = "uniform"
    # the program truncates the product; the half keeps rounding out of it
    ratio = 1.0 if count == experts else (count + 0.5) / experts
    context = plan.workload.max_seq_len * plan.workload.sequences
    return Export(
        text=(
            f"--kt-method BF16 --kt-cpuinfer {plan.rank.cpu_threads}"
            f" --kt-gpu-experts-ratio {ratio:.8f} --kt-expert-placement-strategy {placement}"
            f" --max-running-requests {plan.workload.sequences} --max-total-tokens {context}"
        ),
        rounded=f"{count} of {experts} experts",
        written_for="ktransformers 0.7.2 (sglang-kt 0.7.2)",
        resident=resident,
        gpu_expert_bytes=count * source.expert_bytes,
        policy="cpu",
    )


TARGETS: dict[str, Callable[[Source], Export]] = {
    "llama.cpp": to_llama_cpp,
    "accelerate": to_accelerate,
    "ktransformers": to_ktransformers,
}


def layers_words(source: Source, count: int) -> str:
    return f"the experts of {count} of {source.plan.model.num_layers} layers"


def whole_layers(source: Source, layers: range) -> Rows:
    """The resident blocks of whole layers."""
    shape = source.plan.model
    blocks = source.problem.model.blocks_per_expert
    return [
        [blocks if layer in layers else 0] * shape.num_experts for layer in range(shape.num_layers)
    ]


def by_frequency(routing: Routing) -> list[tuple[int, int]]:
    """(layer, expert) pairs, the ones that decode calls most first, as the counts file has them."""
    order = sorted(
        (-count, layer, expert)
        for layer, row in enumerate(frequencies(routing))
        for expert, count in enumerate(row)
    )
    return [(layer, expert) for _, layer, expert in order]


def frequencies(routing: Routing) -> list[list[int]]:
    """How often each expert of each layer is called in 10^9 tokens."""
    return [[round(1e9 * chance) for chance in row] for row in routing.decode.expert]
