"""Measures decode on a busy machine.

    python benchmarks/busy.py [--rounds N] [--json FILE]

Runs the demo model with one CPU thread and with one per core, in turn: first alone, then beside as
many programs as cores, each of which keeps a core busy. The ratio of the two thread counts under
load is the result.
"""

import os

from fiddler_run.command import GOMP_SPINCOUNT, exit_status

# As the command does, before PyTorch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", GOMP_SPINCOUNT)

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch

from fiddler_run import load_model
from fiddler_run.generation.generate import generate_ids, never_stopping
from fiddler_run.generation.model import PlannedModel
from fiddler_run.generation.sampling import Options
from fiddler_run.plan.schema import Plan
from fiddler_run.system.files import write_whole
from fiddler_run.system.host import num_cores
from fiddler_run.system.locate import shipped_file

NEW_TOKENS = 48
Samples = dict[str, dict[int, list[float]]]  # tokens/s by situation and number of CPU threads


def main() -> None:
    flags = parse_arguments()
    plan_path = shipped_file("plans/demo.yaml")
    plan = Plan.load(plan_path)
    checkpoint = plan_path.parent / plan.model.name
    threads = sorted({1, num_cores()})
    models = {count: load_model(with_threads(plan, count), checkpoint)[0] for count in threads}
    situations = {"alone": 0, "beside others": num_cores()}
    samples: Samples = {name: {count: [] for count in threads} for name in situations}
    for _ in range(flags.rounds):
        for name, others in situations.items():
            with spinning(others):
                for count, model in models.items():
                    samples[name][count].append(tokens_per_s(model))
    print_rates(samples, flags.rounds)
    if flags.json is not None:
        write_whole(flags.json, json.dumps(samples, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all samples there")
    return parser.parse_args()


def with_threads(plan: Plan, count: int) -> Plan:
    """The plan with another number of CPU threads."""
    return plan.model_copy(update={"ranks": [plan.rank.model_copy(update={"cpu_threads": count})]})


def tokens_per_s(model: PlannedModel) -> float:
    ids = torch.arange(3, 19).unsqueeze(0)
    _, measured = generate_ids(model, ids, Options(NEW_TOKENS), **never_stopping(model))
    return measured.decode_tokens_per_s


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """Runs `count` processes that never sleep."""
    command = [sys.executable, "-S", "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def print_rates(samples: Samples, rounds: int) -> None:
    print("tokens/s, median of", rounds, "rounds")
    for name, by_threads in samples.items():
        rates = {count: median(found) for count, found in by_threads.items()}
        row = ", ".join(
            f"{count} thread{'s' * (count > 1)} {rate:.1f}" for count, rate in rates.items()
        )
        print(f"{name:14} {row}; all threads : one = {rates[max(rates)] / rates[1]:.2f}")


if __name__ == "__main__":
    sys.exit(exit_status(main, "busy.py"))
