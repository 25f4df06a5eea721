"""Compares decode with and without prompt lookup.

    python benchmarks/lookup.py [--rounds N] [--json FILE]

Answers prompts with the demo model by plain decode and with `--lookup`, in turn, in one process.
The gate is new in each round, as in a new process. `copy` continues a story that the prompt holds
already, `other` one that it does not, `sums` repeats the form of lines, not their numbers. The
ratios of each pair, lookup : plain, are the result.
"""

import os

from fiddler_run.command import GOMP_SPINCOUNT, exit_status

# As the command does, before PyTorch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", GOMP_SPINCOUNT)

import argparse
import json
import sys
from statistics import median

import torch

from fiddler_run import load_model
from fiddler_run.generation.generate import Measured, generate_ids, never_stopping
from fiddler_run.generation.lookup_gate import LookupGate
from fiddler_run.generation.model import PlannedModel
from fiddler_run.generation.sampling import Options
from fiddler_run.system.files import write_whole

BEGINNING = "Once upon a time"
NEW_TOKENS = 120
STORY_TOKENS = 140
BEGUN_TOKENS = 20  # of the copy, in the prompt


def main() -> None:
    flags = parse_arguments()
    model, tokenizer = load_model("plans/demo.yaml")
    samples: dict[str, list[dict[str, float]]] = {}
    for name, ids in prompts(model, tokenizer).items():
        run(model, ids, lookup=False)
        samples[name] = [pair(model, ids, place) for place in range(flags.rounds)]
        ratios = sorted(sample["ratio"] for sample in samples[name])
        print(
            f"{name:6} lookup : plain = {median(ratios):.2f} ({ratios[0]:.2f} to"
            f" {ratios[-1]:.2f}), {median(s['tokens per pass'] for s in samples[name]):.2f} tokens"
            f" per pass, plain {median(s['plain'] for s in samples[name]):.1f} tokens/s"
        )
    if flags.json is not None:
        write_whole(flags.json, json.dumps(samples, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=15, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write all samples there")
    return parser.parse_args()


def prompts(model: PlannedModel, tokenizer) -> dict[str, torch.Tensor]:
    """Token ids [1, n] by the kind of text."""
    beginning = tokenizer(BEGINNING, return_tensors="pt")["input_ids"]
    story, _ = generate_ids(model, beginning, Options(STORY_TOKENS), pad_token_id=0)
    story = story.cpu()
    sums = tokenizer("What is 38 minus 25?", return_tensors="pt")["input_ids"]
    return {
        "copy": torch.cat([story, story[:, 1 : 1 + BEGUN_TOKENS]], dim=1),
        "other": beginning,
        "sums": sums,
    }


def pair(model: PlannedModel, ids: torch.Tensor, place: int) -> dict[str, float]:
    """Tokens/s of both ways; every other time, lookup is first."""
    model.lookup_gate = LookupGate()
    found = {lookup: run(model, ids, lookup) for lookup in (place % 2 == 0, place % 2 == 1)}
    plain = found[False].decode_tokens_per_s
    return {
        "plain": plain,
        "lookup": found[True].decode_tokens_per_s,
        "ratio": found[True].decode_tokens_per_s / plain,
        "tokens per pass": (NEW_TOKENS - 1) / found[True].passes,
    }


def run(model: PlannedModel, ids: torch.Tensor, lookup: bool) -> Measured:
    options = Options(NEW_TOKENS, lookup=lookup)
    return generate_ids(model, ids, options, **never_stopping(model))[1]


if __name__ == "__main__":
    sys.exit(exit_status(main, "lookup.py"))
