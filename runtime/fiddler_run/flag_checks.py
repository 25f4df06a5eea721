"""Refuses flags of fiddler-run that exclude each other."""

import argparse
import sys
from typing import TextIO

from fiddler_run.serving.address import is_loopback


def refuse_contradictions(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    """Exits with status 2 if flags exclude each other."""
    flags.talks = False
    if flags.join is not None:
        allowed = ("join", "rank", "model", "disk_folder", "talks")
        others = {name for name, value in vars(flags).items() if value != parser.get_default(name)}
        if others - set(allowed):
            parser.error("--join goes with --rank, --model and --disk-folder alone")
        return
    if flags.plan is None:
        parser.error("the following arguments are required: --plan")
    named = (flags.prompt, flags.perplexity)
    uses = [flags.bench, flags.dry_run, flags.serve, *(each is not None for each in named)].count(
        True
    )
    flags.talks = uses == 0 and _is_terminal(sys.stdin) and _is_terminal(sys.stdout)
    if uses > 1 or (uses == 0 and not flags.talks):
        parser.error("give exactly one of: a prompt, --serve, --bench, --perplexity, --dry-run")
    _refuse_server_flags(parser, flags)
    if flags.rank != parser.get_default("rank"):
        parser.error("--rank applies only with --join")
    _refuse_unused_generation_flags(parser, flags)
    if flags.lookup and (flags.bench or flags.perplexity is not None or flags.dry_run):
        parser.error("--lookup applies only to a prompt, chat and server")
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


def _refuse_unused_generation_flags(
    parser: argparse.ArgumentParser, flags: argparse.Namespace
) -> None:
    """Exits with status 2 if a flag would change nothing."""
    names = ("max_new_tokens", "num_beams", "temperature", "top_p", "seed", "template")
    given = flags.chat or any(getattr(flags, name) is not None for name in names)
    if given and (flags.perplexity is not None or flags.dry_run):
        parser.error("--perplexity and --dry-run generate no text: flags for that do not apply")
    if flags.prompt is None:
        return
    if flags.template is not None and not flags.chat:
        parser.error("--template applies to a prompt only with --chat")
    if not flags.temperature and (flags.top_p is not None or flags.seed is not None):
        parser.error("--top-p and --seed apply to a prompt only with --temperature above 0")


def _refuse_server_flags(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    """Exits with status 2 if the server's flags do not fit together."""
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("host", "port", "api_key", "no_api_key")
        if getattr(flags, name) != parser.get_default(name)
    ]
    if given and not flags.serve:
        parser.error(f"{given[0]} applies only with --serve")
    if flags.no_api_key and flags.api_key not in (None, parser.get_default("api_key")):
        parser.error("--api-key and --no-api-key exclude each other")
    flags.api_key = None if flags.no_api_key else flags.api_key or None
    if flags.serve and not is_loopback(flags.host) and not (flags.api_key or flags.no_api_key):
        parser.error(
            f"--host {flags.host} can be reached by others: give --api-key, or allow everyone with"
            " --no-api-key"
        )


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()
