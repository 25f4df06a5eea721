"""Compares with other programs that run such models, on the same machine.

    python benchmarks/peers.py --plan PLAN -o FOLDER

- fiddler-run: the plan, with `--load-format dummy`
- accelerate: transformers with `device_map` offload, the same config and random bfloat16 weights,
  under the same GPU cap
- llama.cpp: `llama-bench`, if it is in PATH and --gguf names a BF16 GGUF of the model; more of its
  options after `--`

They run one after the other in separate processes, with one sequence of the plan's prompt and
output (fewer output tokens for accelerate). Writes peers.json and peers.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from table import markdown

from fiddler_run.command import exit_status
from fiddler_run.plan.schema import Plan
from fiddler_run.system.files import write_whole
from fiddler_run.weights.model_folder import model_config_file

SPARE_BYTES = 500_000_000  # accelerate only counts weights
COLUMNS = ("", "decode, tokens/s", "first token, s", "as fast as fiddler-run", "command or why not")


class Failed(Exception):
    """The reason why a program gave no result."""


def main() -> None:
    flags = parse_arguments()
    if flags.offload is not None:
        print(json.dumps(offload(*json.loads(flags.offload))))
        return
    folder = Path(flags.output)
    plan = Plan.load(flags.plan)
    folder.mkdir(parents=True, exist_ok=True)
    programs = {"fiddler-run": fiddler, "accelerate": accelerate, "llama.cpp": llama}
    found = {}
    for name, measure in programs.items():
        print(f"{name} ...", file=sys.stderr)
        try:
            found[name] = measure(plan, flags, folder)
        except Failed as error:
            found[name] = {"why_not": str(error)}
        write_whole(folder / "peers.json", json.dumps(found, indent=1))
    ours = found["fiddler-run"].get("decode_tokens_per_s")
    table = markdown(COLUMNS, [row(name, result, ours) for name, result in found.items()])
    write_whole(folder / "peers.md", table)
    print(table)


def row(name: str, result: dict, ours: float | None) -> tuple[str, ...]:
    """A row of the table. `ours` is the decode rate of fiddler-run, if it ran."""
    if "why_not" in result:
        return name, "", "", "", result["why_not"]
    rate = result["decode_tokens_per_s"]
    ratio = f"{rate / ours:.2f}" if ours else ""
    return name, f"{rate:.2f}", f"{result['ttft_s']:.2f}", ratio, f"`{result['command']}`"


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


def fiddler(plan: Plan, flags: argparse.Namespace, folder: Path) -> dict:
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
    config = str(model_config_file(plan.model.name, Path(flags.plan).resolve().parent))
    memory = plan.rank.gpu_memory_bytes
    allowed = max(0, memory.total - memory.reserve)
    asked = json.dumps([config, allowed, plan.workload.prompt_tokens, flags.offload_tokens])
    printed = run([sys.executable, __file__, "--offload", asked], folder / "accelerate.log")
    command = f"transformers, device_map by max_memory, {flags.offload_tokens} tokens"
    return {"command": command, **json.loads(printed)}


def llama(plan: Plan, flags: argparse.Namespace, folder: Path) -> dict:
    program = shutil.which("llama-bench")
    if program is None:
        raise Failed("no `llama-bench` in PATH")
    if flags.gguf is None:
        raise Failed("no --gguf given")
    prompt = plan.workload.prompt_tokens
    output = flags.output_tokens or plan.workload.output_tokens
    threads = str(plan.rank.cpu_threads)
    common = ["-m", flags.gguf, "-t", threads, "-o", "json", *flags.llama]
    prefill = ["-p", str(prompt), "-n", "0"]
    decode = ["-p", "0", "-n", str(output), "-d", str(prompt)]  # after as long a context as ours

    def rate(test: list[str]) -> float:
        printed = run([program, *common, *test], folder / "llama-bench.log")
        return json.loads(printed)[0]["avg_ts"]

    return {
        "command": " ".join(["llama-bench", *common, *decode]),
        "ttft_s": prompt / rate(prefill),
        "decode_tokens_per_s": rate(decode),
    }


def offload(config_file: str, allowed_bytes: int, prompt_tokens: int, output_tokens: int) -> dict:
    """Times transformers' own Mixtral, with as much on the GPU as accelerate places there."""
    import torch

    on_gpu = torch.cuda.is_available()
    memory: dict[int | str, int] = {"cpu": 10**12}
    if on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed_bytes / total))
        memory[0] = max(0, allowed_bytes - SPARE_BYTES - prompt_tokens * 2**20)
    model = offloaded_model(config_file, memory, 0 if on_gpu else "cpu")
    device = "cuda" if on_gpu else "cpu"
    ids = torch.randint(3, model.config.vocab_size, (1, prompt_tokens), device=device)
    arguments = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}

    def seconds(tokens: int) -> float:
        started_s = time.perf_counter()
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **arguments)
        return time.perf_counter() - started_s

    seconds(1)
    first_s = seconds(1)
    all_s = seconds(output_tokens)
    return {"decode_tokens_per_s": (output_tokens - 1) / (all_s - first_s), "ttft_s": first_s}


def offloaded_model(config_file: str, memory: dict[int | str, int], main_device: int | str):
    """A Mixtral with random weights, placed by accelerate on devices with that much memory."""
    import torch
    from accelerate import dispatch_model, infer_auto_device_map
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig.from_json_file(config_file)
    with torch.device("meta"):
        model = MixtralForCausalLM(config).bfloat16().eval()
    model.to_empty(device="cpu")
    # The same numbers are repeated: the time does not depend on them.
    noise = torch.empty(2**20, dtype=torch.bfloat16).normal_(std=0.02)
    for parameter in model.parameters():
        flat = parameter.detach().view(-1)
        for start in range(0, len(flat), len(noise)):
            flat[start : start + len(noise)] = noise[: len(flat) - start]
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    device_map = infer_auto_device_map(
        model, memory, no_split_module_classes=["MixtralDecoderLayer"], dtype=torch.bfloat16
    )
    return dispatch_model(model, device_map, main_device=main_device, force_hooks=True)


def parse_arguments() -> argparse.Namespace:
    default = "(default: %(default)s)"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--plan", default="plans/rtx4090.yaml", metavar="FILE", help=default)
    add("--output-tokens", type=int, metavar="N", help="(default: the plan's)")
    add("--offload-tokens", type=int, default=4, metavar="N", help=f"for accelerate {default}")
    add("--gguf", metavar="FILE", help="a BF16 GGUF of the model")
    add("-o", "--output", default="build/peers", metavar="FOLDER", help=default)
    add("--offload", help=argparse.SUPPRESS)
    options = "for llama-bench, after --, such as `-ngl 99 -ncmoe 26`"
    add("llama", nargs="*", metavar="OPTION", help=options)
    flags = parser.parse_args()
    if flags.offload_tokens < 2:
        parser.error("--offload-tokens must be at least 2")
    return flags


if __name__ == "__main__":
    sys.exit(exit_status(main, "peers.py"))
