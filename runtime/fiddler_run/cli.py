"""fiddler-run: text on stdout; progress, warnings and figures on stderr."""

import argparse
import os
import shlex
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from fiddler_run.command import exit_status, quitting_at_once
from fiddler_run.errors import FiddlerError
from fiddler_run.files import MAX_TEXT_BYTES, require_writable, write_whole
from fiddler_run.host import OtherProcesses, num_cores
from fiddler_run.locate import shipped_file
from fiddler_run.plan import Plan
from fiddler_run.report import figures, parts, rates


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fiddler-run",
        description="Run a Mixture-of-Experts model as a plan says: experts in GPU memory, over the link and on the CPU at once.",
    )
    add = parser.add_argument
    add("prompt", nargs="?", help="the prompt; `-` reads it from stdin; put `--` before one that begins with a dash")
    add("--plan", required=True, help="plan file written by `fiddler-opt plan`")
    add("--model", help="checkpoint folder or Hugging Face id (default: the one that the plan names)")
    add(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="generate at most this many tokens (default: the plan's output tokens, or what its context has room for)",
    )
    add(
        "--num-beams",
        type=positive,
        metavar="N",
        help="beam search with so many beams, 1 is none (default: the plan's)",
    )
    add(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="0 is greedy, more samples (default: %(default)s)",
    )
    add(
        "--top-p",
        type=probability,
        metavar="P",
        help="sample from the likeliest tokens of this total probability (default: the checkpoint's, else 1.0)",
    )
    add("--seed", type=seed, metavar="N", help="seed of sampling (default: another one each time)")
    add("--chat", action="store_true", help="wrap the prompt in the tokenizer's chat template")
    add(
        "--load-format",
        choices=["safetensors", "dummy"],
        default="safetensors",
        help="`dummy` takes random weights, to try a plan's speed and memory without the checkpoint (default: %(default)s)",
    )
    add(
        "--disk-folder",
        metavar="DIR",
        help="where experts lie that the plan leaves on disk (default: the checkpoint's folder, for random weights this one)",
    )
    add("--bench", action="store_true", help="instead of a prompt: measure speeds, on random token ids, and what time goes into")
    add("--prompt-tokens", type=positive, metavar="N", help="with --bench: length of the prompt (default: the plan's)")
    add("--batch-size", type=positive, metavar="N", help="with --bench: sequences at once (default: the plan's)")
    add("--json", metavar="FILE", help="with --bench: write all figures there")
    add("--trace", metavar="FILE", help="with --bench: write a timeline there, for chrome://tracing or ui.perfetto.dev")
    flags = parser.parse_args(arguments)
    refuse_contradictions(parser, flags)
    return flags


def refuse_contradictions(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    """Ends the program, with status 2, where flags exclude each other."""
    if flags.bench == (flags.prompt is not None):
        parser.error("give either a prompt or --bench")
    if flags.bench:
        if flags.temperature or flags.top_p is not None or flags.seed is not None or flags.chat:
            parser.error("--bench is greedy, on random token ids: --temperature, --top-p, --seed and --chat belong to a prompt")
        if flags.max_new_tokens == 1:
            parser.error("--bench measures decode: --max-new-tokens must be at least 2")
        if flags.json is not None and flags.json == flags.trace:
            parser.error("--json and --trace need a file each")
    elif any(value is not None for value in (flags.prompt_tokens, flags.batch_size, flags.json, flags.trace)):
        parser.error("--prompt-tokens, --batch-size, --json and --trace belong to --bench")


def positive(text: str) -> int:
    value = int(text)
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError("must be from 1 to 2147483647")
    return value


def temperature(text: str) -> float:
    value = float(text)
    if value != 0 and not 1e-4 <= value <= 1e4:  # logits divided by less are no numbers any more
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


def main(arguments: list[str] | None = None) -> int:
    return exit_status(lambda: run(parse_arguments(arguments)), "fiddler-run")


def run(flags: argparse.Namespace) -> None:
    stderr = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    plan_path = shipped_file(flags.plan)
    plan = Plan.load(plan_path)
    prompt = read_stdin() if flags.prompt == "-" else flags.prompt
    for path in (flags.json, flags.trace):
        if path is not None:
            require_writable(path)

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with quitting_at_once("fiddler-run"), stderr.status("importing torch and transformers"):
        from fiddler_run.generate import generate
        from fiddler_run.load import ModelLoader

    loader = ModelLoader(plan, flags.model, flags.load_format, flags.disk_folder, plan_path)
    options = checked_options(flags, loader, prompt)  # better refused now than after loading
    if flags.load_format == "dummy" and not flags.bench:
        stderr.print("random weights: the text will mean nothing")
    for note in loader.notes:
        stderr.print(note)
    started = time.perf_counter()
    with byte_progress(stderr) as progress:
        task = progress.add_task("loading experts", total=loader.total_bytes)
        model = loader.load(lambda count: progress.advance(task, count))
    load_s = time.perf_counter() - started
    others = OtherProcesses()
    if flags.bench:
        run_bench(flags, model, options, load_s, stderr)
    else:
        measured = generate(model, loader.tokenizer, prompt, options, on_text=lambda text: print(text, end="", flush=True))
        print(flush=True)
        stderr.print(figures(plan, measured))
    note = busy_note(others.cores(), num_cores(), plan.cpu_threads)
    if note is not None:
        stderr.print(note, style="yellow")


def checked_options(flags: argparse.Namespace, loader, prompt: str | None):
    """How to generate, with what a flag leaves open from the plan.

    Raises:
        FiddlerError: the prompt cannot be encoded, or the plan has no room for it and its answer.
    """
    from fiddler_run.generate import Options, check_length, encode_prompt, room_for_answer

    plan = loader.plan
    if flags.bench:
        prompt_tokens = flags.prompt_tokens or plan.workload.prompt_tokens
        max_new_tokens = flags.max_new_tokens or plan.workload.output_tokens
        batch_size = flags.batch_size or plan.workload.batch_size
        if max_new_tokens < 2:
            raise FiddlerError("--bench measures decode, but the plan is for a single output token; give --max-new-tokens")
    elif loader.tokenizer is None:
        raise FiddlerError("--load-format dummy: there is no tokenizer for a prompt beside the model's config.json; use --bench")
    else:
        ids = encode_prompt(loader.tokenizer, prompt, flags.chat, plan, loader.vocab_size)
        prompt_tokens = ids.shape[1]
        max_new_tokens = flags.max_new_tokens or room_for_answer(prompt_tokens, plan)
        batch_size = 1
    options = Options(
        max_new_tokens=max_new_tokens,
        num_beams=flags.num_beams or plan.workload.num_beams,
        temperature=flags.temperature,
        top_p=flags.top_p,
        seed=flags.seed,
        chat=flags.chat,
    )
    check_length(prompt_tokens, options, plan, batch_size)
    return options


def busy_note(others: float | None, cores: int, threads: int) -> str | None:
    """What to say if other programs took so much of the cores' time that the plan's threads had to wait for them."""
    if others is None or others < 0.25 or others + threads <= cores + 0.25:
        return None
    return (
        f"note: other programs took {others:.1f} of {cores} cores, the plan counts on {threads}: "
        "each layer waits for its slowest thread; close them for the plan's speed"
    )


def run_bench(flags: argparse.Namespace, model, options, load_s: float, stderr: Console) -> None:
    from fiddler_run.bench import as_json, bench
    from fiddler_run.timeline import write_trace

    plan = model.plan
    with stderr.status("measuring"):
        prompt_tokens = flags.prompt_tokens or plan.workload.prompt_tokens
        batch_size = flags.batch_size or plan.workload.batch_size
        result, spans = bench(model, prompt_tokens, options.max_new_tokens, options.num_beams, batch_size)
    stderr.print(figures(plan, result.measured))
    stderr.print(parts(plan, result))
    stderr.print(rates(plan, result))
    if flags.json is not None:
        write_whole(flags.json, as_json(result, plan, load_s, shlex.join(["fiddler-run", *sys.argv[1:]])))
        print(flags.json)
    if flags.trace is not None:
        write_trace(spans, flags.trace)
        print(flags.trace)


def read_stdin() -> str:
    """All of stdin, without the newline that ends its last line.

    Raises:
        FiddlerError: stdin is closed, no UTF-8 text, or larger than any prompt.
    """
    if sys.stdin is None:
        raise FiddlerError("the prompt is to come from stdin, which is closed")
    content = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise FiddlerError(f"the prompt on stdin is larger than {MAX_TEXT_BYTES / 1e6:g} MB; shorten it")
    try:
        return content.decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError:
        raise FiddlerError("the prompt on stdin is not UTF-8 text") from None


def byte_progress(console: Console) -> Progress:
    """A bar of bytes with their rate and the time left."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console)


if __name__ == "__main__":
    sys.exit(main())
