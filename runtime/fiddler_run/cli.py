"""fiddler-run: text on stdout; progress, warnings and figures on stderr."""

import argparse
import os
import sys

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from fiddler_run.errors import FiddlerError
from fiddler_run.locate import shipped_file
from fiddler_run.plan import Plan


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fiddler-run",
        description="Run a Mixture-of-Experts model as a plan says: experts in GPU memory, over the link and on the CPU at once.",
    )
    add = parser.add_argument
    add("prompt", help="the prompt; `-` reads it from stdin")
    add("--plan", required=True, help="plan file written by `fiddler-opt plan`")
    add("--model", help="checkpoint folder or Hugging Face id (default: the one that the plan names)")
    add(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="generate at most so many tokens (default: the plan's output tokens)",
    )
    add(
        "--num-beams",
        type=positive,
        metavar="N",
        help="beam search with so many beams, 1 is none (default: the plan's)",
    )
    add(
        "--temperature",
        type=non_negative,
        default=0.0,
        metavar="T",
        help="0 is greedy, more samples (default: %(default)s)",
    )
    add(
        "--top-p",
        type=probability,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens of this total probability (default: %(default)s)",
    )
    add("--seed", type=seed, metavar="N", help="seed of sampling (default: another one each time)")
    add("--chat", action="store_true", help="wrap the prompt in the tokenizer's chat template")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def non_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("must be 0 or more")
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


def exit_status(command, name: str) -> int:
    """Runs a command: 0 done, 1 a FiddlerError said in one line, 130 interrupted; anything else keeps its traceback."""
    try:
        command()
    except FiddlerError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout went away, as in `fiddler-run ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def run(flags: argparse.Namespace) -> None:
    stderr = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    plan_path = shipped_file(flags.plan)
    plan = Plan.load(plan_path)
    prompt = read_stdin() if flags.prompt == "-" else flags.prompt

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with stderr.status("importing torch and transformers"):
        from fiddler_run.generate import Options, encode_prompt, generate
        from fiddler_run.model import ModelLoader

    options = Options(
        max_new_tokens=flags.max_new_tokens or plan.workload.output_tokens,
        num_beams=flags.num_beams or plan.workload.num_beams,
        temperature=flags.temperature,
        top_p=flags.top_p,
        seed=flags.seed,
        chat=flags.chat,
    )
    loader = ModelLoader(plan_path, flags.model)
    encode_prompt(loader.tokenizer, prompt, options, plan)  # better refused now than after loading
    if plan.gpu_memory_bytes.total > 0 and loader.device.type == "cpu":
        reason = "the plan is for a machine without CUDA" if plan.device == "host" else "no CUDA device here"
        stderr.print(f"{reason}: its GPU part is held in host memory and computed by the CPU")
    with byte_progress(stderr) as progress:
        task = progress.add_task("loading experts", total=loader.total_bytes)
        model = loader.load(lambda count: progress.advance(task, count))
    measured = generate(model, loader.tokenizer, prompt, options, on_text=lambda text: print(text, end="", flush=True))
    print(flush=True)
    stderr.print(figures(plan, measured))


def read_stdin() -> str:
    """All of stdin, without the newline that ends its last line."""
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError:
        raise FiddlerError("the prompt on stdin is not UTF-8 text") from None


def byte_progress(console: Console) -> Progress:
    """A bar of bytes with their rate and the time left."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console)


def figures(plan: Plan, measured) -> Table:
    """What was measured beside what the plan predicts for its own workload."""
    predicted, workload = plan.predicted, plan.workload
    table = Table(title=f"{measured.prompt_tokens} prompt + {measured.output_tokens} output tokens", title_justify="left")
    for column in ("", "measured", f"plan ({workload.prompt_tokens} + {workload.output_tokens})"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("time to first token", f"{measured.ttft_s:.3f} s", f"{predicted.ttft_s:.3f} s")
    table.add_row("decode", f"{measured.decode_tokens_per_s:.2f} tokens/s", f"{predicted.decode_tokens_per_s:.2f} tokens/s")
    table.add_row("GPU hit rate", f"{measured.gpu_hit_rate:.1%}", f"{predicted.gpu_hit_rate:.1%}")
    if measured.peak_gpu_bytes:
        allowed = plan.gpu_memory_bytes.total - plan.gpu_memory_bytes.reserve
        table.add_row("GPU memory, peak", f"{measured.peak_gpu_bytes / 1e9:.2f} GB", f"{allowed / 1e9:.2f} GB")
    return table


if __name__ == "__main__":
    sys.exit(main())
