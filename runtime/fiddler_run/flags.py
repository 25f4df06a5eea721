"""The flags of fiddler-run."""

import argparse
import os
from importlib.metadata import version

from fiddler_run.flag_checks import refuse_contradictions
from fiddler_run.flag_types import address, port, positive, probability, seed, temperature


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
        help=(
            "the prompt; `-` reads it from stdin; put `--` before one that begins with a dash;"
            " without one, on a terminal: chat"
        ),
    )
    add_version(parser)
    _add_model(parser)
    _add_generation(parser)
    _add_server(parser)
    _add_bench(parser)
    _add_ranks(parser)
    flags = parser.parse_args(arguments)
    refuse_contradictions(parser, flags)
    return flags


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--plan", help="plan file written by `fiddler-opt plan`")
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
        metavar="T",
        help=(
            "sampling temperature; 0 is greedy (default: 0 for a prompt; in chat and server, the"
            " checkpoint's, else 1)"
        ),
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
    add(
        "--lookup",
        action="store_true",
        help=(
            "where a text repeats itself or the prompt, propose several tokens and check them in"
            " one pass, as long as that is faster; for a prompt, chat and server"
        ),
    )
    add("--chat", action="store_true", help="wrap the prompt in the tokenizer's chat template")
    add(
        "--template",
        metavar="FILE",
        help="chat template (Jinja), in place of the tokenizer's, for --chat, chat and server",
    )


def _add_server(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--serve",
        action="store_true",
        help="instead of a prompt: serve the OpenAI API, and a page for a browser",
    )
    add("--host", default="127.0.0.1", help="with --serve: address (default: %(default)s)")
    add("--port", type=port, default=8000, help="with --serve: port (default: %(default)s)")
    add(
        "--api-key",
        default=os.environ.get("FIDDLER_API_KEY"),
        metavar="KEY",
        help=(
            "with --serve: answer only those who send this key (default: the environment variable"
            " FIDDLER_API_KEY)"
        ),
    )
    add(
        "--no-api-key",
        action="store_true",
        help="with --serve: let everyone who reaches another --host than this machine's use it",
    )


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
    add(
        "--perplexity",
        metavar="FILE",
        help="instead of a prompt: print how well the model predicts this text",
    )
    add("--json", metavar="FILE", help="with --bench: write all measurements to this file")
    add(
        "--trace",
        metavar="FILE",
        help="with --bench: write a timeline to this file, for chrome://tracing or ui.perfetto.dev",
    )


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--listen",
        type=address,
        metavar="ADDRESS:PORT",
        help=(
            "for a plan with ranks on other machines: wait for them at this address. Everyone who"
            " reaches it can take part: use it in a trusted network only"
        ),
    )
    add(
        "--join",
        type=address,
        metavar="ADDRESS:PORT",
        help=(
            "instead of a plan: be a rank of the plan that runs on another machine, with this"
            " address at --listen"
        ),
    )
    add(
        "--rank",
        type=positive,
        default=1,
        metavar="N",
        help="with --join: the number of the rank (default: %(default)s)",
    )
