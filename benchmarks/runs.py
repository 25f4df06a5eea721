"""Runs plans on random prompts."""

import argparse
import gc
from pathlib import Path
from statistics import median

import torch

from fiddler_opt.inputs.model import DEFAULT_MODEL
from fiddler_opt.measure.machine import release_gpu_memory
from fiddler_run import load_model
from fiddler_run.generation.generate import Measured, generate_ids, never_stopping
from fiddler_run.generation.model import PlannedModel
from fiddler_run.generation.sampling import Options
from fiddler_run.plan.schema import Plan

PROVENANCE = dict.fromkeys(
    ("command", "machine", "machine_sha256", "machine_source", "routing", "created"), "benchmark"
)
REPEATS = 2
DEFAULT = "(default: %(default)s)"


def arguments_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments shared by all benchmarks of plans."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--machine", required=True, metavar="FILE", help="machine profile")
    add("--model", default=DEFAULT_MODEL, help=f"checkpoint folder or Hugging Face id {DEFAULT}")
    add("--load-format", default="dummy", choices=["dummy", "safetensors"], help=DEFAULT)
    add("-o", "--output", required=True, metavar="FOLDER")
    return parser


def load(plan: Plan, flags: argparse.Namespace) -> PlannedModel:
    """Loads the model of `flags` with a plan.

    Frees the previous model's memory first; the caller must hold no reference to it.
    """
    forget()
    model, _ = load_model(plan, flags.model, flags.load_format)
    return model


def forget() -> None:
    """Frees the memory of a model to which no reference is left."""
    gc.collect()
    release_gpu_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def continued(model: PlannedModel, prompt_tokens: int, seed: int, options: Options) -> Measured:
    """Continues a random prompt. Returns the measurements."""
    ids = random_ids(model, prompt_tokens, seed)
    _, measured = generate_ids(model, ids, options, **never_stopping(model))
    return measured


def repeated(model: PlannedModel, prompt_tokens: int, tokens: int) -> list[Measured]:
    """A few runs, after a short one that warms up."""
    continued(model, prompt_tokens, 0, Options(4))
    return [continued(model, prompt_tokens, seed, Options(tokens)) for seed in range(REPEATS)]


def first_token_s(model: PlannedModel, prompt_tokens: int) -> float:
    """The median of a few runs, after one that warms up."""
    runs = [continued(model, prompt_tokens, seed, Options(2)) for seed in range(1 + REPEATS)]
    return median(run.ttft_s for run in runs[1:])


def random_ids(model: PlannedModel, tokens: int, seed: int) -> torch.Tensor:
    """Token ids [1, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (1, tokens), generator=generator)


def resident_set_bytes() -> int:
    """Bytes of memory of this process that are in RAM."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024
