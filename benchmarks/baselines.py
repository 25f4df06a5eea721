"""Runs the solved plan and the plans of simple rules.

    python benchmarks/baselines.py --machine profiles/local.machine.yaml -o FOLDER

With random weights, routing is nearly uniform, so the routers are skewed: each expert's scores are
scaled at random. Routing is recorded first. All plans are made from it and run on other prompts.
With `--load-format safetensors`, the routers stay unchanged. Writes baselines.json, and
baselines.md with medians over all prompts of all --rounds, because a machine's speed may change
between plans.
"""

import argparse
import json
import random
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import median

import torch
from runs import DEFAULT, PROVENANCE, arguments_parser, continued, load, random_ids
from table import markdown

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.routing import Routing
from fiddler_opt.measure.routing import RoutingJob, RoutingRecorder, routing_profile
from fiddler_opt.solve.baselines import BASELINES
from fiddler_opt.solve.compiler import by_rule, compile_plan
from fiddler_opt.units import parse_bytes
from fiddler_run.command import exit_status
from fiddler_run.errors import FiddlerError
from fiddler_run.generation.generate import Measured
from fiddler_run.generation.model import PlannedModel
from fiddler_run.generation.sampling import Options
from fiddler_run.plan.schema import Budget, Plan, Workload
from fiddler_run.system.files import write_whole

RECORDED_PROMPTS = 16  # prompts to record
PROMPTS = 4  # prompts to run per round
COLUMNS = (
    "plan",
    *("decode, tokens/s", "predicted", ""),
    *("first token, s", "predicted", ""),
    "both, s",
    *("GPU hit rate", "predicted"),
)
Found = dict[str, list[Measured]]  # by plan


def main() -> None:
    flags = parse_arguments()
    folder = Path(flags.output)
    folder.mkdir(parents=True, exist_ok=True)
    plans = make_plans(flags)
    found: Found = {name: [] for name in plans}
    for number, (name, plan) in product(range(flags.rounds), plans.items()):
        found[name] += measured(plan, flags, first_seed=1000 + number * PROMPTS)
        print(*row(name, plan, found[name]), file=sys.stderr)
        write_results(folder, plans, found)


def make_plans(flags: argparse.Namespace) -> dict[str, Plan]:
    """The solved plan and the plans of the rules, from routing recorded with the solved plan."""
    model = ModelSpec.load(flags.model)
    machine = MachineProfile.load(flags.machine)
    budget = Budget(gpu_bytes=parse_bytes(flags.gpu_mem, "--gpu-mem"))
    workload = Workload(
        prompt_tokens=flags.prompt_tokens,
        output_tokens=flags.output_tokens,
        num_beams=1,
        batch_size=1,
        max_seq_len=flags.prompt_tokens + flags.output_tokens,
    )
    given = (workload, budget, PROVENANCE)
    uniform = compile_plan(model, machine, Routing.uniform(model), *given)
    routing = recorded(loaded(uniform, flags), model, workload)
    plans = {"solved": compile_plan(model, machine, routing, *given)}
    for rule in flags.rules:
        try:
            plans[rule] = compile_plan(model, machine, routing, *given, placer=by_rule(rule))
        except FiddlerError as error:
            print(f"{rule}: {error}", file=sys.stderr)
    return plans


def loaded(plan: Plan, flags: argparse.Namespace) -> PlannedModel:
    """Loads the plan's model. Skews its routers if its weights are random."""
    model = load(plan, flags)
    if flags.load_format == "dummy":
        skew_routers(model, flags.skew)
    return model


def skew_routers(model: PlannedModel, skew: float) -> None:
    """Scales the routers' scores. Experts with larger scores, of either sign, are chosen more
    often.
    """
    rng = random.Random(0)
    for layer in model.model.layers:
        weight = layer.mlp.gate.weight
        scales = [0.2 + rng.random() ** skew for _ in range(len(weight))]
        weight.mul_(torch.tensor(scales, dtype=weight.dtype, device=weight.device).unsqueeze(1))


def recorded(model: PlannedModel, spec: ModelSpec, workload: Workload) -> Routing:
    """Records the routing of a model on random prompts."""
    prompts = [
        random_ids(model, workload.prompt_tokens, seed)[0].tolist()
        for seed in range(RECORDED_PROMPTS)
    ]
    job = RoutingJob(spec.shape, {"random": prompts}, workload.output_tokens, workload.max_seq_len)
    recorder = RoutingRecorder(job)
    for _ in recorder.run(model):
        pass
    profile = routing_profile(recorder.trace(), spec.shape, "benchmark", workload.output_tokens)
    return Routing.from_profile(profile, spec, "recorded")


def measured(plan: Plan, flags: argparse.Namespace, first_seed: int) -> list[Measured]:
    """Loads a plan and runs its prompts."""
    model = loaded(plan, flags)
    continued(model, flags.prompt_tokens, seed=0, options=Options(2))  # warms up
    options = Options(flags.output_tokens)
    seeds = range(first_seed, first_seed + PROMPTS)
    return [continued(model, flags.prompt_tokens, seed, options) for seed in seeds]


def write_results(folder: Path, plans: dict[str, Plan], found: Found) -> None:
    raw = {name: [asdict(each) for each in of_plan] for name, of_plan in found.items()}
    write_whole(folder / "baselines.json", json.dumps(raw, indent=1))
    rows = [row(name, plans[name], of_plan) for name, of_plan in found.items() if of_plan]
    write_whole(folder / "baselines.md", markdown(COLUMNS, rows))


def row(name: str, plan: Plan, found: list[Measured]) -> tuple[str, ...]:
    """Medians and ranges over the prompts of all rounds."""
    speeds = [each.decode_tokens_per_s for each in found]
    firsts = [each.ttft_s for each in found]
    both = median(
        each.ttft_s + (each.output_tokens - 1) / each.decode_tokens_per_s for each in found
    )
    hits = median(each.traffic.hit_rate for each in found)
    expected = plan.predicted
    return (
        name,
        *compared(speeds, expected.decode_tokens_per_s, digits=2),
        *compared(firsts, expected.ttft_s, digits=3),
        f"{both:.2f}",
        f"{hits:.1%}",
        f"{expected.gpu_hit_rate:.1%}",
    )


def compared(found: list[float], expected: float, digits: int) -> tuple[str, str, str]:
    """The cells of a figure: median and range, prediction, and difference."""
    middle, low, high, wanted = (
        f"{value:.{digits}f}" for value in (median(found), min(found), max(found), expected)
    )
    return f"{middle} ({low} to {high})", wanted, f"{median(found) / expected - 1:+.0%}"


def parse_arguments() -> argparse.Namespace:
    parser = arguments_parser(__doc__)
    add = parser.add_argument
    add("--gpu-mem", default="24GB", metavar="SIZE", help=DEFAULT)
    add("--skew", type=float, default=2.0, metavar="POWER", help=f"of the routers {DEFAULT}")
    add("--prompt-tokens", type=int, default=512, metavar="N", help=DEFAULT)
    add("--output-tokens", type=int, default=32, metavar="N", help=DEFAULT)
    add("--rounds", type=int, default=1, metavar="N", help=f"of all plans in turn {DEFAULT}")
    add("--rules", nargs="+", choices=BASELINES, default=list(BASELINES), help="(default: all)")
    flags = parser.parse_args()
    if flags.output_tokens < 2:
        parser.error("--output-tokens must be at least 2: a single token has no decode")
    return flags


if __name__ == "__main__":
    sys.exit(exit_status(main, "baselines.py"))
