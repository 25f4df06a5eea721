"""The flags of fiddler-run."""

import argparse
from importlib.metadata import version


class PrintVersion(argparse.Action):
    """Prints the installed version and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"{parser.prog} {version('fiddler-opt')}", flush=True)
        parser.exit()


def add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--version", action=PrintVersion, nargs=0, help="print the version and exit"
    )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the command line. Exits with status 2 on errors."""
    parser = argparse.ArgumentParser(
        prog="fiddler-run",
        description=(
            "Run a Mixture-of-Experts model as a plan says: experts in GPU memory, over the link"
            " and on the CPU at once."
        ),
    )
    parser.add_argument(
        "prompt",
        nargs="?",
        help="the prompt; `-` reads it from stdin; put `--` before one that begins with a dash",
    )
    add_version(parser)
    _add_model(parser)
    _add_generation(parser)
    _add_bench(parser)
    flags = parser.parse_args(arguments)
    _refuse_contradictions(parser, flags)
    return flags


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--plan", required=True, help="plan file written by `fiddler-opt plan`")
    add(
        "--model",
        help="checkpoint folder or Hugging Face id (default: the one that the plan names)",
    )
    add(
        "--load-format",
        choices=["safetensors", "dummy"],
        default="safetensors",
        help=(
            "`dummy` uses random weights, to try a plan's speed and memory without the"
            " checkpoint (default: %(default)s)"
        ),
    )
    add(
        "--disk-folder",
        metavar="DIR",
        help=(
            "folder for experts that the plan leaves on disk (default: the checkpoint's folder"
            " or, for random weights, the working directory)"
        ),
    )
    add(
        "--dry-run",
        action="store_true",
        help="list everything that would stop the plan from running on this machine; load nothing",
    )


def _add_generation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help=(
            "generate at most this many tokens (default: the plan's output tokens, or fewer"
            " if its context has no room for them)"
        ),
    )
    add(
        "--num-beams",
        type=positive,
        metavar="N",
        help="number of beams; 1 turns beam search off (default: the plan's)",
    )
    add(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="sampling temperature; 0 is greedy (default: %(default)s)",
    )
    add(
        "--top-p",
        type=probability,
        metavar="P",
        help=(
            "sample from the most likely tokens whose probabilities add up to P (default: the"
            " checkpoint's, else 1.0)"
        ),
    )
    add("--seed", type=seed, metavar="N", help="seed for sampling (default: random)")
    add("--chat", action="store_true", help="wrap the prompt in the tokenizer's chat template")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--bench",
        action="store_true",
        help="instead of a prompt: benchmark on random token ids, and break down the time",
    )
    add(
        "--prompt-tokens",
        type=positive,
        metavar="N",
        help="with --bench: length of the prompt (default: the plan's)",
    )
    add(
        "--batch-size",
        type=positive,
        metavar="N",
        help="with --bench: sequences at once (default: the plan's)",
    )
    add("--json", metavar="FILE", help="with --bench: write all measurements to this file")
    add(
        "--trace",
        metavar="FILE",
        help="with --bench: write a timeline to this file, for chrome://tracing or ui.perfetto.dev",
    )


def _refuse_contradictions(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    """Exits with status 2 if flags exclude each other."""
    if [flags.prompt is not None, flags.bench, flags.dry_run].count(True) != 1:
        parser.error("give exactly one of: a prompt, --bench, --dry-run")
    if flags.bench:
        if flags.temperature or flags.top_p is not None or flags.seed is not None or flags.chat:
            parser.error(
                "--bench is greedy, on random token ids: --temperature, --top-p, --seed and --chat"
                " apply only to a prompt"
            )
        if flags.max_new_tokens == 1:
            parser.error("--bench measures decode: --max-new-tokens must be at least 2")
        if flags.json is not None and flags.json == flags.trace:
            parser.error("--json and --trace need different files")
    elif any(
        value is not None
        for value in (flags.prompt_tokens, flags.batch_size, flags.json, flags.trace)
    ):
        parser.error("--prompt-tokens, --batch-size, --json and --trace apply only with --bench")


def positive(text: str) -> int:
    value = int(text)
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError("must be from 1 to 2147483647")
    return value


def temperature(text: str) -> float:
    value = float(text)
    if value != 0 and not 1e-4 <= value <= 1e4:  # dividing logits by less overflows
        raise argparse.ArgumentTypeError("must be 0, or from 0.0001 to 10000")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError("must be from 0 to 2^63 - 1")
    return value


def probability(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return value
