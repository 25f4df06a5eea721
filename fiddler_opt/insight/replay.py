"""Replays recorded routing against cache policies for a plan's resident blocks.

The seconds of a decode step follow the cost model, with the experts that the step called:

    step = fixed + sum over layers of max( resident, host, copies, launch_overhead )

`host` is the time of the CPU and the link together for all blocks that are not resident. `copies`
is the link's time for those of them that the policy inserts: the step needs them anyway, so copying
them is no further work, but only the link can do it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fiddler_opt.inputs.routing import Routing
from fiddler_opt.insight.caches import Belady, DynamicTail, Lfu, Lru, Static
from fiddler_opt.measure.trace import RoutingTrace
from fiddler_opt.solve.comparison import policy_of
from fiddler_opt.solve.problem import Problem
from fiddler_opt.solve.times import ModelTimes
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan

# The policies in tables, besides dynamic tails.
PLANNED = "the plan"
LRU = "LRU"
LFU = "LFU"
HINDSIGHT = "placed for this trace"
OPTIMUM = "optimum (Belady)"


@dataclass(frozen=True)
class Pass:
    """A forward pass. `calls`: by layer, the items that it calls, each once, in order."""

    decode: bool
    calls: list[list[int]]


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a decode step of one token: what a block takes by place, and the rest.

    `copy_s` is 0 without a link. `overlap`: the GPU, the link and the CPU work at the same time.
    """

    fixed_s: float
    launch_overhead_s: float
    resident_s: float
    host_s: float
    copy_s: float
    overlap: bool

    @classmethod
    def of(cls, plan: Plan, problem: Problem) -> "StepTimes":
        machine = problem.machine
        times = ModelTimes(problem.model, machine, policy_of(plan), problem.budget.gpu_bytes == 0)
        dense_s, overhead_s = times.dense_s(1)
        blocks = plan.blocks_per_expert
        resident_s, host_s, _ = (float(seconds) for seconds in times.expert_s(np.array(1.0)))
        link = plan.bytes_per_s.link
        return cls(
            fixed_s=times.head_s(1, 1) + plan.model.num_layers * dense_s,
            launch_overhead_s=overhead_s,
            resident_s=resident_s / blocks,
            host_s=host_s / blocks,
            copy_s=plan.block_bytes / link if link and times.overlap else 0.0,
            overlap=times.overlap,
        )

    @property
    def free_share(self) -> float:
        """The part of the host blocks that the link can carry while they are served."""
        return min(1.0, self.host_s / self.copy_s) if self.copy_s else 0.0

    def steps_s(self, held: np.ndarray, missed: np.ndarray, copied: np.ndarray) -> np.ndarray:
        """Seconds of each step. Arguments are numbers of blocks [steps, layers]."""
        resident_s = held * self.resident_s
        host_s = np.maximum(missed * self.host_s, copied * self.copy_s)
        experts_s = np.maximum(resident_s, host_s) if self.overlap else resident_s + host_s
        return self.fixed_s + np.maximum(experts_s, self.launch_overhead_s).sum(axis=1)


@dataclass(frozen=True)
class Replayed:
    """What a policy did. `prefill_hit_rate` is None if there is no prefill.

    `copied_bytes` are those of a decode step. `tokens_per_s` counts the copies, and
    `free_copies_tokens_per_s` does not.
    """

    hit_rate: float
    prefill_hit_rate: float | None
    copied_bytes: float
    tokens_per_s: float
    free_copies_tokens_per_s: float


def passes(trace: RoutingTrace, plan: Plan) -> list[Pass]:
    """The forward passes of a trace: prompts in the plan's chunks, then a token at a time.

    Raises:
        FiddlerError: the trace is of another model, or has no generated tokens.
    """
    shape = plan.model
    found = {
        "layers with experts": (trace.experts.shape[1], shape.num_layers),
        "experts per token": (trace.experts.shape[2], shape.num_experts_per_tok),
    }
    for what, (recorded, planned) in found.items():
        if recorded != planned:
            raise FiddlerError(
                f"the trace has {recorded} {what}, but the plan's {shape.name} has {planned};"
                " record one with `fiddler-opt profile --model ... --prompts ... --trace FILE`"
            )
    if not trace.decode.any():
        raise FiddlerError(
            "the trace has no generated tokens; record more with `fiddler-opt profile"
            " --output-tokens`"
        )
    if trace.experts.max() >= shape.num_experts:
        raise FiddlerError(
            f"the trace names expert {trace.experts.max()}, but the plan's {shape.name} has"
            f" {shape.num_experts} experts; record a trace of this model"
        )
    first = shape.num_experts * np.arange(shape.num_layers)[None, :, None]
    items = trace.experts + first
    starts = [*np.flatnonzero(np.diff(trace.prompt, prepend=-1)), len(items)]
    result = []
    for start, stop in zip(starts, starts[1:], strict=False):
        decode = start + int((~trace.decode[start:stop]).sum())
        chunks = range(start, decode, plan.prefill_chunk_tokens)
        parts = [(at, min(at + plan.prefill_chunk_tokens, decode)) for at in chunks]
        for low, high in [*parts, *((at, at + 1) for at in range(decode, stop))]:
            calls = [
                sorted(set(layer))
                for layer in items[low:high].swapaxes(0, 1).reshape(shape.num_layers, -1).tolist()
            ]
            result.append(Pass(decode=low >= decode, calls=calls))
    return result


def policies(
    plan: Plan, routing: Routing, decode_calls: list[list[int]], share: float, slots: Sequence[int]
) -> dict[str, Callable[[], Static]]:
    """Makes each policy, by its words in tables.

    Args:
        routing: the plan's, which says what its placement expects to be used least.
        share: of the host blocks, what a dynamic tail may keep.
        slots: the sizes of dynamic tails, in experts a layer.
    """
    blocks = plan.blocks_per_expert
    resident = [count for row in plan.rank.resident_blocks.values() for count in row]
    expected = [chance for row in routing.decode.expert for chance in row]
    by_use = sorted(range(len(resident)), key=lambda item: (expected[item], resident[item]))
    num_experts = plan.model.num_experts
    called = np.bincount(
        [item for items in decode_calls for item in items], minlength=len(resident)
    )
    left = sum(resident)
    placed = [0] * len(resident)
    for item in np.argsort(-called, kind="stable").tolist():
        placed[item] = min(left, blocks)
        left -= placed[item]
    found: dict[str, Callable[[], Static]] = {PLANNED: lambda: Static(resident, blocks)}
    for count in slots:
        found[tail_words(count)] = lambda count=count: DynamicTail(
            resident, blocks, by_use, num_experts, count, share
        )
    return found | {
        LRU: lambda: Lru(resident, blocks, by_use),
        LFU: lambda: Lfu(resident, blocks),
        HINDSIGHT: lambda: Static(placed, blocks),
        OPTIMUM: lambda: Belady(sum(resident), blocks, len(resident), decode_calls),
    }


def tail_words(slots: int) -> str:
    return f"tail of {slots} expert{'s' if slots > 1 else ''} a layer"


def require_replayable(plan: Plan, path: object) -> None:
    """Checks that the plan's blocks could be cached.

    Raises:
        FiddlerError: it has several ranks, blocks on disk, or none in GPU memory.
    """
    if len(plan.ranks) > 1:
        raise FiddlerError(f"{path}: a plan of {len(plan.ranks)} ranks; replay a plan of one")
    if plan.rank.num_disk_blocks:
        raise FiddlerError(
            f"{path}: has blocks on disk, and a cache needs all of them in host memory; plan"
            " without --host-mem"
        )
    if not plan.rank.num_resident_blocks:
        raise FiddlerError(
            f"{path}: has no blocks in GPU memory, so there is nothing to replace; plan with more"
            " --gpu-mem"
        )


def replay(
    plan: Plan, problem: Problem, routing: Routing, trace: RoutingTrace, slots: Sequence[int]
) -> dict[str, Replayed]:
    """Replays a trace with each policy. Returns what they did, by their words in tables.

    Raises:
        FiddlerError: as `passes`.
    """
    all_passes = passes(trace, plan)
    decode_calls = [items for each in all_passes if each.decode for items in each.calls]
    times = StepTimes.of(plan, problem)
    made = policies(plan, routing, decode_calls, times.free_share, slots)
    return {words: run(make(), all_passes, times, plan) for words, make in made.items()}


def run(cache: Static, all_passes: list[Pass], times: StepTimes, plan: Plan) -> Replayed:
    """Replays the passes with one policy."""
    held = []
    copied = []
    missed = []
    prefill_held = 0
    prefill_needed = 0
    for each in all_passes:
        found = [cache.held(items) for items in each.calls]
        needed = [len(items) * plan.blocks_per_expert for items in each.calls]
        if each.decode:
            held.append(found)
            missed.append([all_of - here for all_of, here in zip(needed, found, strict=True)])
            copied.append([cache.update(items) for items in each.calls])
        else:
            prefill_held += sum(found)
            prefill_needed += sum(needed)
    held_blocks, missed_blocks, copied_blocks = map(np.array, (held, missed, copied))
    seconds = times.steps_s(held_blocks, missed_blocks, copied_blocks)
    free_s = replace(times, copy_s=0.0).steps_s(held_blocks, missed_blocks, copied_blocks)
    return Replayed(
        hit_rate=float(held_blocks.sum() / (held_blocks.sum() + missed_blocks.sum())),
        prefill_hit_rate=prefill_held / prefill_needed if prefill_needed else None,
        copied_bytes=float(copied_blocks.sum() / len(held) * plan.block_bytes),
        tokens_per_s=float(1 / seconds.mean()),
        free_copies_tokens_per_s=float(1 / free_s.mean()),
    )
