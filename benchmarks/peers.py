"""What is installed beside this, on the same machine in one call: `python benchmarks/peers.py --plan PLAN -o FOLDER`.

    fiddler-run       the plan, with `--load-format dummy`
    accelerate        transformers with `device_map` offload: the same config with random bfloat16 weights, under the same GPU cap
    llama.cpp         `llama-bench`, where it is in PATH and --gguf names a BF16 GGUF of the model; more of its options after `--`

Each runs in a process of its own, one after the other: one sequence of the plan's prompt and output, accelerate of fewer tokens.
Writes peers.json and peers.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from fiddler_run.files import write_whole
from fiddler_run.locate import model_config_file
from fiddler_run.plan import Plan

SPARE_BYTES = 500_000_000  # accelerate counts weights alone


def main() -> None:
    flags = parse_arguments()
    if flags.offload is not None:
        print(json.dumps(offload(*json.loads(flags.offload))))
        return
    folder, plan = Path(flags.output), Plan.load(flags.plan)
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, measure in (("fiddler-run", fiddler), ("accelerate", accelerate), ("llama.cpp", llama)):
        print(f"{name} ...", file=sys.stderr)
        found[name] = measure(plan, flags, folder)
        write_whole(folder / "peers.json", json.dumps(found, indent=1))
    rows = [("", "decode, tokens/s", "first token, s", "as fast as fiddler-run", "command or why not"), ("---",) * 5]
    ours = found["fiddler-run"].get("decode_tokens_per_s")
    for name, result in found.items():
        rate, ttft = result.get("decode_tokens_per_s"), result.get("ttft_s")
        speeds = (f"{rate:.2f}", f"{ttft:.2f}", f"{rate / ours:.2f}" if ours else "") if rate else ("", "", "")
        rows.append((name, *speeds, f"`{result['command']}`" if rate else result["why_not"]))
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    write_whole(folder / "peers.md", table)
    print(table)


def run(command: list[str], log: Path) -> str | None:
    """Its stdout; None if it fails, with all it said in `log`."""
    with log.open("w") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def fiddler(plan: Plan, flags: argparse.Namespace, folder: Path) -> dict:
    file = folder / "fiddler-run.json"
    command = ["fiddler-run", "--plan", flags.plan, "--load-format", "dummy", "--bench", "--json", str(file)]
    command += [
        "--num-beams",
        "1",
        "--batch-size",
        "1",
        "--max-new-tokens",
        str(flags.output_tokens or plan.workload.output_tokens),
    ]
    if run([sys.executable, "-m", "fiddler_run.cli", *command[1:]], folder / "fiddler-run.log") is None:
        return {"why_not": f"failed, see {folder / 'fiddler-run.log'}"}
    measured = json.loads(file.read_text())["measured"]
    return {"command": " ".join(command), **{key: measured[key] for key in ("decode_tokens_per_s", "ttft_s")}}


def accelerate(plan: Plan, flags: argparse.Namespace, folder: Path) -> dict:
    if find_spec("accelerate") is None:
        return {"why_not": "not installed: pip install accelerate"}
    config = str(model_config_file(plan.model.name, Path(flags.plan).resolve().parent))
    allowed = max(0, plan.gpu_memory_bytes.total - plan.gpu_memory_bytes.reserve)
    asked = [config, allowed, plan.workload.prompt_tokens, flags.offload_tokens]
    printed = run([sys.executable, __file__, "--offload", json.dumps(asked)], folder / "accelerate.log")
    if printed is None:
        return {"why_not": f"failed, see {folder / 'accelerate.log'}"}
    return {"command": f"transformers, device_map by max_memory, {flags.offload_tokens} tokens", **json.loads(printed)}


def llama(plan: Plan, flags: argparse.Namespace, folder: Path) -> dict:
    program = shutil.which("llama-bench")
    if program is None or flags.gguf is None:
        return {"why_not": "no `llama-bench` in PATH" if program is None else "no --gguf given"}
    prompt, output = plan.workload.prompt_tokens, flags.output_tokens or plan.workload.output_tokens
    common = ["llama-bench", "-m", flags.gguf, "-t", str(plan.cpu_threads), "-o", "json", *flags.llama]
    decode = ["-p", "0", "-n", str(output), "-d", str(prompt)]  # after as long a context as ours
    rates = []
    for test in (["-p", str(prompt), "-n", "0"], decode):
        printed = run([program, *common[1:], *test], folder / "llama-bench.log")
        if printed is None:
            return {"why_not": f"failed, see {folder / 'llama-bench.log'}"}
        rates.append(json.loads(printed)[0]["avg_ts"])
    return {"command": " ".join([*common, *decode]), "decode_tokens_per_s": rates[1], "ttft_s": prompt / rates[0]}


def offload(config_file: str, allowed_bytes: int, prompt_tokens: int, output_tokens: int) -> dict:
    """transformers' own Mixtral with random weights, as much of it on the GPU as accelerate puts there, the rest offloaded."""
    import torch
    from accelerate import dispatch_model, infer_auto_device_map
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig.from_json_file(config_file)
    with torch.device("meta"):
        model = MixtralForCausalLM(config).bfloat16().eval()
    model.to_empty(device="cpu")
    noise = torch.empty(2**20, dtype=torch.bfloat16).normal_(std=0.02)
    for parameter in model.parameters():  # the same numbers again and again: what they are takes no time
        flat = parameter.detach().view(-1)
        for start in range(0, len(flat), len(noise)):
            flat[start : start + len(noise)] = noise[: len(flat) - start]
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    memory: dict[int | str, int] = {"cpu": 10**12}
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed_bytes / total))
        memory[0] = max(0, allowed_bytes - SPARE_BYTES - prompt_tokens * 2**20)
    device_map = infer_auto_device_map(model, memory, no_split_module_classes=["MixtralDecoderLayer"], dtype=torch.bfloat16)
    model = dispatch_model(model, device_map, main_device=0 if torch.cuda.is_available() else "cpu", force_hooks=True)
    ids = torch.randint(3, config.vocab_size, (1, prompt_tokens), device="cuda" if torch.cuda.is_available() else "cpu")
    arguments = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}

    def seconds(tokens: int) -> float:
        started = time.perf_counter()
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **arguments)
        return time.perf_counter() - started

    seconds(1)
    first_s, all_s = seconds(1), seconds(output_tokens)
    return {"decode_tokens_per_s": (output_tokens - 1) / (all_s - first_s), "ttft_s": first_s}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", default="plans/rtx4090.yaml", metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--output-tokens", type=int, metavar="N", help="(default: the plan's)")
    parser.add_argument("--offload-tokens", type=int, default=4, metavar="N", help="for accelerate (default: %(default)s)")
    parser.add_argument("--gguf", metavar="FILE", help="a BF16 GGUF of the model")
    parser.add_argument("-o", "--output", default="build/peers", metavar="FOLDER", help="(default: %(default)s)")
    parser.add_argument("--offload", help=argparse.SUPPRESS)
    parser.add_argument("llama", nargs="*", metavar="OPTION", help="for llama-bench, after --, such as `-ngl 99 -ncmoe 26`")
    flags = parser.parse_args()
    if flags.offload_tokens < 2:
        parser.error("--offload-tokens must be at least 2")
    return flags


if __name__ == "__main__":
    main()
