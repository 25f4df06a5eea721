"""Decode on a busy machine: `python benchmarks/busy.py [--json FILE]`.

The demo model with one CPU thread and with one for each core, in turn: alone, and beside as many programs as there are cores,
each of which would take a whole core. What counts is the ratio of the two beside those programs.
"""

import os

from fiddler_run.command import GOMP_SPINCOUNT

os.environ.setdefault("GOMP_SPINCOUNT", GOMP_SPINCOUNT)  # as the command does, before PyTorch is imported

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch

from fiddler_run import load_model
from fiddler_run.files import write_whole
from fiddler_run.generate import Options, generate_ids, never_stopping
from fiddler_run.host import num_cores
from fiddler_run.locate import shipped_file
from fiddler_run.plan import Plan

ROUNDS, NEW_TOKENS = 5, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write all samples there")
    flags = parser.parse_args()
    plan_path = shipped_file("plans/demo.yaml")
    plan = Plan.load(plan_path)
    checkpoint = plan_path.parent / plan.model.name
    threads = sorted({1, num_cores()})
    models = {count: load_model(plan.model_copy(update={"cpu_threads": count}), checkpoint)[0] for count in threads}
    samples = {name: {count: [] for count in threads} for name in ("alone", "beside others")}
    for _ in range(ROUNDS):
        for name, others in (("alone", 0), ("beside others", num_cores())):
            with spinning(others):
                for count, model in models.items():
                    samples[name][count].append(tokens_per_s(model))
    rates = {name: {count: median(found) for count, found in by_threads.items()} for name, by_threads in samples.items()}
    print("tokens/s, median of", ROUNDS, "rounds")
    for name, by_threads in rates.items():
        row = ", ".join(f"{count} thread{'s' * (count > 1)} {rate:.1f}" for count, rate in by_threads.items())
        print(f"{name:14} {row}; all threads : one = {by_threads[threads[-1]] / by_threads[1]:.2f}")
    if flags.json is not None:
        write_whole(flags.json, json.dumps(samples, indent=1))


def tokens_per_s(model) -> float:
    ids = torch.arange(3, 19).unsqueeze(0)
    _, measured = generate_ids(model, ids, Options(NEW_TOKENS), **never_stopping(model))
    return measured.decode_tokens_per_s


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """So many processes that never wait for anything."""
    processes = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
