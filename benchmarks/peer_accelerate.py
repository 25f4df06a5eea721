"""Times transformers' own Mixtral with random weights, placed by accelerate.

    python benchmarks/peer_accelerate.py CONFIG --gpu-bytes N

Prints a JSON object with decode_tokens_per_s, after the first prompt, and ttft_s by prompt tokens.
"""

import argparse
import json
import time

import torch
from accelerate import dispatch_model, infer_auto_device_map
from random_weights import fill
from transformers import MixtralConfig, MixtralForCausalLM

SPARE_BYTES = 500_000_000  # accelerate only counts weights


def main() -> None:
    flags = parse_arguments()
    on_gpu = torch.cuda.is_available()
    memory: dict[int | str, int] = {"cpu": 10**12}
    if on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, flags.gpu_bytes / total))
        memory[0] = max(0, flags.gpu_bytes - SPARE_BYTES - max(flags.prompt_tokens) * 2**20)
    model = offloaded_model(flags.config, memory, 0 if on_gpu else "cpu")
    device = "cuda" if on_gpu else "cpu"
    arguments = {"do_sample": False, "pad_token_id": 0}

    def seconds(prompt_tokens: int, tokens: int) -> float:
        ids = torch.randint(3, model.config.vocab_size, (1, prompt_tokens), device=device)
        mask = torch.ones_like(ids)
        started_s = time.perf_counter()
        model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, **arguments
        )
        return time.perf_counter() - started_s

    first = flags.prompt_tokens[0]
    seconds(first, 1)
    first_s = {tokens: seconds(tokens, 1) for tokens in flags.prompt_tokens}
    decode_s = seconds(first, flags.output_tokens) - first_s[first]
    rate = (flags.output_tokens - 1) / decode_s
    print(json.dumps({"decode_tokens_per_s": rate, "ttft_s": first_s}))


def offloaded_model(config_file: str, memory: dict[int | str, int], main_device: int | str):
    """A Mixtral placed by accelerate on devices with `memory` bytes."""
    config = MixtralConfig.from_json_file(config_file)
    with torch.device("meta"):
        model = MixtralForCausalLM(config).bfloat16().eval()
    model.to_empty(device="cpu")
    fill(model)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    device_map = infer_auto_device_map(
        model, memory, no_split_module_classes=["MixtralDecoderLayer"], dtype=torch.bfloat16
    )
    return dispatch_model(model, device_map, main_device=main_device, force_hooks=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a config.json")
    add("--gpu-bytes", type=int, required=True, metavar="N")
    add("--prompt-tokens", type=int, nargs="+", default=[512], metavar="N")
    add("--output-tokens", type=int, default=4, metavar="N")
    return parser.parse_args()


if __name__ == "__main__":
    main()
