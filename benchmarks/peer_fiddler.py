"""Times the original Fiddler (https://github.com/efeslab/fiddler) with random weights.

    python benchmarks/peer_fiddler.py CLONE CONFIG --gpu-bytes N

CLONE is a clone of its repository. Its Mixtral needs transformers 4.36.2, a CUDA device, and a
model of 32 layers with 8 experts. Nothing of it is changed, but it is given a model with random
weights instead of a checkpoint, a tokenizer that returns random ids, and --gpu-bytes as the GPU's
memory. Prints a JSON object with ttft_s and decode_tokens_per_s.
"""

import argparse
import contextlib
import json
import sys
import types
from pathlib import Path
from unittest import mock

import torch
import transformers
from random_weights import fill

RUNS = 3


def main() -> None:
    flags = parse_arguments()
    sys.path.insert(0, str(Path(flags.clone) / "src" / "fiddler"))
    with contextlib.redirect_stdout(sys.stderr):  # it prints its text
        results = measure(flags)
    ttft_s, decode_s = (sorted(values)[RUNS // 2] for values in zip(*results, strict=True))
    rate = (flags.output_tokens - 1) / decode_s
    print(json.dumps({"ttft_s": ttft_s, "decode_tokens_per_s": rate}))


def measure(flags: argparse.Namespace) -> list[tuple[float, float]]:
    """Seconds of the prompt and of all later tokens, for each run after the first."""
    config = transformers.MixtralConfig.from_json_file(flags.config)
    torch.cuda.init()  # it reads the real properties of the GPU
    gpu = types.SimpleNamespace(total_memory=flags.gpu_bytes)
    arguments = types.SimpleNamespace(model=flags.config, cpu_offload=1, beam_width=1)
    with (
        mock.patch.object(
            transformers.MixtralForCausalLM, "from_pretrained", return_value=random_model(config)
        ),
        mock.patch.object(
            transformers.AutoTokenizer, "from_pretrained", return_value=RandomTokenizer(config)
        ),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=gpu),
    ):
        from mixtral import FiddlerMixtral

        model = FiddlerMixtral(arguments)
        results = [
            model.generate("", flags.output_tokens, flags.prompt_tokens) for _ in range(RUNS + 1)
        ]
    return [(prompt_s, decode_s) for prompt_s, decode_s, _ in results[1:]]


def random_model(config: transformers.MixtralConfig) -> transformers.MixtralForCausalLM:
    torch.set_default_dtype(torch.bfloat16)
    with transformers.modeling_utils.no_init_weights():
        model = transformers.MixtralForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    fill(model)
    return model.eval()


class RandomTokenizer:
    """Returns random ids, and no text."""

    eos_token = pad_token = "</s>"
    pad_token_id = 2

    def __init__(self, config: transformers.MixtralConfig) -> None:
        self.config = config

    def __call__(self, text: str, return_tensors: str) -> types.SimpleNamespace:
        size = (1, self.config.max_position_embeddings // 8)
        return types.SimpleNamespace(input_ids=torch.randint(3, self.config.vocab_size, size))

    def decode(self, ids: torch.Tensor) -> str:
        return ""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("clone", metavar="CLONE")
    add("config", metavar="CONFIG", help="a config.json")
    add("--gpu-bytes", type=int, required=True, metavar="N")
    add("--prompt-tokens", type=int, default=512, metavar="N")
    add("--output-tokens", type=int, default=64, metavar="N")
    return parser.parse_args()


if __name__ == "__main__":
    main()
