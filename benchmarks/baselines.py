"""The plan against the rules of thumb, run: `python benchmarks/baselines.py --machine profiles/local.machine.yaml -o FOLDER`.

Random weights choose experts evenly, so their routers are skewed: each expert's scores are scaled at random. The routing is
recorded first, and every plan is made from it and run on other prompts. With `--load-format safetensors` the routers stay as they
are. Writes baselines.json, and baselines.md: medians of all prompts of --rounds, since a machine's speed may change between plans.
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
from workloads import MADE, continued, forget, load, random_ids, write_table

from fiddler_opt.baselines import BASELINES
from fiddler_opt.compiler import compile_plan
from fiddler_opt.machine import MachineProfile
from fiddler_opt.model import DEFAULT_MODEL, ModelSpec
from fiddler_opt.problem import Budget
from fiddler_opt.routing import Routing
from fiddler_opt.trace_routing import RoutingJob, RoutingRecorder, routing_profile
from fiddler_opt.units import parse_bytes
from fiddler_run.command import exit_status
from fiddler_run.errors import FiddlerError
from fiddler_run.files import write_whole
from fiddler_run.generate import Measured, Options
from fiddler_run.model import DispatchedMixtral
from fiddler_run.plan import Plan, Workload

RECORDED_PROMPTS, PROMPTS = 16, 4  # to plan from; to run in each round
COLUMNS = ("plan", "decode, tokens/s", "predicted", "", "first token, s", "predicted", "", "both, s", "GPU hit rate", "predicted")


def main() -> None:
    flags = parse_arguments()
    model, machine = ModelSpec.load(flags.model), MachineProfile.load(flags.machine)
    work = {"num_beams": 1, "batch_size": 1, "max_seq_len": flags.prompt_tokens + flags.output_tokens}
    workload = Workload(prompt_tokens=flags.prompt_tokens, output_tokens=flags.output_tokens, **work)

    def plan_for(routing: Routing, baseline: str | None = None) -> Plan:
        budget = Budget(parse_bytes(flags.gpu_mem, "--gpu-mem"))
        return compile_plan(model, machine, routing, workload, budget, MADE, baseline=baseline)

    def loaded(plan: Plan) -> DispatchedMixtral:
        forget()  # the one before
        found = load(plan, flags.model, flags.load_format)
        if flags.load_format == "dummy":
            skew_routers(found, flags.skew)
        return found

    routing = recorded(loaded(plan_for(Routing.uniform(model))), model, workload)
    plans: dict[str, Plan] = {}
    for baseline in (None, *flags.rules):
        try:
            plans[baseline or "solved"] = plan_for(routing, baseline)
        except FiddlerError as error:
            print(f"{baseline}: {error}", file=sys.stderr)
    folder = Path(flags.output)
    folder.mkdir(parents=True, exist_ok=True)
    measured: dict[str, list[Measured]] = {name: [] for name in plans}
    for number, (name, plan) in product(range(flags.rounds), plans.items()):
        running = loaded(plan)
        continued(running, flags.prompt_tokens, seed=0, options=Options(2))  # what is done but once
        for seed in range(1000 + number * PROMPTS, 1000 + (number + 1) * PROMPTS):
            measured[name].append(continued(running, flags.prompt_tokens, seed, Options(flags.output_tokens)))
        del running
        print(*row(name, plan, measured[name]), file=sys.stderr)
        raw = {name: [asdict(each) for each in found] for name, found in measured.items()}
        write_whole(folder / "baselines.json", json.dumps(raw, indent=1))
        write_table(folder / "baselines.md", COLUMNS, [row(each, plans[each], found) for each, found in measured.items() if found])


def row(name: str, plan: Plan, found: list[Measured]) -> tuple[str, ...]:
    """Medians, and how far apart the prompts of all rounds lie."""
    speeds, firsts = [each.decode_tokens_per_s for each in found], [each.ttft_s for each in found]
    speed, first, hits = median(speeds), median(firsts), median(each.traffic.hit_rate for each in found)
    both = median(each.ttft_s + (each.output_tokens - 1) / each.decode_tokens_per_s for each in found)
    told = plan.predicted
    decode = f"{speed:.2f} ({min(speeds):.2f} to {max(speeds):.2f})", f"{told.decode_tokens_per_s:.2f}"
    ttft = f"{first:.3f} ({min(firsts):.3f} to {max(firsts):.3f})", f"{told.ttft_s:.3f}"
    off = [f"{of / by - 1:+.0%}" for of, by in ((speed, told.decode_tokens_per_s), (first, told.ttft_s))]
    return name, *decode, off[0], *ttft, off[1], f"{both:.2f}", f"{hits:.1%}", f"{told.gpu_hit_rate:.1%}"


def skew_routers(model: DispatchedMixtral, skew: float) -> None:
    """Experts with larger scores, of either sign, are chosen more often."""
    rng = random.Random(0)
    for layer in model.model.layers:
        weight = layer.mlp.gate.weight
        scales = [0.2 + rng.random() ** skew for _ in range(len(weight))]
        weight.mul_(torch.tensor(scales, dtype=weight.dtype, device=weight.device).unsqueeze(1))


def recorded(model: DispatchedMixtral, spec: ModelSpec, workload: Workload) -> Routing:
    prompts = [random_ids(model, workload.prompt_tokens, seed)[0].tolist() for seed in range(RECORDED_PROMPTS)]
    job = RoutingJob(spec.shape, {"random": prompts}, workload.output_tokens, workload.max_seq_len)
    recorder = RoutingRecorder(job)
    for _ in recorder.run(model):
        pass
    return Routing.from_profile(
        routing_profile(recorder.trace(), spec.shape, "benchmark", workload.output_tokens), spec, "recorded"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, metavar="FILE", help="machine profile")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="checkpoint folder or Hugging Face id (default: %(default)s)")
    parser.add_argument("--load-format", default="dummy", choices=["dummy", "safetensors"], help="(default: %(default)s)")
    parser.add_argument("--gpu-mem", default="24GB", metavar="SIZE", help="(default: %(default)s)")
    parser.add_argument("--skew", type=float, default=2.0, metavar="POWER", help="of the routers (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=32, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="of all plans in turn (default: %(default)s)")
    parser.add_argument("--rules", nargs="+", choices=BASELINES, default=list(BASELINES), help="(default: all of them)")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER")
    flags = parser.parse_args()
    if flags.output_tokens < 2:
        parser.error("--output-tokens must be at least 2: a single token has no decode")
    return flags


if __name__ == "__main__":
    sys.exit(exit_status(main, "baselines.py"))
