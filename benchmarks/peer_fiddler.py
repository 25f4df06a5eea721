"""Times the original Fiddler (https://github.com/efeslab/fiddler) with random weights.

    python benchmarks/peer_fiddler.py CLONE CONFIG --gpu-bytes N

CLONE is a clone of its repository. Its Mixtral needs transformers 4.36.2, a CUDA device, and a
model of 32 layers with 8 experts. Nothing of it is changed, but it is given a model with random
weights instead of a checkpoint, a tokenizer that returns random ids, and --gpu-bytes as the GPU's
memory. Prints a JSON object with decode_tokens_per_s, after the first prompt, and ttft_s by prompt
tokens.
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


def main() -> None:
    flags = parse_arguments()
    sys.path.insert(0, str(Path(flags.clone) / "src" / "fiddler"))
    with contextlib.redirect_stdout(sys.stderr):  # it prints its text
        result = measure(flags)
    print(json.dumps(result))


def measure(flags: argparse.Namespace) -> dict:
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
        first = flags.prompt_tokens[0]
        model.generate("", 2, first)  # warms up
        _, decode_s, _ = model.generate("", flags.output_tokens, first)
        return {
            "decode_tokens_per_s": (flags.output_tokens - 1) / decode_s,
            "ttft_s": {tokens: model.generate("", 1, tokens)[0] for tokens in flags.prompt_tokens},
        }


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
    add("--prompt-tokens", type=int, nargs="+", default=[512], metavar="N")
    add("--output-tokens", type=int, default=64, metavar="N")
    return parser.parse_args()


if __name__ == "__main__":
    main()
