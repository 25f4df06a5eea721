"""The flags of fiddler-run."""

import argparse
import os
import sys
from importlib.metadata import version
from typing import TextIO

from fiddler_run.flag_types import port, positive, probability, seed, temperature
from fiddler_run.serving.address import is_loopback


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


def _refuse_contradictions(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    """Exits with status 2 if flags exclude each other."""
    named = (flags.prompt, flags.perplexity)
    uses = [flags.bench, flags.dry_run, flags.serve, *(each is not None for each in named)].count(
        True
    )
    flags.talks = uses == 0 and _is_terminal(sys.stdin) and _is_terminal(sys.stdout)
    if uses > 1 or (uses == 0 and not flags.talks):
        parser.error("give exactly one of: a prompt, --serve, --bench, --perplexity, --dry-run")
    _refuse_server_flags(parser, flags)
    if (flags.serve or flags.talks) and (flags.chat or flags.num_beams not in (None, 1)):
        parser.error("--chat and --num-beams do not apply to chat and server")
    if flags.bench:
        sampling = (flags.temperature, flags.top_p, flags.seed, flags.template)
        if flags.chat or any(value is not None for value in sampling):
            parser.error(
                "--bench is greedy, on random token ids: --temperature, --top-p, --seed, --chat and"
                " --template do not apply"
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


def _refuse_server_flags(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    """Exits with status 2 if the server's flags do not fit together."""
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("host", "port", "api_key", "no_api_key")
        if getattr(flags, name) != parser.get_default(name)
    ]
    if given and not flags.serve:
        parser.error(f"{given[0]} applies only with --serve")
    flags.api_key = None if flags.no_api_key else flags.api_key or None
    if flags.serve and not is_loopback(flags.host) and not (flags.api_key or flags.no_api_key):
        parser.error(
            f"--host {flags.host} can be reached by others: give --api-key, or allow everyone with"
            " --no-api-key"
        )


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()
