"""What a plan is run for, besides a prompt and a chat: check, server, benchmark, perplexity."""

import argparse
import shlex
import sys
from pathlib import Path

from rich.console import Console

from fiddler_run.errors import FiddlerError
from fiddler_run.generation.report import figures, parts, rates
from fiddler_run.serving.address import Address
from fiddler_run.system.files import write_whole
from fiddler_run.system.progress import byte_progress


def dry_run(path: Path, flags: argparse.Namespace, stderr: Console) -> None:
    """Prints everything that would stop the plan from running on this machine.

    Raises:
        FiddlerError: something would.
    """
    from fiddler_run.loading.check import check_plan
    from fiddler_run.loading.model_check import NOT_HERE

    with stderr.status("checking"):
        problems, notes = check_plan(path, flags.model, flags.load_format, flags.disk_folder)
    for problem in problems:
        print(problem)
    for note in notes:
        stderr.print(f"note: {note}", style="yellow")
    if problems:
        number = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise FiddlerError(f"{path}: cannot run here: {number}, listed above")
    only_config = any(NOT_HERE in note for note in notes)
    fitted = "its model's config.json" if only_config else "its model"
    print(f"{path} fits {fitted} and this machine")


def run_server(flags: argparse.Namespace, loader, stderr: Console) -> None:
    """Serves the model until the process is told to end."""
    from fiddler_run.serving.requests import Defaults
    from fiddler_run.serving.serve import serve

    defaults = Defaults(
        flags.max_new_tokens, flags.temperature, flags.top_p, flags.seed, flags.lookup
    )
    progress = byte_progress(stderr)
    task = progress.add_task("loading experts", total=loader.plan.expert_bytes)

    def listening(url: str) -> None:
        print(url, flush=True)
        progress.start()

    def ready() -> None:
        progress.stop()
        stderr.print("ready; Ctrl-C ends the server")

    try:
        serve(
            loader,
            defaults,
            Address(flags.host, flags.port, flags.api_key),
            listening,
            lambda loaded_bytes: progress.update(task, completed=loaded_bytes),
            ready,
        )
    finally:
        progress.stop()


def run_bench(flags: argparse.Namespace, model, options, load_s: float, stderr: Console) -> None:
    from fiddler_run.engine.timeline import write_trace
    from fiddler_run.generation.bench import as_json, bench

    plan = model.plan
    with stderr.status("measuring"):
        prompt_tokens = flags.prompt_tokens or plan.workload.prompt_tokens
        batch_size = flags.batch_size or plan.workload.batch_size
        result, spans = bench(
            model, prompt_tokens, options.max_new_tokens, options.num_beams, batch_size
        )
    stderr.print(figures(plan, result.measured))
    stderr.print(parts(plan, result))
    stderr.print(rates(plan, result))
    if flags.json is not None:
        write_whole(
            flags.json, as_json(result, plan, load_s, shlex.join(["fiddler-run", *sys.argv[1:]]))
        )
        print(flags.json)
    if flags.trace is not None:
        write_trace(spans, flags.trace)
        print(flags.trace)


def encode_text(loader, text: str) -> list[int]:
    """The tokens of a text for its perplexity.

    Raises:
        FiddlerError: the tokenizer fails, or the text has a token that the model does not know.
    """
    from fiddler_run.generation.text import token_ids

    return token_ids(loader.tokenizer, text, sys.maxsize, loader.vocab_size, "--perplexity")


def run_perplexity(model, tokenizer, ids: list[int], stderr: Console) -> None:
    from fiddler_run.generation.perplexity import perplexity

    with stderr.status("computing") as status:
        found = perplexity(
            model,
            tokenizer,
            ids,
            lambda done, all_of_them: status.update(f"window {done} of {all_of_them}"),
        )
    error = f" (standard error {found.standard_error:.4f})" if found.tokens > 1 else ""
    tokens = "1 token" if found.tokens == 1 else f"{found.tokens} tokens"
    windows = "1 window" if found.windows == 1 else f"{found.windows} windows"
    print(
        f"perplexity {found.value:.4f}{error},"
        f" {found.bits_per_byte:.4f} bits per byte; {tokens} in {windows} of at most"
        f" {model.plan.workload.max_seq_len}"
    )
