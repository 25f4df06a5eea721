"""Many workloads, each predicted and measured: `python benchmarks/workloads.py --machine profiles/local.machine.yaml -o FOLDER`.

For every GPU memory and number of beams one plan is made and loaded, and runs all prompts. Writes workloads.json after each row,
and at the end workloads.md and workloads.png.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch

from fiddler_opt.bench_machine import release_gpu_memory
from fiddler_opt.compiler import compile_plan
from fiddler_opt.explain import placement_of
from fiddler_opt.machine import MachineProfile
from fiddler_opt.model import DEFAULT_MODEL, ModelSpec
from fiddler_opt.problem import Budget, Problem
from fiddler_opt.routing import Routing, RoutingProfile
from fiddler_opt.units import parse_bytes
from fiddler_run.balance import TOKENS, observe
from fiddler_run.command import exit_status
from fiddler_run.errors import FiddlerError
from fiddler_run.files import write_whole
from fiddler_run.generate import Measured, Options, generate_ids, never_stopping
from fiddler_run.load import ModelLoader
from fiddler_run.locate import name_in_plan
from fiddler_run.model import DispatchedMixtral
from fiddler_run.plan import Plan, Workload

MADE = dict.fromkeys(("command", "machine", "machine_sha256", "machine_source", "routing", "created"), "benchmark")
COLUMNS = ("GPU memory", "beams", "prompt", "output", "decode, steps/s", "predicted", "", "first token, s", "predicted", "", "rate")


@dataclass(frozen=True)
class Row:
    """`rate`: of CPU and link with one token's absent blocks, right before, over the profile's; None where Python divides them."""

    gpu_mem: str
    beams: int
    prompt: int
    output: int
    steps_per_s: float
    predicted_steps_per_s: float
    ttft_s: float
    predicted_ttft_s: float
    peak_gpu_bytes: int
    rate: float | None

    @property
    def cells(self) -> tuple[str, ...]:
        decode, first = self.steps_per_s / self.predicted_steps_per_s - 1, self.ttft_s / self.predicted_ttft_s - 1
        speeds = f"{self.steps_per_s:.2f}", f"{self.predicted_steps_per_s:.2f}", f"{decode:+.0%}"
        times = f"{self.ttft_s:.3f}", f"{self.predicted_ttft_s:.3f}", f"{first:+.0%}"
        rate = "" if self.rate is None else f"{self.rate:.0%}"
        return self.gpu_mem, str(self.beams), str(self.prompt), str(self.output), *speeds, *times, rate


def main() -> None:
    flags = parse_arguments()
    folder = Path(flags.output)
    folder.mkdir(parents=True, exist_ok=True)
    model, machine = ModelSpec.load(flags.model), MachineProfile.load(flags.machine)
    routing = Routing.uniform(model)
    if flags.routing:
        routing = Routing.from_profile(RoutingProfile.load(flags.routing), model, flags.routing)
    rows: list[Row] = []
    for gpu_mem, beams in product(flags.gpu_mem, flags.beams):
        try:
            for row in measured(flags, model, machine, routing, gpu_mem, beams):
                rows.append(row)
                print(*row.cells, file=sys.stderr)
                write_whole(folder / "workloads.json", json.dumps([asdict(each) for each in rows], indent=1))
        except FiddlerError as error:  # too small for so many beams
            print(f"{gpu_mem}, {beams} beams: {error}", file=sys.stderr)
        forget()
    if not rows:
        raise FiddlerError("no plan fits")
    write_table(folder / "workloads.md", COLUMNS, [row.cells for row in rows])
    figure(rows).savefig(folder / "workloads.png", dpi=130)


def measured(flags: argparse.Namespace, model: ModelSpec, machine: MachineProfile, routing: Routing, gpu_mem: str, beams: int):
    """The rows of one plan, whose context is the longest workload's."""
    longest = max(flags.prompts) + max(flags.outputs)
    work = {"num_beams": beams, "batch_size": 1, "max_seq_len": longest}
    middle = Workload(prompt_tokens=sorted(flags.prompts)[len(flags.prompts) // 2], output_tokens=max(flags.outputs), **work)
    budget = Budget(parse_bytes(gpu_mem, "--gpu-mem"))
    plan = compile_plan(model, machine, routing, middle, budget, MADE)
    loaded, placement = load(plan, flags.model, flags.load_format), placement_of(plan)

    def generate(prompt: int, output: int) -> Measured:
        return continued(loaded, prompt, seed=prompt, options=Options(output, num_beams=beams))

    for prompt, output in product(flags.prompts, flags.outputs):
        if output == flags.outputs[0]:
            generate(prompt, 2)  # what is done but once
        workload = Workload(prompt_tokens=prompt, output_tokens=output, **work)
        cost = Problem(model, machine, workload, budget, plan.prefill_chunk_tokens).cost(routing)
        rate = joint_bytes_per_s(loaded)
        found = generate(prompt, output)
        speeds = found.decode_tokens_per_s, 1 / cost.decode_step_s(placement), found.ttft_s, cost.ttft_s(placement)
        yield Row(gpu_mem, beams, prompt, output, *speeds, found.peak_gpu_bytes, rate and rate / plan.bytes_per_s.absent)


def joint_bytes_per_s(model: DispatchedMixtral) -> float | None:
    """Of CPU and link, in all layers: what the machine gives now, which may be another minute's than the profile's."""
    observed = [each for number in range(TOKENS) for each in observe(model, number)]
    blocks, seconds = sum(each.streamed + each.on_cpu for each in observed), sum(each.both_s for each in observed)
    return blocks * model.plan.block_bytes / seconds if seconds else None


def load(plan: Plan, name: str, load_format: str):
    """The model `name`, of whose weights `load_format` decides."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.yaml"
        named = plan.model.model_copy(update={"name": name_in_plan(name, path)})
        plan.model_copy(update={"model": named}).save(path)
        return ModelLoader(path, load_format=load_format).load()


def forget() -> None:
    """A model that nobody holds any more."""
    gc.collect()
    release_gpu_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def continued(model: DispatchedMixtral, prompt_tokens: int, seed: int, options: Options) -> Measured:
    """What was measured while a random prompt was continued."""
    return generate_ids(model, random_ids(model, prompt_tokens, seed), options, **never_stopping(model))[1]


def random_ids(model: DispatchedMixtral, tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """As Markdown."""
    write_whole(path, "".join(f"| {' | '.join(cells)} |\n" for cells in (columns, ("---",) * len(columns), *rows)))


def figure(rows: list[Row]):
    """Measured over predicted, decode and first token: on the diagonal is right."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, (title, predicted, found) in zip(
        drawn.subplots(1, 2),
        (
            ("decode, steps/s", [row.predicted_steps_per_s for row in rows], [row.steps_per_s for row in rows]),
            ("first token, s", [row.predicted_ttft_s for row in rows], [row.ttft_s for row in rows]),
        ),
        strict=True,
    ):
        ends = [min(predicted + found), max(predicted + found)]
        axes.plot(ends, ends, color="0.6", linewidth=1)
        axes.fill_between(ends, [0.9 * end for end in ends], [1.1 * end for end in ends], color="0.9", label="within 10 %")
        for beams in sorted({row.beams for row in rows}):
            points = [(x, y) for x, y, row in zip(predicted, found, rows, strict=True) if row.beams == beams]
            axes.scatter(*zip(*points, strict=True), s=16, label=f"{beams} beams" if beams > 1 else "no beams")
        axes.set(xscale="log", yscale="log", xlabel="predicted", ylabel="measured", title=title)
        axes.legend()
    return drawn


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(text: str) -> list[int]:
        return [int(each) for each in text.split(",")]

    parser.add_argument("--machine", required=True, metavar="FILE", help="machine profile")
    parser.add_argument("--routing", metavar="FILE", help="routing profile (default: uniform routing, as random weights choose)")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="checkpoint folder or Hugging Face id (default: %(default)s)")
    parser.add_argument("--load-format", default="dummy", choices=["dummy", "safetensors"], help="(default: %(default)s)")
    parser.add_argument("--gpu-mem", type=lambda text: text.split(","), default=["8GB", "16GB", "24GB"], metavar="SIZES")
    parser.add_argument("--beams", type=numbers, default=[1, 4, 16], metavar="NUMBERS")
    parser.add_argument("--prompts", type=numbers, default=[32, 128, 512, 2048], metavar="TOKENS")
    parser.add_argument("--outputs", type=numbers, default=[32, 128], metavar="TOKENS")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER")
    flags = parser.parse_args()
    if min(flags.outputs) < 2:
        parser.error("--outputs must be at least 2: a single token has no decode")
    return flags


if __name__ == "__main__":
    sys.exit(exit_status(main, "workloads.py"))
