"""Times a plan with random weights.

    python benchmarks/peer_fiddler_run.py PLAN --prompt-tokens 512 2048

Prints a JSON object with decode_tokens_per_s, after the first prompt, and ttft_s by prompt tokens.
"""

import os

from fiddler_run.command import GOMP_SPINCOUNT

# As the command does, before PyTorch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", GOMP_SPINCOUNT)

import argparse
import json
from statistics import median

from runs import first_token_s, repeated

from fiddler_run import load_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", metavar="PLAN")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[512], metavar="N")
    parser.add_argument("--output-tokens", type=int, default=64, metavar="N")
    flags = parser.parse_args()
    model, _ = load_model(flags.plan, load_format="dummy")
    runs = repeated(model, flags.prompt_tokens[0], flags.output_tokens)
    result = {
        "decode_tokens_per_s": median(run.decode_tokens_per_s for run in runs),
        "ttft_s": {tokens: first_token_s(model, tokens) for tokens in flags.prompt_tokens},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
