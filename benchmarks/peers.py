"""Compares with other programs that run such models, on the same machine.

    python benchmarks/peers.py --plan bf16.yaml lossless12.yaml --model CONFIG -o FOLDER

- fiddler-run: each plan
- llama.cpp: `llama-bench`, if it is in PATH and --gguf names a BF16 GGUF of the model, such as one
  made by random_gguf.py; with options of its own after `--`
- llama.cpp --fit: the same, but it places the experts by itself; options that place are left out
- fiddler: the original Fiddler, if --fiddler names a clone of it, see peer_fiddler.py
- accelerate: transformers with `device_map` offload, see peer_accelerate.py

They run one after the other in separate processes, with random weights, for one sequence, in the
GPU memory of the first plan. llama.cpp takes as much as its options say: the table shows how much
was in use. Results are added to peers.json, and written to peers.md and peers.png, after each
program.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from process import Failed, Finished, gpu_bytes, run
from table import markdown

from fiddler_run.command import exit_status
from fiddler_run.plan.schema import Plan
from fiddler_run.system.files import write_whole

HERE = Path(__file__).parent
OURS = "fiddler-run"
MEBIBYTE = 2**20
PLACING = ("-ngl", "-ncmoe", "-ot", "-ts")  # options of llama-bench


@dataclass(frozen=True)
class Task:
    """What all programs do. `gpu_bytes`: the memory that they may use. `reserve_bytes`: the part of
    it that PyTorch's allocator does not see.
    """

    prompts: list[int]
    output_tokens: int
    gpu_bytes: int
    reserve_bytes: int
    threads: int


Runner = Callable[[Task, argparse.Namespace, Path], tuple[str, Finished, dict]]


def main() -> None:
    flags = parse_arguments()
    folder = Path(flags.output)
    rank = Plan.load(flags.plan[0]).rank
    memory = rank.gpu_memory_bytes
    task = Task(flags.prompts, flags.output_tokens, memory.total, memory.reserve, rank.cpu_threads)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "peers.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for name, runner in programs(flags):
        print(f"{name} ...", file=sys.stderr)
        try:
            command, finished, measured = runner(task, flags, folder / f"{name}.log")
            found[name] = {
                "command": command,
                **measured,
                "gpu_bytes": finished.gpu_bytes,
                "host_bytes": finished.host_bytes,
            }
        except Failed as error:
            found[name] = {"why_not": str(error)}
        write_whole(file, json.dumps(found, indent=1))
        rows = table(found, flags.prompts)
        write_whole(folder / "peers.md", rows)
        figure(found).savefig(folder / "peers.png", dpi=130)
    print(rows)


def programs(flags: argparse.Namespace) -> Iterator[tuple[str, Runner]]:
    """The chosen programs, by the name of their row."""
    for name in flags.only.split(","):
        if name == OURS:
            yield from ((f"{OURS}, {Path(file).stem}", planned(file)) for file in flags.plan)
        else:
            yield name, PROGRAMS[name]


def planned(file: str) -> Runner:
    def fiddler_run(task: Task, flags: argparse.Namespace, log: Path):
        arguments = ["peer_fiddler_run.py", file, *lengths(task)]
        return script(sys.executable, arguments, log, flags.timeout)

    return fiddler_run


def accelerate(task: Task, flags: argparse.Namespace, log: Path):
    if find_spec("accelerate") is None:
        raise Failed("not installed: pip install accelerate")
    fewer = replace(task, output_tokens=flags.offload_tokens)
    limit = str(task.gpu_bytes - task.reserve_bytes)
    arguments = [flags.model, "--gpu-bytes", limit, *lengths(fewer)]
    return script(sys.executable, ["peer_accelerate.py", *arguments], log, flags.timeout)


def original_fiddler(task: Task, flags: argparse.Namespace, log: Path):
    if flags.fiddler is None:
        raise Failed("no --fiddler given")
    arguments = [flags.fiddler, flags.model, "--gpu-bytes", str(task.gpu_bytes), *lengths(task)]
    return script(flags.fiddler_python, ["peer_fiddler.py", *arguments], log, flags.timeout)


def llama(task: Task, flags: argparse.Namespace, log: Path):
    return llama_bench(task, flags, flags.llama, log)


def fitted_llama(task: Task, flags: argparse.Namespace, log: Path):
    spare = gpu_bytes("memory.total") - task.gpu_bytes
    pairs = zip(flags.llama[::2], flags.llama[1::2], strict=False)
    others = [word for pair in pairs if pair[0] not in PLACING for word in pair]
    return llama_bench(task, flags, ["-fitt", str(-(-spare // MEBIBYTE)), *others], log)


def llama_bench(task: Task, flags: argparse.Namespace, options: list[str], log: Path):
    program = shutil.which("llama-bench")
    if program is None:
        raise Failed("no `llama-bench` in PATH")
    if flags.gguf is None:
        raise Failed("no --gguf given")
    arguments = ["-m", flags.gguf, "-t", str(task.threads), "-p", ",".join(map(str, task.prompts))]
    arguments += ["-n", str(task.output_tokens), *options]
    finished = run([program, *arguments, "-o", "json"], log, flags.timeout)
    tests = read(finished, log)
    if shutil.which("nvidia-smi") and not tests[0]["gpu_info"]:
        raise Failed("llama-bench did not use the GPU")
    rates = {(test["n_prompt"], test["n_gen"]): test["avg_ts"] for test in tests}
    measured = {
        "decode_tokens_per_s": rates[0, task.output_tokens],
        "ttft_s": {str(tokens): tokens / rates[tokens, 0] for tokens in task.prompts},
    }
    return " ".join(["llama-bench", *arguments]), finished, measured


def script(
    python: str, arguments: list[str], log: Path, timeout_s: float
) -> tuple[str, Finished, dict]:
    """Runs a script of this folder that prints its measurements as JSON."""
    name, *rest = arguments
    finished = run([python, str(HERE / name), *rest], log, timeout_s)
    return " ".join(arguments), finished, read(finished, log)


def read(finished: Finished, log: Path) -> list | dict:
    """What a program printed as JSON."""
    try:
        return json.loads(finished.stdout)
    except ValueError:
        raise Failed(f"printed no JSON, see {log}") from None


def lengths(task: Task) -> list[str]:
    prompts = map(str, task.prompts)
    return ["--prompt-tokens", *prompts, "--output-tokens", str(task.output_tokens)]


PROGRAMS: dict[str, Runner] = {
    "llama.cpp": llama,
    "llama.cpp --fit": fitted_llama,
    "fiddler": original_fiddler,
    "accelerate": accelerate,
}
NAMES = (OURS, *PROGRAMS)


def table(found: dict[str, dict], prompts: list[int]) -> str:
    first = [f"first of {tokens}, s" for tokens in prompts]
    columns = ["", "decode, tokens/s", *first, "GPU memory, GB", "RAM, GB", "command"]
    return markdown(columns, [row(name, each, prompts) for name, each in found.items()])


def row(name: str, result: dict, prompts: list[int]) -> list[str]:
    if "why_not" in result:
        return [name, *[""] * (3 + len(prompts)), result["why_not"]]
    first_s = {int(tokens): f"{seconds:.2f}" for tokens, seconds in result["ttft_s"].items()}
    first = [first_s.get(tokens, "") for tokens in prompts]
    memory = [f"{result[kind] / 1e9:.1f}" for kind in ("gpu_bytes", "host_bytes")]
    return [name, f"{result['decode_tokens_per_s']:.2f}", *first, *memory, f"`{result['command']}`"]


def figure(found: dict[str, dict]):
    """Bars of the decode rates and of the times to the first token."""
    from matplotlib.figure import Figure

    shown = {name: each for name, each in found.items() if "why_not" not in each}
    rates = {name: each["decode_tokens_per_s"] for name, each in shown.items()}
    by_prompt: dict[str, dict[str, float]] = {}
    for name, each in shown.items():
        for tokens, seconds in each["ttft_s"].items():
            by_prompt.setdefault(f"first token of {tokens}, s (less is better)", {})[name] = seconds
    panels = {"decode, tokens/s (more is better)": rates, **by_prompt}
    drawn = Figure(figsize=(4.5 * len(panels), 0.6 + 0.4 * len(shown)), layout="constrained")
    (all_axes,) = drawn.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (title, values) in zip(all_axes, panels.items(), strict=True):
        axes.bar_label(axes.barh(list(values), list(values.values())), fmt="%.3g", padding=3)
        axes.set(title=title, xlim=(0, 1.2 * max(values.values(), default=1.0)))
    all_axes[0].invert_yaxis()  # of all panels, which share it
    return drawn


def parse_arguments() -> argparse.Namespace:
    default = "(default: %(default)s)"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--plan", required=True, nargs="+", metavar="FILE")
    add("--model", required=True, metavar="CONFIG", help="the model's config.json")
    add("--only", default=",".join(NAMES), metavar="NAME,...", help=f"programs {default}")
    add("--prompts", type=int, nargs="+", default=[512, 2048], metavar="N", help=default)
    add("--output-tokens", type=int, default=64, metavar="N", help=default)
    add("--timeout", type=float, default=1800, metavar="S", help=f"of each program {default}")
    add("--offload-tokens", type=int, default=4, metavar="N", help=f"for accelerate {default}")
    add("--fiddler", metavar="FOLDER", help="a clone of github.com/efeslab/fiddler")
    add("--fiddler-python", default=sys.executable, metavar="FILE", help="an interpreter for it")
    add("--gguf", metavar="FILE", help="a BF16 GGUF of the model")
    add("-o", "--output", default="build/peers", metavar="FOLDER", help=default)
    options = "for llama-bench, after --, such as `-ngl 99 -ncmoe 26 -r 2`"
    add("llama", nargs="*", metavar="OPTION", help=options)
    flags = parser.parse_args()
    if flags.offload_tokens < 2:
        parser.error("--offload-tokens must be at least 2")
    if unknown := set(flags.only.split(",")) - set(NAMES):
        parser.error(f"--only: unknown program {sorted(unknown)[0]}")
    return flags


if __name__ == "__main__":
    sys.exit(exit_status(main, "peers.py"))
