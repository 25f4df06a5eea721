"""Predicts and measures many workloads.

    python benchmarks/workloads.py --machine profiles/local.machine.yaml -o FOLDER

For each GPU memory size, number of beams and encoding, one plan is made and loaded, and runs all
prompts.
Writes workloads.json after each row, and workloads.md and workloads.png at the end.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from runs import PROVENANCE, arguments_parser, continued, forget, load, resident_set_bytes
from table import markdown

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.routing import Routing, RoutingProfile
from fiddler_opt.solve.compiler import compile_plan
from fiddler_opt.solve.placement import placement_of
from fiddler_opt.solve.problem import Problem
from fiddler_opt.units import parse_bytes
from fiddler_run.command import exit_status
from fiddler_run.engine.tuning import TOKENS, RouterSizes, measure_token
from fiddler_run.errors import FiddlerError
from fiddler_run.generation.generate import Measured
from fiddler_run.generation.model import PlannedModel
from fiddler_run.generation.sampling import Options
from fiddler_run.plan.schema import Budget, Plan, Workload
from fiddler_run.system.files import write_whole

COLUMNS = (
    *("GPU memory", "experts", "beams", "prompt", "output"),
    *("decode, steps/s", "predicted", ""),
    *("first token, s", "predicted", ""),
    *("rate", "RAM, GB", "loading, s"),
)


@dataclass(frozen=True)
class Row:
    """One workload, measured and predicted.

    `rate`: how fast CPU and link together processed one token's host blocks just before the run,
    as a fraction of the profile's rate. None without a decode path or host blocks. `ram_bytes`: of
    the process, after the run.
    """

    gpu_mem: str
    encoding: str
    beams: int
    prompt: int
    output: int
    steps_per_s: float
    predicted_steps_per_s: float
    ttft_s: float
    predicted_ttft_s: float
    peak_gpu_bytes: int
    rate: float | None
    ram_bytes: int
    load_s: float

    @property
    def cells(self) -> tuple[str, ...]:
        decode = self.steps_per_s / self.predicted_steps_per_s - 1
        first = self.ttft_s / self.predicted_ttft_s - 1
        return (
            *(self.gpu_mem, self.encoding, str(self.beams), str(self.prompt), str(self.output)),
            *(f"{self.steps_per_s:.2f}", f"{self.predicted_steps_per_s:.2f}", f"{decode:+.0%}"),
            *(f"{self.ttft_s:.3f}", f"{self.predicted_ttft_s:.3f}", f"{first:+.0%}"),
            "" if self.rate is None else f"{self.rate:.0%}",
            *(f"{self.ram_bytes / 1e9:.1f}", f"{self.load_s:.1f}"),
        )


@dataclass(frozen=True)
class Inputs:
    """The common inputs of all plans."""

    model: ModelSpec
    machine: MachineProfile
    routing: Routing

    def in_encoding(self, name: str) -> "Inputs":
        return replace(
            self, model=self.model.in_encoding(name), machine=self.machine.in_encoding(name)
        )


def main() -> None:
    flags = parse_arguments()
    folder = Path(flags.output)
    folder.mkdir(parents=True, exist_ok=True)
    inputs = read_inputs(flags)
    rows: list[Row] = []
    for gpu_mem, beams, encoding in product(flags.gpu_mem, flags.beams, flags.encodings):
        try:
            for row in measured_rows(flags, inputs.in_encoding(encoding), gpu_mem, beams):
                rows.append(row)
                print(*row.cells, file=sys.stderr)
                found = json.dumps([asdict(each) for each in rows], indent=1)
                write_whole(folder / "workloads.json", found)
        except FiddlerError as error:  # the memory is too small for this many beams
            print(f"{gpu_mem}, {encoding}, {beams} beams: {error}", file=sys.stderr)
        forget()
    if not rows:
        raise FiddlerError("no plan fits; give --gpu-mem larger sizes")
    write_whole(folder / "workloads.md", markdown(COLUMNS, [row.cells for row in rows]))
    figure(rows).savefig(folder / "workloads.png", dpi=130)


def read_inputs(flags: argparse.Namespace) -> Inputs:
    model = ModelSpec.load(flags.model)
    routing = Routing.uniform(model)
    if flags.routing:
        routing = Routing.from_profile(RoutingProfile.load(flags.routing), model, flags.routing)
    return Inputs(model, MachineProfile.load(flags.machine), routing)


def measured_rows(
    flags: argparse.Namespace, inputs: Inputs, gpu_mem: str, beams: int
) -> Iterator[Row]:
    """The rows of one plan, whose context fits the longest workload."""
    context = max(flags.prompts) + max(flags.outputs)

    def workload_of(prompt: int, output: int) -> Workload:
        return Workload(
            prompt_tokens=prompt,
            output_tokens=output,
            num_beams=beams,
            batch_size=1,
            max_seq_len=context,
        )

    middle = sorted(flags.prompts)[len(flags.prompts) // 2]
    budget = Budget(gpu_bytes=parse_bytes(gpu_mem, "--gpu-mem"))
    workload = workload_of(middle, max(flags.outputs))
    plan = compile_plan(inputs.model, inputs.machine, inputs.routing, workload, budget, PROVENANCE)
    started_s = time.perf_counter()
    model = load(plan, flags)
    load_s = time.perf_counter() - started_s

    def generate(prompt: int, output: int) -> Measured:
        return continued(model, prompt, seed=prompt, options=Options(output, num_beams=beams))

    for prompt, output in product(flags.prompts, flags.outputs):
        if output == flags.outputs[0]:
            generate(prompt, 2)  # warms up
        steps_per_s, ttft_s = predicted(plan, inputs, workload_of(prompt, output))
        rate = joint_bytes_per_s(model)
        found = generate(prompt, output)
        yield Row(
            *(gpu_mem, plan.encoding, beams, prompt, output),
            *(found.decode_tokens_per_s, steps_per_s),
            *(found.ttft_s, ttft_s),
            found.peak_gpu_bytes,
            rate and rate / plan.bytes_per_s.host,
            *(resident_set_bytes(), load_s),
        )


def predicted(plan: Plan, inputs: Inputs, workload: Workload) -> tuple[float, float]:
    """Predicted decode steps per second and seconds to first token of a workload on a plan."""
    problem = Problem(
        inputs.model, inputs.machine, workload, plan.budget, plan.prefill_chunk_tokens
    )
    cost = problem.cost(inputs.routing)
    placement = placement_of(plan)
    return 1 / cost.decode_step_s(placement), cost.ttft_s(placement)


def joint_bytes_per_s(model: PlannedModel) -> float | None:
    """The current rate of CPU and link together, over all layers."""
    layers = [layer for layer in model.layers if layer.decode is not None]
    if not model.engine.decode.takes(1):
        return None
    shape = model.plan.model
    router = RouterSizes(shape.num_experts, shape.num_experts_per_tok, shape.hidden_size)
    times = [
        each
        for number in range(TOKENS)
        for each in measure_token(layers, model.engine.resources, router, number)
    ]
    blocks = sum(each.streamed + each.on_cpu for each in times)
    seconds = sum(each.both_s for each in times)
    return blocks * model.plan.block_bytes / seconds if seconds else None


def figure(rows: list[Row]):
    """Plots measured over predicted values. Points on the diagonal are predicted exactly."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 4.2), layout="constrained")
    decode_axes, first_axes = drawn.subplots(1, 2)
    decode = [(row.predicted_steps_per_s, row.steps_per_s, row.beams) for row in rows]
    first = [(row.predicted_ttft_s, row.ttft_s, row.beams) for row in rows]
    draw(decode_axes, "decode, steps/s", decode)
    draw(first_axes, "first token, s", first)
    return drawn


def draw(axes, title: str, points: list[tuple[float, float, int]]) -> None:
    """Draws the diagonal and `points` (predicted, measured, beams)."""
    values = [value for x, y, _ in points for value in (x, y)]
    ends = [min(values), max(values)]
    axes.plot(ends, ends, color="0.6", linewidth=1)
    low = [0.9 * end for end in ends]
    high = [1.1 * end for end in ends]
    axes.fill_between(ends, low, high, color="0.9", label="within 10%")
    for beams in sorted({beams for *_, beams in points}):
        label = f"{beams} beams" if beams > 1 else "no beams"
        shown = [(x, y) for x, y, of in points if of == beams]
        axes.scatter(*zip(*shown, strict=True), s=16, label=label)
    axes.set(xscale="log", yscale="log", xlabel="predicted", ylabel="measured", title=title)
    axes.legend()


def parse_arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(each) for each in text.split(",")]

    def words(text: str) -> list[str]:
        return text.split(",")

    parser = arguments_parser(__doc__)
    add = parser.add_argument
    add("--routing", metavar="FILE", help="routing profile (default: uniform routing)")
    add("--gpu-mem", type=words, default=["8GB", "16GB", "24GB"], metavar="SIZES", help="budgets")
    plain = ["bf16"]
    add("--encodings", type=words, default=plain, metavar="NAMES", help="how experts are stored")
    add("--beams", type=numbers, default=[1, 4, 16], metavar="N,...", help="numbers of beams")
    lengths = [32, 128, 512, 2048]
    add("--prompts", type=numbers, default=lengths, metavar="N,...", help="tokens of the prompts")
    add("--outputs", type=numbers, default=[32, 128], metavar="N,...", help="tokens to generate")
    flags = parser.parse_args()
    if min(flags.outputs) < 2:
        parser.error(
            "--outputs must be at least 2: a single output token leaves no decode to measure"
        )
    return flags


if __name__ == "__main__":
    sys.exit(exit_status(main, "workloads.py"))
