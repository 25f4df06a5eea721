"""fiddler-run: text on stdout; progress, warnings and figures on stderr."""

import argparse
import os
import sys
import time

from rich.console import Console

from fiddler_run.command import exit_status, quitting_at_once
from fiddler_run.errors import FiddlerError
from fiddler_run.flags import parse_arguments
from fiddler_run.generation.report import figures
from fiddler_run.plan.schema import Plan
from fiddler_run.system.files import MAX_TEXT_BYTES, read_text, require_writable
from fiddler_run.system.host import OtherProcesses, num_cores
from fiddler_run.system.locate import shipped_file
from fiddler_run.system.progress import byte_progress
from fiddler_run.uses import dry_run, encode_text, run_bench, run_perplexity, run_server


def main(arguments: list[str] | None = None) -> int:
    return exit_status(lambda: run(parse_arguments(arguments)), "fiddler-run")


def run(flags: argparse.Namespace) -> None:
    stderr = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if flags.join is not None:
        from fiddler_run.loading.rank import run_rank

        run_rank(flags.join, flags.rank, flags.model, flags.disk_folder, stderr.print)
        return
    plan_path = shipped_file(flags.plan)
    if flags.dry_run:
        dry_run(plan_path, flags, stderr)
        return
    plan = Plan.load(plan_path)
    if flags.listen is not None and len(plan.ranks) == 1:
        raise FiddlerError("--listen: the plan has a single rank; remove the flag")
    if len(plan.ranks) > 1:
        # PyTorch warns of a group that the end of the process ends
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    prompt = read_stdin() if flags.prompt == "-" else flags.prompt
    text = None if flags.perplexity is None else read_text(flags.perplexity)
    template = None if flags.template is None else read_text(shipped_file(flags.template))
    for path in (flags.json, flags.trace):
        if path is not None:
            require_writable(path)

    with quitting_at_once("fiddler-run"), stderr.status("importing torch and transformers"):
        from fiddler_run.loading.load import ModelLoader

    loader = ModelLoader(
        plan,
        flags.model,
        flags.load_format,
        flags.disk_folder,
        plan_path,
        flags.listen,
        on_waiting=stderr.print,
    )
    try:
        use(flags, loader, prompt, text, template, stderr)
    finally:
        if loader.peers is not None:
            loader.peers.close()


def use(
    flags: argparse.Namespace,
    loader,
    prompt: str | None,
    text: str | None,
    template: str | None,
    stderr: Console,
) -> None:
    """Does what the flags ask for, once all checks of the loader have passed."""
    if template is not None:
        set_template(loader, template)
    options = checked_options(flags, loader, prompt)  # fails before the long load
    text_ids = None if text is None else encode_text(loader, text)
    if flags.load_format == "dummy" and not flags.bench:
        stderr.print("random weights: the text will be meaningless")
    for note in loader.notes:
        stderr.print(f"note: {note}")
    if flags.serve:
        run_server(flags, loader, stderr)
        return
    use_model(flags, loader, prompt, text_ids, options, stderr)


def use_model(
    flags: argparse.Namespace,
    loader,
    prompt: str | None,
    text_ids: list[int] | None,
    options,
    stderr: Console,
) -> None:
    """Loads the model and does what the flags ask for. Prints figures and notes."""
    from fiddler_run.generation.answer import generate

    plan = loader.plan
    started = time.perf_counter()
    with byte_progress(stderr) as progress:
        task = progress.add_task("loading experts", total=plan.expert_bytes)
        model = loader.load(lambda count: progress.advance(task, count))
    load_s = time.perf_counter() - started
    for note in loader.late_notes:
        stderr.print(f"note: {note}", style="yellow")
    others = OtherProcesses()
    if flags.bench:
        run_bench(flags, model, options, load_s, stderr)
    elif flags.perplexity is not None:
        run_perplexity(model, loader.tokenizer, text_ids, stderr)
    elif flags.talks:
        from fiddler_run.serving.chat import chat

        chat(model, loader.tokenizer, options, flags.max_new_tokens)
    else:
        measured = generate(
            model,
            loader.tokenizer,
            prompt,
            options,
            on_text=lambda text: print(text, end="", flush=True),
        )
        print(flush=True)
        stderr.print(figures(plan, measured))
    if loader.peers is not None:
        return  # the other ranks would count as other programs
    note = busy_note(others.cores(), num_cores(), plan.rank.cpu_threads)
    if note is not None:
        stderr.print(note, style="yellow")


def set_template(loader, template: str) -> None:
    if loader.tokenizer is None:
        raise FiddlerError("--template: there is no tokenizer next to the model's config.json")
    loader.tokenizer.chat_template = template


def checked_options(flags: argparse.Namespace, loader, prompt: str | None):
    """The generation options. Those without a flag come from the plan.

    Raises:
        FiddlerError: the prompt cannot be encoded, the plan has no room for prompt and answer, or
            --lookup does not suit the model or the beams.
    """
    from fiddler_run.generation.generate import (
        check_length,
        check_lookup,
        encode_prompt,
        room_for_answer,
    )
    from fiddler_run.generation.sampling import Options

    plan = loader.plan
    if flags.bench:
        prompt_tokens = flags.prompt_tokens or plan.workload.prompt_tokens
        max_new_tokens = flags.max_new_tokens or plan.workload.output_tokens
        batch_size = flags.batch_size or plan.workload.batch_size
        if max_new_tokens < 2:
            raise FiddlerError(
                "--bench measures decode, but the plan is for a single output token; give"
                " --max-new-tokens"
            )
    elif loader.tokenizer is None:
        raise FiddlerError(
            "--load-format dummy: there is no tokenizer next to the model's config.json, so a"
            " prompt cannot be encoded; use --bench"
        )
    elif flags.serve or flags.talks or flags.perplexity is not None:
        if flags.talks:
            from fiddler_run.serving.chat import require_template

            require_template(loader.tokenizer)
        prompt_tokens = 1
        max_new_tokens = 1
        batch_size = 1
    else:
        ids = encode_prompt(loader.tokenizer, prompt, flags.chat, plan, loader.vocab_size)
        prompt_tokens = ids.shape[1]
        max_new_tokens = flags.max_new_tokens or room_for_answer(prompt_tokens, plan)
        batch_size = 1
    talks = flags.serve or flags.talks
    recommended = loader.defaults.temperature if talks else 0.0
    temperature = flags.temperature
    if temperature is None:
        temperature = 1.0 if recommended is None else recommended
    options = Options(
        max_new_tokens=max_new_tokens,
        num_beams=1 if talks else flags.num_beams or plan.workload.num_beams,
        temperature=temperature,
        top_p=flags.top_p,
        seed=flags.seed,
        chat=flags.chat,
        lookup=flags.lookup,
    )
    check_lookup(loader.skeleton, options)
    check_length(prompt_tokens, options, plan, batch_size)
    return options


def busy_note(others: float | None, cores: int, threads: int) -> str | None:
    """A note if other programs used so many cores that the plan's threads had to wait."""
    if others is None or others < 0.25 or others + threads <= cores + 0.25:
        return None
    return (
        f"note: other programs used {others:.1f} of {cores} cores, and the plan needs {threads}:"
        " each layer waits for its slowest thread; close those programs to reach the plan's speed"
    )


def read_stdin() -> str:
    """All of stdin, without the newline that ends its last line.

    Raises:
        FiddlerError: stdin is closed, is not UTF-8 text, or is too large for a prompt.
    """
    if sys.stdin is None:
        raise FiddlerError("the prompt should come from stdin, but stdin is closed")
    content = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise FiddlerError(
            f"the prompt on stdin is larger than {MAX_TEXT_BYTES / 1e6:g} MB; shorten it"
        )
    try:
        return content.decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError:
        raise FiddlerError("the prompt on stdin is not UTF-8 text") from None


if __name__ == "__main__":
    sys.exit(main())
