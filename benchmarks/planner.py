"""Times the planner for several models.

Needs no GPU and no weights. The machine comes from data sheets.
"""

import argparse
import random
import time
from itertools import combinations
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import DEFAULT_MODEL, ModelSpec
from fiddler_opt.inputs.routing import PhaseRouting, Routing
from fiddler_opt.solve.comparison import compared
from fiddler_opt.solve.compiler import compile_plan
from fiddler_opt.solve.problem import Problem
from fiddler_run.plan.schema import Budget, Workload

MACHINE = Path(__file__).parents[1] / "profiles" / "rtx4090.machine.yaml"
WORKLOAD = Workload(
    prompt_tokens=512, output_tokens=128, num_beams=1, batch_size=1, max_seq_len=4096
)
GPU_BYTES = 24 * 10**9
HOST_BYTES = 60 * 10**9
DISK_BYTES_PER_S = 3e9
LARGE = {
    "num_hidden_layers": 60,
    "num_local_experts": 128,
    "num_experts_per_tok": 8,
    "hidden_size": 2048,
    "intermediate_size": 1536,
}
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
        products = {
            (e, f): weights[e] * weights[f] for e, f in combinations(range(shape.num_experts), 2)
        }
        chances = {both: product / sum(products.values()) for both, product in products.items()}
        chosen = [0.0] * shape.num_experts
        for both, chance in chances.items():
            for e in both:
                chosen[e] += chance * shape.num_experts_per_tok / 2
        expert.append([min(1.0, chance) for chance in chosen])
        pair.append(chances if shape.num_experts_per_tok == 2 else {})
    return Routing("benchmark", PhaseRouting(expert, pair), PhaseRouting(expert, pair))


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    machine = MachineProfile.load(MACHINE).model_copy(update={"disk_bytes_per_s": DISK_BYTES_PER_S})
    mixtral = ModelSpec.load(DEFAULT_MODEL)
    large = ModelSpec.from_config(
        {**mixtral.config.raw, **LARGE}, "60 layers of 128 experts", "here"
    )
    table = Table(
        "model",
        "routing",
        "host memory",
        "solver",
        "in total",
        "gap",
        "tokens/s",
        "greedy",
        "best alternative",
    )
    for model, skew, host_bytes in (
        (mixtral, 0, None),
        (mixtral, 3, None),
        (mixtral, 3, HOST_BYTES),
        (large, 0, None),
        (large, 3, None),
        (large, 3, HOST_BYTES),
    ):
        routing = skewed_routing(model, skew)
        started = time.perf_counter()
        budget = Budget(gpu_bytes=GPU_BYTES, host_bytes=host_bytes)
        plan = compile_plan(model, machine, routing, WORKLOAD, budget, MADE)
        seconds = time.perf_counter() - started
        plan = compared(plan, Problem.of(plan, model, machine), routing)
        predicted = plan.predicted
        rates = {name: other.decode_tokens_per_s for name, other in predicted.alternatives.items()}
        best = max(rates, key=rates.get)
        table.add_row(
            model.shape.name,
            "skewed" if skew else "uniform",
            f"{host_bytes / 1e9:.0f} GB" if host_bytes else "enough",
            f"{plan.provenance.solve_s:.2f} s",
            f"{seconds:.2f} s",
            f"{predicted.gap:.4%}",
            f"{predicted.decode_tokens_per_s:.2f}",
            f"{rates['greedy']:.2f}",
            f"{best} {rates[best]:.2f}",
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
