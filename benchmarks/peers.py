"""Compares with other programs that run such models, on the same machine.

    python benchmarks/peers.py --plan PLAN -o FOLDER [--only NAME,...]

- fiddler-run: the plan, with `--load-format dummy`
- accelerate: transformers with `device_map` offload, see peer_accelerate.py
- fiddler: the original Fiddler, if --fiddler names a clone of it, see peer_fiddler.py
- llama.cpp: `llama-bench`, if it is in PATH and --gguf names a BF16 GGUF of the model, such as one
  made by random_gguf.py; more of its options after `--`

They run one after the other in separate processes, with random weights, one sequence of the plan's
prompt and output (fewer output tokens for accelerate), and the plan's GPU memory. llama.cpp takes
as much as its options say: the table shows how much of the GPU's memory was in use. Results are
added to peers.json, and written to peers.md and peers.png, after each program.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

from table import markdown

from fiddler_run.command import exit_status
from fiddler_run.plan.schema import Plan
from fiddler_run.system.files import write_whole
from fiddler_run.weights.model_folder import model_config_file

COLUMNS = (
    *("", "decode, tokens/s", "first token, s", "as fast as fiddler-run", "GPU memory, GB"),
    "command, or why there is no result",
)
HERE = Path(__file__).parent
SAMPLE_S = 0.2  # how often the GPU memory in use is sampled


class Failed(Exception):
    """The reason why a program gave no result."""


def main() -> None:
    flags = parse_arguments()
    folder = Path(flags.output)
    plan = Plan.load(flags.plan)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "peers.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for name in flags.only.split(","):
        print(f"{name} ...", file=sys.stderr)
        try:
            with PeakGpuMemory() as peak:
                found[name] = PROGRAMS[name](plan, flags, folder)
            found[name]["gpu_bytes"] = peak.bytes
        except Failed as error:
            found[name] = {"why_not": str(error)}
        write_whole(file, json.dumps(found, indent=1))
        ours = found.get("fiddler-run", {}).get("decode_tokens_per_s")
        table = markdown(COLUMNS, [row(name, result, ours) for name, result in found.items()])
        write_whole(folder / "peers.md", table)
        figure(found).savefig(folder / "peers.png", dpi=130)
    print(table)


def row(name: str, result: dict, ours: float | None) -> tuple[str, ...]:
    """A row of the table. `ours` is the decode rate of fiddler-run, if it ran."""
    if "why_not" in result:
        return name, "", "", "", "", result["why_not"]
    rate = result["decode_tokens_per_s"]
    ratio = f"{rate / ours:.2f}" if ours else ""
    memory = f"{result['gpu_bytes'] / 1e9:.1f}" if result["gpu_bytes"] else ""
    return name, f"{rate:.2f}", f"{result['ttft_s']:.2f}", ratio, memory, f"`{result['command']}`"


def figure(found: dict[str, dict]):
    """Bars of the decode rates and of the times to the first token."""
    from matplotlib.figure import Figure

    shown = {name: each for name, each in found.items() if "why_not" not in each}
    drawn = Figure(figsize=(9, 0.6 + 0.4 * len(shown)), layout="constrained")
    for axes, key, title in zip(
        drawn.subplots(1, 2, sharey=True),
        ("decode_tokens_per_s", "ttft_s"),
        ("decode, tokens/s (more is better)", "first token, s (less is better)"),
        strict=True,
    ):
        values = [each[key] for each in shown.values()]
        axes.bar_label(axes.barh(list(shown), values), fmt="%.2g", padding=3)
        axes.set(title=title, xlim=(0, 1.2 * max(values, default=1.0)))
    axes.invert_yaxis()  # both, which share it
    return drawn


class PeakGpuMemory:
    """The largest number of bytes in use on the first GPU while it is entered, by all programs.

    0 without nvidia-smi.
    """

    bytes = 0

    def __enter__(self) -> "PeakGpuMemory":
        self.over = threading.Event()
        self.sampler = threading.Thread(target=self.sample)
        self.sampler.start()
        return self

    def sample(self) -> None:
        command = [
            "nvidia-smi",
            "-i",
            "0",
            "--query-gpu=memory.used",
            "--format=csv,noheader,nounits",
        ]
        while shutil.which(command[0]) and not self.over.wait(SAMPLE_S):
            used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            self.bytes = max(self.bytes, int(used) * 2**20)

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.sampler.join()


def run(command: list[str], log: Path) -> str:
    """Runs a program and returns its stdout. Writes stderr to `log`.

    Raises:
        Failed: its exit status is not 0.
    """
    with log.open("w") as errors:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False
        )
    if done.returncode != 0:
        raise Failed(f"failed, see {log}")
    return done.stdout


def fiddler_run(plan: Plan, flags: argparse.Namespace, folder: Path) -> dict:
    file = folder / "fiddler-run.json"
    tokens = str(flags.output_tokens or plan.workload.output_tokens)
    arguments = [
        *("--plan", flags.plan, "--load-format", "dummy", "--bench", "--json", str(file)),
        *("--num-beams", "1", "--batch-size", "1", "--max-new-tokens", tokens),
    ]
    run([sys.executable, "-m", "fiddler_run.cli", *arguments], folder / "fiddler-run.log")
    measured = json.loads(file.read_text())["measured"]
    return {
        "command": " ".join(["fiddler-run", *arguments]),
        "decode_tokens_per_s": measured["decode_tokens_per_s"],
        "ttft_s": measured["ttft_s"],
    }


def accelerate(plan: Plan, flags: argparse.Namespace, folder: Path) -> dict:
    if find_spec("accelerate") is None:
        raise Failed("not installed: pip install accelerate")
    memory = plan.rank.gpu_memory_bytes
    arguments = [
        *("peer_accelerate.py", config_file(plan, flags)),
        *("--gpu-bytes", str(max(0, memory.total - memory.reserve))),
        *("--prompt-tokens", str(plan.workload.prompt_tokens)),
        *("--output-tokens", str(flags.offload_tokens)),
    ]
    return peer(sys.executable, arguments, folder / "accelerate.log")


def original_fiddler(plan: Plan, flags: argparse.Namespace, folder: Path) -> dict:
    if flags.fiddler is None:
        raise Failed("no --fiddler given")
    arguments = [
        *("peer_fiddler.py", flags.fiddler, config_file(plan, flags)),
        *("--gpu-bytes", str(plan.rank.gpu_memory_bytes.total)),
        *("--prompt-tokens", str(plan.workload.prompt_tokens)),
        *("--output-tokens", str(flags.output_tokens or plan.workload.output_tokens)),
    ]
    return peer(flags.fiddler_python, arguments, folder / "fiddler.log")


def peer(python: str, arguments: list[str], log: Path) -> dict:
    """Runs a script of this folder that prints its measurements as JSON."""
    script, *rest = arguments
    printed = run([python, str(HERE / script), *rest], log)
    return {"command": " ".join(arguments), **json.loads(printed)}


def config_file(plan: Plan, flags: argparse.Namespace) -> str:
    return str(model_config_file(plan.model.name, Path(flags.plan).resolve().parent))


def llama(plan: Plan, flags: argparse.Namespace, folder: Path) -> dict:
    program = shutil.which("llama-bench")
    if program is None:
        raise Failed("no `llama-bench` in PATH")
    if flags.gguf is None:
        raise Failed("no --gguf given")
    prompt = plan.workload.prompt_tokens
    output = str(flags.output_tokens or plan.workload.output_tokens)
    threads = str(plan.rank.cpu_threads)
    arguments = ["-m", flags.gguf, "-t", threads, "-p", str(prompt), "-n", output, *flags.llama]
    printed = run([program, *arguments, "-o", "json"], folder / "llama-bench.log")
    prefill, decode = json.loads(printed)
    if shutil.which("nvidia-smi") and not prefill["gpu_info"]:
        raise Failed("llama-bench did not use the GPU")
    return {
        "command": " ".join(["llama-bench", *arguments]),
        "ttft_s": prompt / prefill["avg_ts"],
        "decode_tokens_per_s": decode["avg_ts"],
    }


PROGRAMS = {
    "fiddler-run": fiddler_run,
    "accelerate": accelerate,
    "fiddler": original_fiddler,
    "llama.cpp": llama,
}


def parse_arguments() -> argparse.Namespace:
    default = "(default: %(default)s)"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--plan", default="plans/rtx4090.yaml", metavar="FILE", help=default)
    add("--only", default=",".join(PROGRAMS), metavar="NAME,...", help=f"programs {default}")
    add("--output-tokens", type=int, metavar="N", help="(default: the plan's)")
    add("--offload-tokens", type=int, default=4, metavar="N", help=f"for accelerate {default}")
    add("--fiddler", metavar="FOLDER", help="a clone of github.com/efeslab/fiddler")
    add("--fiddler-python", default=sys.executable, metavar="FILE", help="an interpreter for it")
    add("--gguf", metavar="FILE", help="a BF16 GGUF of the model")
    add("-o", "--output", default="build/peers", metavar="FOLDER", help=default)
    options = "for llama-bench, after --, such as `-ngl 99 -ncmoe 26 -lm none`"
    add("llama", nargs="*", metavar="OPTION", help=options)
    flags = parser.parse_args()
    if flags.offload_tokens < 2:
        parser.error("--offload-tokens must be at least 2")
    if unknown := set(flags.only.split(",")) - set(PROGRAMS):
        parser.error(f"--only: unknown program {sorted(unknown)[0]}")
    return flags


if __name__ == "__main__":
    sys.exit(exit_status(main, "peers.py"))
