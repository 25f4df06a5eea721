"""Times the planner for several models: the better plan of all encodings, and its alternatives.

Needs no GPU and no weights. The machine comes from data sheets.
"""

import argparse
import gc
import random
import time
from itertools import combinations, product
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fiddler_opt.commands.files import best_plan
from fiddler_opt.entry import GC_THRESHOLD
from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import DEFAULT_MODEL, ModelSpec
from fiddler_opt.inputs.routing import PhaseRouting, Routing
from fiddler_opt.solve.comparison import compared
from fiddler_opt.solve.compiler import compile_plan
from fiddler_opt.solve.predict import workload_s
from fiddler_opt.solve.problem import Problem
from fiddler_run.plan.schema import Budget, Plan, Workload

MACHINE = Path(__file__).parents[1] / "profiles" / "rtx4090.machine.yaml"
WORKLOAD = Workload(
    prompt_tokens=512, output_tokens=128, num_beams=1, batch_size=1, max_seq_len=4096
)
GPU_BYTES = 24 * 10**9
HOST_BYTES = 60 * 10**9
DISK_BYTES_PER_S = 3e9
SIZES = (
    "num_hidden_layers",
    "num_local_experts",
    "num_experts_per_tok",
    "hidden_size",
    "intermediate_size",
)
SIZES_OF = {  # Mixtral's, but for these
    "Phi-3.5-MoE": (32, 16, 2, 4096, 6400),
    "GLM-4.5-Air": (45, 128, 8, 4096, 1408),
    "Qwen3-30B-A3B": (48, 128, 8, 2048, 768),
    "Qwen3-Next-80B-A3B": (48, 512, 10, 2048, 512),
}
CASES = (  # skew and host memory
    (0, None),
    (3, None),
    (3, HOST_BYTES),
)
MADE = dict.fromkeys(
    ("command", "machine", "machine_sha256", "machine_source", "routing", "created"), "benchmark"
)


def skewed_routing(model: ModelSpec, skew: float) -> Routing:
    """Routing by random weights to the power of `skew`. Pairs are proportional to both weights."""
    rng = random.Random(0)
    shape = model.shape
    expert = []
    pair = []
    for _ in range(shape.num_layers):
        weights = [rng.random() ** skew for _ in range(shape.num_experts)]
        total = sum(weights)
        pairs = (total**2 - sum(weight**2 for weight in weights)) / 2
        top_k = shape.num_experts_per_tok
        expert.append(
            [min(1.0, top_k / 2 * weight * (total - weight) / pairs) for weight in weights]
        )
        both = combinations(range(shape.num_experts), 2) if top_k == 2 else ()
        pair.append({(e, f): weights[e] * weights[f] / pairs for e, f in both})
    return Routing("benchmark", PhaseRouting(expert, pair), PhaseRouting(expert, pair))


def main() -> None:
    gc.set_threshold(GC_THRESHOLD)  # as in the command
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="MODEL", help="a part of a model's name (default: all)")
    only = parser.parse_args().only or ""
    machine = MachineProfile.load(MACHINE).model_copy(update={"disk_bytes_per_s": DISK_BYTES_PER_S})
    mixtral = ModelSpec.load(DEFAULT_MODEL)
    models = [mixtral] + [
        ModelSpec.from_config(
            {**mixtral.config.raw, **dict(zip(SIZES, sizes, strict=True))}, name, "here"
        )
        for name, sizes in SIZES_OF.items()
    ]
    table = Table(
        "model",
        "experts",
        "routing",
        "host memory",
        "solver",
        "in total",
        "processor time",
        "gap",
        "tokens/s",
        "greedy",
        "best alternative",
    )
    chosen = [model for model in models if only in model.shape.name]
    for model, (skew, host_bytes) in product(chosen, CASES):
        routing = skewed_routing(model, skew)
        budget = Budget(gpu_bytes=GPU_BYTES, host_bytes=host_bytes)

        def solve(stored: ModelSpec, routing=routing, budget=budget) -> Plan:
            return compile_plan(stored, machine, routing, WORKLOAD, budget, MADE)

        started = time.perf_counter(), time.process_time()
        plan = best_plan(machine.stored(model), solve, workload_s, machine)
        plan = compared(plan, Problem.of(plan, model, machine), routing)
        ended = time.perf_counter(), time.process_time()
        seconds, processor_s = (end - start for start, end in zip(started, ended, strict=True))
        predicted = plan.predicted
        rates = {name: other.decode_tokens_per_s for name, other in predicted.alternatives.items()}
        best = max(rates, key=rates.get)
        table.add_row(
            model.shape.name,
            str(model.shape.num_layers * model.shape.num_experts),
            "skewed" if skew else "uniform",
            f"{host_bytes / 1e9:.0f} GB" if host_bytes else "enough",
            f"{plan.provenance.solve_s:.2f} s",
            f"{seconds:.2f} s",
            f"{processor_s:.2f} s",
            f"{predicted.gap:.4%}",
            f"{predicted.decode_tokens_per_s:.2f}",
            f"{rates['greedy']:.2f}",
            f"{best} {rates[best]:.2f}",
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
